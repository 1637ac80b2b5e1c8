"""Building models from directories: for training, for scoring, for generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from raydiv.config import Recipe
from raydiv.config.recipe import Lora, Model
from raydiv.errors import UserError
from raydiv.model.chat import Chat
from raydiv.model.files import model_directory
from raydiv.model.quiet import quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""``engine.precision`` as torch names it."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to load in some process, and how: its directory (a LoRA adapter's included) and the recipe's say in it."""

    directory: Path
    template: str | None = None
    attention: str = "sdpa"
    trust_remote_code: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"

    @classmethod
    def of(cls, recipe: Recipe, directory: Path) -> ModelSource:
        model = recipe.model
        return cls(directory, recipe.data.template, model.attention, model.trust_remote_code, recipe.engine.precision)

    def chat(self) -> Chat:
        return Chat(self.directory, self.template)

    def load(self) -> Any:
        """The causal model, for scoring or generation; an adapter is merged into its base."""
        dtype = DTYPES[self.precision]
        if not (self.directory / "adapter_config.json").is_file():
            return _from_pretrained(self.directory, dtype, self.attention, self.trust_remote_code)
        from peft import PeftConfig, PeftModel

        base = model_directory(PeftConfig.from_pretrained(str(self.directory)).base_model_name_or_path or "")
        model = _from_pretrained(base, dtype, self.attention, self.trust_remote_code)
        return PeftModel.from_pretrained(model, str(self.directory)).merge_and_unload()

    def serve(self) -> Any:
        """The model as a pool's worker uses it: on the worker's device, in evaluation mode, without libraries' chatter."""
        quiet()
        return self.load().to("cuda" if torch.cuda.is_available() else "cpu").eval()


def build_policy(directory: Path, section: Model, dtype: Any) -> Any:
    """The model to train: all of its weights, or adapters on it."""
    model = _from_pretrained(directory, dtype, section.attention, section.trust_remote_code)
    if section.lora is None:
        return model
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora_config(section.lora))
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.lora.target_modules: {section.lora.target_modules}: {reason}") from None


def lora_config(lora: Lora) -> Any:
    """The section as peft has it."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def _from_pretrained(directory: Path, dtype: Any, attention: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.id: {directory}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
