"""Sizes of a model from its config alone: parameters, and what a forward and a backward of it keep in memory.

Parameters are counted on the meta device. Activations are not guessed from formulas: a copy of two and of four layers runs the
project's own collate, attention and head on fake tensors, which have sizes and no memory, and what is alive is counted; the
difference of both is two layers' worth.
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
from raydiv.model.load import DTYPES, implementation, lora_config
from raydiv.model.packing import Packing, packing_of
from raydiv.model.resolve import model_directory, require_base, unloadable
from raydiv.utils.cache import cache_dir, cached_text, code_digest, digest
from raydiv.utils.compat import peft_without_quantizer
from raydiv.utils.errors import UserError

SHIPPED = FOLDER / "architectures"
"""Configs of models that are planned for without a hub; README.md beside them says where they are from."""

SHALLOW, DEEP = 2, 4
"""Layers of the copies that run, where there are as many; even numbers, since some models alternate two kinds of layers."""

FEW, MANY = 2, 6
"""Examples of their micro-batches."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes as a function of the tokens of a micro-batch."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> int:
        return max(0, round(self.fixed + self.per_token * tokens))

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> Line:
        """The line through two (tokens, bytes)."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        return cls(few[1] - slope * few[0], slope)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What memory goes by, in elements but for ``activations`` and ``beside``.

    ``trainable`` of ``parameters`` are trained; ``linear`` are frozen ones in linear layers other than the head, which 4 bits
    can hold; ``largest`` is the largest trainable parameter, ``tensors`` [p] are the sizes of all. ``head`` is the output
    projection, which shares the embedding's weight where ``tied``. ``activations`` are bytes that the layers keep for the
    backward; ``beside``, what is alive beside them at the peak: embedding, final norm and head (without the buffer that it has
    for logits), and what a backward makes.
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
    activations: Line
    beside: Line

    @property
    def frozen(self) -> int:
        return self.parameters - self.trainable

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: all but those of an input embedding that is not the head too."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def up_to(self, elements: int) -> int:
        """Elements in parameters that are no larger than ``elements``."""
        return sum(size for size in self.tensors if size <= elements)


_ARCHITECTURE = TypeAdapter(Architecture)


def at_hand(model: ModelConfig) -> Path | None:
    """The model's directory where it is on this machine (weights or not), without asking a hub."""
    from huggingface_hub import try_to_load_from_cache

    if model.id.startswith("bundled:"):
        return model_directory(model.id)
    path = Path(model.id).expanduser()
    if path.exists():
        require_base(model.id, path)
        return path
    try:
        cached = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
    except ValueError:  # no id that a hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def config_of(model: ModelConfig) -> Any:
    """The model's config: from its directory or the hub's cache, else of the shipped ones, else from the hub.

    Raises UserError where there is none.
    """
    from transformers import AutoConfig

    directory, shipped = at_hand(model), _shipped().get(model.id.lower())
    try:
        if directory is not None or shipped is None:
            return AutoConfig.from_pretrained(
                str(directory or model.id),
                revision=None if directory else model.revision,
                trust_remote_code=model.trust_remote_code,
            )
        fields = json.loads(shipped.read_text())
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        known = ", ".join(sorted(path.stem.replace("--", "/") for path in SHIPPED.glob("*.json")))
        raise unloadable(
            model.id,
            error,
            f"no config of it to be had ({reason}); without a hub a local directory with its config.json does, or one of "
            f"{known}",
        ) from None


def _shipped() -> dict[str, Path]:
    """Shipped configs by hub id, in lower case; a model's instruct versions have the same sizes."""
    found = {path.stem.replace("--", "/").lower(): path for path in SHIPPED.glob("*.json")}
    return {f"{name}{ending}": path for name, path in found.items() for ending in ("", "-instruct", "-it", "-chat")}


def architecture_of(recipe: Recipe) -> Architecture:
    """Sizes of the recipe's model, as the recipe trains it.

    Raises UserError for a model without a config, or one that cannot be made as the recipe wants it.
    """
    model, batch, engine = recipe.model, recipe.batch, recipe.engine
    return _measured(
        model.model_dump_json(include={"id", "revision", "lora", "attention", "trust_remote_code"}),
        engine.precision,
        engine.activation_checkpointing,
        batch.packing != "never",
        batch.max_length,
    )


@cache
def _measured(section: str, precision: str, checkpointing: bool, may_pack: bool, max_length: int) -> Architecture:
    """``architecture_of``, of what it depends on; kept on disk, since a run should not wait for it twice."""
    model = ModelConfig.model_validate_json(section)
    config = config_of(model)
    options = (precision, checkpointing, may_pack, max_length)
    if model.trust_remote_code:  # code that may be another tomorrow
        return _tried(config, model, *options)
    note = cache_dir("architectures") / digest(
        config.to_dict(), section, options, code_digest("model", "commands/plan")
    )
    return _ARCHITECTURE.validate_json(
        cached_text(note, lambda: _ARCHITECTURE.dump_json(_tried(config, model, *options)).decode())
    )


