"""Sizes of a model from its config alone: its parameters, and the memory of a forward and a backward.

Parameters are counted on the meta device. Activations are measured, not derived from formulas: copies with two and with
four layers run the project's own collate, attention and head on fake tensors, which have sizes and no memory, and the
live bytes are counted. The difference of the two copies is the size of two layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raydiv.commands.plan.live import LiveBytes
from raydiv.config import Recipe
from raydiv.config.recipe import ModelConfig
from raydiv.data.bundled import FOLDER
from raydiv.model.collate import ModelInputs, collate
from raydiv.model.head import CoefficientFn, LogProbHead
from raydiv.model.load import DTYPES, attn_implementation, lora_config
from raydiv.model.packing import Packing, packing_of
from raydiv.model.resolve import load_error, model_directory, require_base_model
from raydiv.utils.cache import cache_dir, cached_text, code_digest, digest
from raydiv.utils.compat import peft_without_quantizer
from raydiv.utils.errors import UserError, one_line

SHIPPED = FOLDER / "architectures"
"""Configs of models that ``raydiv plan`` knows without the hub; the README.md in the folder gives their origin."""

SHALLOW, DEEP = 2, 4
"""Layers of the copies that run, at most the model's. Even numbers, since some models alternate two kinds of layers."""

FEW_EXAMPLES, MANY_EXAMPLES = 2, 6
"""Examples in the micro-batches of the copies."""


@dataclass(frozen=True, slots=True)
class LinearSize:
    """Bytes as a linear function of the tokens of a micro-batch."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> int:
        return max(0, round(self.fixed + self.per_token * tokens))

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> LinearSize:
        """The linear function through two points (tokens, bytes)."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        return cls(few[1] - slope * few[0], slope)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes that determine memory, in elements except ``activations`` and ``beside``, which are bytes.

    ``trainable`` of ``parameters`` are trained. ``linear`` counts the frozen parameters in linear layers other than the
    head, which 4-bit quantization can hold. ``largest`` is the largest trainable parameter; ``tensors`` [p] are the
    sizes of all parameters. ``head`` is the output projection, which shares the embedding's weight if ``tied``.
    ``activations`` are what the layers save for the backward. ``beside`` is what else is alive at the peak: embedding,
    final norm, head (without its buffer for logits), and the tensors that a backward creates.
    """

    kind: str
    parameters: int
    trainable: int
    linear: int
    largest: int
    tensors: tuple[int, ...]
    layers: int
    hidden: int
    vocabulary: int
    head: int
    tied: bool
    packing: Packing
    activations: LinearSize
    beside: LinearSize

    @property
    def frozen(self) -> int:
        return self.parameters - self.trainable

    @property
    def multiplied_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but an input embedding that is not also the head."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def elements_up_to(self, elements: int) -> int:
        """The total size of the parameters that have at most ``elements`` elements."""
        return sum(size for size in self.tensors if size <= elements)


_ARCHITECTURE = TypeAdapter(Architecture)


def local_model_directory(model: ModelConfig) -> Path | None:
    """The model's directory on this machine, with or without weights; None if it is not here. The hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    if model.id.startswith("bundled:"):
        return model_directory(model.id)
    path = Path(model.id).expanduser()
    if path.exists():
        require_base_model(model.id, path)
        return path
    try:
        cached = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
    except ValueError:  # not a valid hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def config_of(model: ModelConfig) -> Any:
    """The model's config: from its directory or the hub's cache, else a shipped one, else from the hub.

    Raises UserError if none of them has it.
    """
    from transformers import AutoConfig

    directory, shipped = local_model_directory(model), _shipped_configs().get(model.id.lower())
    try:
        if directory is not None or shipped is None:
            return AutoConfig.from_pretrained(
                str(directory or model.id),
                revision=None if directory else model.revision,
                trust_remote_code=model.trust_remote_code,
            )
        fields = json.loads(shipped.read_text())
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # a config.json of nonsense may raise anything
        reason = one_line(error, 200)
        known = ", ".join(sorted(path.stem.replace("--", "/") for path in SHIPPED.glob("*.json")))
        raise load_error(
            model.id,
            error,
            f"config.json not found ({reason}); without the hub, use a local directory with it, or one of {known}",
        ) from None


def _shipped_configs() -> dict[str, Path]:
    """Shipped configs by lower-case hub id. The instruct versions of a model have the same sizes."""
    configs = {path.stem.replace("--", "/").lower(): path for path in SHIPPED.glob("*.json")}
    return {f"{name}{ending}": path for name, path in configs.items() for ending in ("", "-instruct", "-it", "-chat")}


def architecture_of(recipe: Recipe) -> Architecture:
    """Sizes of the recipe's model as the recipe trains it.

    Raises UserError for a model without a config, and for one that does not support the recipe's settings.
    """
    model, batch, engine = recipe.model, recipe.batch, recipe.engine
    return _cached_architecture(
        model.model_dump_json(include={"id", "revision", "lora", "attention", "trust_remote_code"}),
        engine.precision,
        engine.activation_checkpointing,
        batch.packing != "never",
        batch.max_length,
    )


@cache
def _cached_architecture(
    section: str, precision: str, checkpointing: bool, may_pack: bool, max_length: int
) -> Architecture:
    """``architecture_of`` as a function of the settings that it depends on. The result is cached on disk."""
    model = ModelConfig.model_validate_json(section)
    config = config_of(model)
    options = (precision, checkpointing, may_pack, max_length)
    if model.trust_remote_code:  # the code may change under the same config
        return _measure_architecture(config, model, *options)
    note = cache_dir("architectures") / digest(
        config.to_dict(), section, options, code_digest("model", "commands/plan")
    )
    return _ARCHITECTURE.validate_json(
        cached_text(note, lambda: _ARCHITECTURE.dump_json(_measure_architecture(config, model, *options)).decode())
    )


