"""Building models from directories: for training, for scoring, for generation."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from raydiv.config.recipe import Model
from raydiv.errors import UserError
from raydiv.model.files import model_directory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""``engine.precision`` as torch names it."""


def load_model(directory: Path, dtype: Any, attention: str = "sdpa", trust_remote_code: bool = False) -> Any:
    """A causal model from a Hugging Face directory, a LoRA adapter's included (its base is loaded and it is merged)."""
    if (directory / "adapter_config.json").is_file():
        return _merged_adapter(directory, dtype, attention, trust_remote_code)
    return _from_pretrained(directory, dtype, attention, trust_remote_code)


def build_policy(directory: Path, section: Model, dtype: Any) -> Any:
    """The model to train: all of its weights, or adapters on it."""
    model = _from_pretrained(directory, dtype, section.attention, section.trust_remote_code)
    if section.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = section.lora
    targets = lora.target_modules
    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
            ),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {targets}: {' '.join(str(error).split())[:200]}") from None


def quiet() -> None:
    """Silence progress bars and advice of transformers, peft and DeepSpeed in a worker."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


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


def _merged_adapter(directory: Path, dtype: Any, attention: str, trust_remote_code: bool) -> Any:
    from peft import PeftConfig, PeftModel

    base = model_directory(PeftConfig.from_pretrained(str(directory)).base_model_name_or_path or "")
    model = PeftModel.from_pretrained(_from_pretrained(base, dtype, attention, trust_remote_code), str(directory))
    return model.merge_and_unload()