def _tried(
    config: Any, model: ModelConfig, precision: str, checkpointing: bool, may_pack: bool, max_length: int
) -> Architecture:
    """Make the model on the meta device, and run a few of its layers."""
    dtype = DTYPES[precision]
    whole = _on_meta(config, model, dtype)
    packing = packing_of(whole, max_length)[0] if may_pack else "none"
    text, head = config.get_text_config(), whole.get_output_embeddings()
    trial = _Trial(config, model, dtype, checkpointing, packing, max_length)
    activations, beside = trial.lines(text.num_hidden_layers)
    parameters = list(whole.parameters())
    return Architecture(
        kind=config.model_type,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        linear=sum(p.numel() for p in _frozen_linear(whole, head)),
        largest=max(p.numel() for p in parameters if p.requires_grad),
        tensors=tuple(p.numel() for p in parameters),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        head=head.weight.numel(),
        tied=head.weight is whole.get_input_embeddings().weight,
        packing=packing,
        activations=activations,
        beside=beside,
    )


def _on_meta(config: Any, model: ModelConfig, dtype: torch.dtype) -> Any:
    """The model with its adapters, without memory."""
    from transformers import AutoModelForCausalLM

    # its kernels are not needed to count what it keeps, which is what sdpa keeps
    attention = "sdpa" if model.attention == "flash_attention_2" else model.attention
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=implementation(attention),
                trust_remote_code=model.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "; model.attention=auto takes what it has" if "attention implementation" in reason else ""
        raise UserError(
            f"model.id: {model.id}: cannot be made with model.attention {attention}{hint}: {reason}"
        ) from None
    if model.lora is None:
        return whole
    try:
        with peft_without_quantizer(), torch.device("meta"):
            from peft import get_peft_model

            adapted = get_peft_model(whole, lora_config(model.lora), autocast_adapter_dtype=False)
        return adapted.to(dtype)  # as DeepSpeed does; peft leaves new adapters on the meta device in fp32
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.lora.target_modules: {model.lora.target_modules}: {reason}") from None


def _frozen_linear(whole: Any, head: Any) -> Iterator[Tensor]:
    for module in whole.modules():
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
            yield module.weight


@dataclass(frozen=True, slots=True)
class _Trial:
    """Runs copies of a few layers on fake tensors."""

    config: Any
    model: ModelConfig
    dtype: torch.dtype
    checkpointing: bool
    packing: Packing
    length: int

    def lines(self, layers: int) -> tuple[Line, Line]:
        """Bytes that ``layers`` layers keep for the backward, and what is alive beside them at the peak."""
        shallow, deep = min(SHALLOW, layers), min(DEEP, layers)
        tokens = (FEW * self.length, MANY * self.length)
        few, many = (self._run(shallow, examples) for examples in (FEW, MANY))
        more = self._run(deep, FEW) if deep > shallow else few
        each = (more[0] - few[0]) / max(1, deep - shallow) / tokens[0]
        beside = [peak - shallow * each * count for (_, peak), count in zip((few, many), tokens, strict=True)]
        return Line(0, layers * each), Line.through((tokens[0], beside[0]), (tokens[1], beside[1]))

    def _run(self, layers: int, examples: int) -> tuple[int, int]:
        """Bytes alive after a forward, and at the peak of forward and backward, without parameters and their gradients."""
        policy = _on_meta(_shallow(self.config, layers), self.model, self.dtype)
        if self.checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = collate([([0], [0] * (self.length - 1))] * examples, self.packing)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _fake_parameters(policy.train())
            found = [_alive(policy, inputs, weigh) for weigh in (None, _ones)]
        return found[0][0], max(peak for _, peak in found)


def _alive(policy: Any, inputs: ModelInputs, weigh: CoefficientFn | None) -> tuple[int, int]:
    """``_Trial._run``, of a head that is told the coefficients on the way (``weigh``) or after the forward.

    Without what it holds for logits, which has an end (see raydiv.model.head.buffer_bytes).
    """
    head = LogProbHead(policy)
    rows, columns, targets = (torch.empty_like(tensor) for tensor in (inputs.rows, inputs.columns, inputs.targets))
    arguments = {name: _fake_like(value) for name, value in inputs.arguments().items()}
    head.set_targets(rows, columns, targets, weigh)
    with LiveBytes(policy.parameters()) as live:
        total = policy(**arguments).logits.sum()
        kept = live.now
        total.backward()
    head.remove()
    return kept - head.held_bytes, live.peak - head.held_bytes


def _ones(_: slice, logps: Tensor) -> Tensor:
    return torch.ones_like(logps)


def _shallow(config: Any, layers: int) -> Any:
    """A copy of the config with the first layers alone."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _fake_parameters(policy: Any) -> None:
    """Put fake tensors, as of a CPU, in the place of the meta ones; gradients vanish as soon as they are there."""
    made: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                fake = torch.empty_like(parameter, device="cpu")
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    for parameter in made.values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]


def _fake_like(argument: Any) -> Any:
    """A plain tensor's fake; a mask without content stays what it is."""
    return torch.empty_like(argument) if type(argument) is Tensor else argument


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