def _measure_architecture(
    config: Any, model: ModelConfig, precision: str, checkpointing: bool, may_pack: bool, max_length: int
) -> Architecture:
    """Build the model on the meta device and run a few of its layers."""
    dtype = DTYPES[precision]
    policy = _policy_on_meta(config, model, dtype)
    packing = packing_of(policy, max_length)[0] if may_pack else "none"
    text, head = config.get_text_config(), policy.get_output_embeddings()
    shallow_run = _ShallowRun(config, model, dtype, checkpointing, packing, max_length)
    activations, beside = shallow_run.sizes(text.num_hidden_layers)
    parameters = list(policy.parameters())
    return Architecture(
        kind=config.model_type,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        linear=sum(p.numel() for p in _frozen_linear_weights(policy, head)),
        largest=max(p.numel() for p in parameters if p.requires_grad),
        tensors=tuple(p.numel() for p in parameters),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        head=head.weight.numel(),
        tied=head.weight is policy.get_input_embeddings().weight,
        packing=packing,
        activations=activations,
        beside=beside,
    )


def _policy_on_meta(config: Any, model: ModelConfig, dtype: torch.dtype) -> Any:
    """The model with its adapters on the meta device."""
    from transformers import AutoModelForCausalLM

    # its kernels are not needed here: it saves the same tensors as sdpa
    attention = "sdpa" if model.attention == "flash_attention_2" else model.attention
    try:
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation(attention),
                trust_remote_code=model.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        reason = one_line(error, 200)
        hint = "; use model.attention=auto" if "attention implementation" in reason else ""
        raise UserError(f"model.id: {model.id}: does not support model.attention {attention}{hint}: {reason}") from None
    if model.lora is None:
        return policy
    try:
        with peft_without_quantizer(), torch.device("meta"):
            from peft import get_peft_model

            adapted = get_peft_model(policy, lora_config(model.lora), autocast_adapter_dtype=False)
        return adapted.to(dtype)  # as DeepSpeed does; peft creates adapters on the meta device in fp32
    except ValueError as error:
        reason = one_line(error, 200)
        raise UserError(f"model.lora.target_modules: {model.lora.target_modules}: {reason}") from None


def _frozen_linear_weights(policy: Any, head: Any) -> Iterator[Tensor]:
    for module in policy.modules():
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
            yield module.weight


@dataclass(frozen=True, slots=True)
class _ShallowRun:
    """Runs copies of a few layers on fake tensors."""

    config: Any
    model: ModelConfig
    dtype: torch.dtype
    checkpointing: bool
    packing: Packing
    length: int

    def sizes(self, layers: int) -> tuple[LinearSize, LinearSize]:
        """Bytes that ``layers`` layers save for the backward, and what else is alive at the peak."""
        shallow, deep = min(SHALLOW, layers), min(DEEP, layers)
        tokens = (FEW_EXAMPLES * self.length, MANY_EXAMPLES * self.length)
        few, many = (self._live_bytes(shallow, examples) for examples in (FEW_EXAMPLES, MANY_EXAMPLES))
        more = self._live_bytes(deep, FEW_EXAMPLES) if deep > shallow else few
        each = (more[0] - few[0]) / max(1, deep - shallow) / tokens[0]
        beside = [peak - shallow * each * count for (_, peak), count in zip((few, many), tokens, strict=True)]
        return LinearSize(0, layers * each), LinearSize.through((tokens[0], beside[0]), (tokens[1], beside[1]))

    def _live_bytes(self, layers: int, examples: int) -> tuple[int, int]:
        """Live bytes after a forward, and at the peak of forward and backward; parameters and gradients excluded."""
        policy = _policy_on_meta(_with_layers(self.config, layers), self.model, self.dtype)
        if self.checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = collate([([0], [0] * (self.length - 1))] * examples, self.packing)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _replace_by_fakes(policy.train())
            measured = [_bytes_of_step(policy, inputs, coefficient_fn) for coefficient_fn in (None, _unit_coefficients)]
        return measured[0][0], max(peak for _, peak in measured)


def _bytes_of_step(policy: Any, inputs: ModelInputs, coefficient_fn: CoefficientFn | None) -> tuple[int, int]:
    """Live bytes as ``_ShallowRun._live_bytes``. The head gets its coefficients during the forward; after it if None.

    The head's buffer for logits is left out, because its size is bounded (raydiv.model.head.buffer_bytes).
    """
    head = LogProbHead(policy)
    rows, columns, targets = (torch.empty_like(tensor) for tensor in (inputs.rows, inputs.columns, inputs.targets))
    arguments = {name: _fake_like(value) for name, value in inputs.forward_kwargs().items()}
    head.set_targets(rows, columns, targets, coefficient_fn)
    with LiveBytes(policy.parameters()) as live:
        total = policy(**arguments).logits.sum()
        saved = live.now
        total.backward()
    head.remove()
    return saved - head.allocated_bytes, live.peak - head.allocated_bytes


def _unit_coefficients(_: slice, logps: Tensor) -> Tensor:
    return torch.ones_like(logps)


def _with_layers(config: Any, layers: int) -> Any:
    """A copy of the config with only the first ``layers`` layers."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _replace_by_fakes(policy: Any) -> None:
    """Replace meta tensors by fake CPU tensors, whose gradients are dropped as soon as they are accumulated."""
    fakes: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in fakes:
                fake = torch.empty_like(parameter, device="cpu")
                fakes[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            setattr(module, name, fakes[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    for parameter in fakes.values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]


def _fake_like(argument: Any) -> Any:
    """A fake of a plain tensor; a mask object without content is returned as it is."""
    return torch.empty_like(argument) if type(argument) is Tensor else argument


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
