"""Loading models from directories, for training, scoring and generation."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from raydiv.config import Recipe
from raydiv.config.data import ChatConfig
from raydiv.config.recipe import LoraConfig, ModelConfig
from raydiv.model.chat import Chat
from raydiv.model.liger import apply_liger_kernels
from raydiv.model.resolve import fingerprint, load_error, model_directory
from raydiv.model.silence import silence_libraries
from raydiv.utils.cache import digest
from raydiv.utils.compat import complete_chunked_attention, keep_4bit_layout, peft_without_quantizer
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.kept_model import kept_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""torch's dtype by ``engine.precision``."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model directory, or that of a LoRA adapter, and the recipe's settings to load it with, in any process."""

    directory: Path
    chat_config: ChatConfig = field(default_factory=ChatConfig)
    attention: str = "auto"
    trust_remote_code: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["nf4"] | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, directory: Path) -> ModelSource:
        model = recipe.model
        return cls(
            directory,
            recipe.data.of_chat(),
            model.attention,
            model.trust_remote_code,
            recipe.engine.precision,
            model.quantization,
        )

    def chat(self) -> Chat:
        """The tokenizer and template."""
        return Chat(self.tokenizer_directory(), self.chat_config, self.trust_remote_code)

    def tokenizer_directory(self) -> Path:
        """The directory of the tokenizer; an adapter without its own has that of its base."""
        if (self.directory / "tokenizer_config.json").is_file():
            return self.directory
        return self.base_directory() or self.directory

    def fingerprint(self) -> str:
        """Digest of the weights and the config; of an adapter with those of its base."""
        directory, base = self._local_directory(), self.base_directory()
        return fingerprint(directory) if base is None else digest(fingerprint(directory), fingerprint(base))

    def load(self, device: str = "cpu") -> Any:
        """The causal model, for scoring or generation; an adapter is merged into its base, unless the base is in 4
        bits.
        """
        model = self.load_unmerged(device)
        if self.base_directory() is None:
            return model
        return model.merge_and_unload() if self.quantization is None else model.get_base_model()

    def load_unmerged(self, device: str = "cpu") -> Any:
        """The causal model; of an adapter, peft's model."""
        directory, base = self._local_directory(), self.base_directory()
        model = _from_pretrained(
            base or directory,
            DTYPES[self.precision],
            self.attention,
            self.trust_remote_code,
            self.quantization,
            device,
        )
        return model if base is None else _with_adapter(model, directory, self.quantization)

    def config(self) -> Any:
        """The config of the language model. Raises UserError when it cannot be read."""
        from transformers import AutoConfig

        directory = self.base_directory() or self.directory
        try:
            config = AutoConfig.from_pretrained(str(directory), trust_remote_code=self.trust_remote_code)
            return config.get_text_config()
        except Exception as error:  # a config.json of nonsense may raise anything
            raise load_error(directory, error, f"config.json: {one_line(error, 300)}") from None

    def stored_dtype(self) -> str:
        """Torch's name of the dtype of the weights by the config, else float32."""
        return str(self.config().dtype or torch.float32).removeprefix("torch.")

    def base_directory(self) -> Path | None:
        """The directory of an adapter's base model; None where this is no adapter."""
        directory = self._local_directory()
        if not (directory / "adapter_config.json").is_file():
            return None
        with peft_without_quantizer():
            from peft import PeftConfig

            config = PeftConfig.from_pretrained(str(directory))
            return model_directory(config.base_model_name_or_path or "", config.revision)

    def _local_directory(self) -> Path:
        """The directory on this node: a bundled or downloaded model that was resolved on another node may be missing
        here.
        """
        return self.directory if self.directory.is_dir() else model_directory(str(self.directory))

    def load_for_inference(self) -> Any:
        """The model for an actor of a pool, which may keep it: on its device, in evaluation mode.

        Silences libraries in this process.
        """
        silence_libraries()
        return kept_model(self, lambda: self.load("cuda" if torch.cuda.is_available() else "cpu").eval())


def build_policy(directory: Path, section: ModelConfig, dtype: Any) -> Any:
    """The model to train, with adapters where ``section.lora`` is set: new ones, or those of ``directory``.

    Raises UserError for target modules that the model lacks.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    base = ModelSource(directory).base_directory()
    # ZeRO-3 partitions weights while they are read; below it they go to the device one by one, without a whole copy in
    # the memory of the host for each worker of a node
    device = "cuda" if torch.cuda.is_available() and not is_deepspeed_zero3_enabled() else "cpu"
    model = _from_pretrained(
        base or directory, dtype, section.attention, section.trust_remote_code, section.quantization, device
    )
    if section.use_liger_kernel:
        apply_liger_kernels(model)
    if base is not None:
        return _with_adapter(model, directory, section.quantization, is_trainable=True)
    if section.lora is None:
        return model
    try:
        with _peft_import(section.quantization):
            from peft import get_peft_model

            return get_peft_model(model, lora_config(section.lora), autocast_adapter_dtype=False)
    except ValueError as error:
        reason = one_line(error, 200)
        raise UserError(f"model.lora.target_modules: {section.lora.target_modules}: {reason}") from None


def _with_adapter(model: Any, directory: Path, quantization: str | None, is_trainable: bool = False) -> Any:
    """A base with the adapter of a directory, in the base's dtype on its device.

    By default peft keeps adapters in fp32. ZeRO below stage 3 would cast them to the model's dtype all the same, and
    at stage 3 each would multiply a copy of its input in fp32; DeepSpeed holds the fp32 weights that are updated.
    """
    with _peft_import(quantization):
        from peft import PeftModel

        return PeftModel.from_pretrained(
            model,
            str(directory),
            is_trainable=is_trainable,
            torch_device=str(model.device),
            autocast_adapter_dtype=False,
        )


def _peft_import(quantization: str | None) -> AbstractContextManager[None]:
    return peft_without_quantizer() if quantization is None else nullcontext()


def attn_implementation(attention: str) -> str | None:
    """``model.attention`` for transformers, which chooses itself where it is None."""
    return None if attention == "auto" else attention


def lora_config(lora: LoraConfig) -> Any:
    """Peft's config of the section."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _from_pretrained(
    directory: Path, dtype: Any, attention: str, trust_remote_code: bool, quantization: str | None, device: str
) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation=attn_implementation(attention),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **({} if device == "cpu" else {"device_map": {"": device}}),
            **({"quantization_config": _quantization_config(quantization, dtype)} if quantization else {}),
        )
    except (OSError, ValueError) as error:
        raise load_error(directory, error, f"cannot be loaded: {one_line(error, 300)}") from None
    complete_chunked_attention(model)
    if quantization is not None:
        keep_4bit_layout(model)
    return model


def _quantization_config(quantization: str, dtype: Any) -> Any:
    """All linear layers except the head in 4 bits (QLoRA, arXiv 2305.14314), computing in ``dtype``."""
    from transformers import BitsAndBytesConfig

    require_quantizer()
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype)


def require_quantizer() -> None:
    """Raises UserError when bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization: needs bitsandbytes; run: pip install 'bitsandbytes>=0.48' (raydiv[quantized])"
        )
