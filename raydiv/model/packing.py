"""Packing: examples end to end in one row, without padding, and attention that does not cross their boundaries.

A model passes a mask of four dimensions to its attention unchanged. ``BlockDiagonalMask`` has that form, and replaces
attention over the whole row, quadratic in its length, by causal attention over each example: one kernel on GPUs in half
precision (torch's ``varlen_attn``), else example by example. Models call ``packed_attention`` through transformers'
registry of attention functions, or through ``scaled_dot_product_attention`` itself, as Falcon does. Rotary and learned
positions come from ``position_ids``, which restart with each example.

FlashAttention gets the boundaries as arguments of the model's forward, or finds them in ``position_ids``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from inspect import Parameter, signature
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from raydiv.utils.compat import attention_implementation, passes_windows_to_attention
from raydiv.utils.devices import to_device

Packing = Literal["none", "mask", "positions", "boundaries"]
"""Layout of a micro-batch: padded to the longest example; packed into one row under a BlockDiagonalMask; or packed
without a mask, where positions mark the boundaries, or positions and the arguments of FlashAttention.
"""

LARGEST_HEAD = 256
"""Elements of a head that FlashAttention's kernels support."""

_sdpa = torch.nn.functional.scaled_dot_product_attention


class BlockDiagonalMask(Tensor):
    """A mask [1, 1, total, total] without content: each example attends to itself alone. ``lengths`` sum to total."""

    lengths: list[int]
    _boundaries: Tensor | None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        _register_packed_attention()
        total = sum(lengths)
        mask: BlockDiagonalMask = torch.zeros(1).expand(1, 1, total, total).as_subclass(cls)
        mask.lengths, mask._boundaries = list(lengths), None
        return mask

    def boundaries(self, device: torch.device) -> Tensor:
        """Where the examples begin and end [n + 1], int32 on ``device``; made once for all layers."""
        if self._boundaries is None:
            self._boundaries = to_device(boundaries_of(self.lengths), device)
        return self._boundaries

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _sdpa:
            return _through_sdpa(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def boundaries_of(lengths: Sequence[int]) -> Tensor:
    """Where examples of these lengths begin and end in their row [n + 1], int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockDiagonalMask, window: int | None = None, **options: Any
) -> Tensor:
    """Causal attention over each example of a row, [1, heads, total, size].

    ``key`` and ``value`` may have fewer heads, which groups of the query's heads share. ``window``: the number of
    positions that a query sees, its own included. ``options`` are those of ``scaled_dot_product_attention``.
    """
    if query.is_cuda and _kernel_supports(query, value, options):
        return _one_kernel(query, key, value, mask, window, options.get("scale"))
    whole = (query, _repeated(key, query), _repeated(value, query))
    examples = (torch.split(tensor, mask.lengths, dim=2) for tensor in whole)
    slow = query.device.type == "cpu" and query.dtype != torch.float32 and query.requires_grad
    attend = _with_fp32_backward if slow and not options.get("dropout_p") else _one_example
    return torch.cat([attend(q, k, v, window, options) for q, k, v in zip(*examples, strict=True)], dim=2)


def _with_fp32_backward(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, Any]
) -> Tensor:
    """``_one_example`` on a CPU in half precision, where torch's backward of attention takes 2.7 times that of fp32
    (torch 2.13, a Xeon with avx512_bf16).
    """
    return _Fp32Backward.apply(query, key, value, window, options)  # type: ignore[no-any-return, no-untyped-call]


class _Fp32Backward(torch.autograd.Function):
    """Attention whose backward computes it again in fp32."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.window, ctx.options = window, options
        return _one_example(query, key, value, window, options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = inputs = [tensor.float().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = _one_example(query, key, value, ctx.window, ctx.options)
        found = torch.autograd.grad(output, inputs, grads[0].float())
        return *(grad.to(grads[0].dtype) for grad in found), None, None


def _one_example(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, Any]) -> Tensor:
    length = query.shape[2]
    if window is None or window >= length:
        return _sdpa(query, key, value, is_causal=True, **options)
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    return _sdpa(query, key, value, attn_mask=(distance >= 0) & (distance < window), **options)


def _one_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockDiagonalMask, window: int | None, scale: float | None
) -> Tensor:
    """All examples by FlashAttention for sequences of different lengths; shared heads are not repeated."""
    kernel = variable_length_kernel()
    assert kernel is not None
    shared = {"enable_gqa": True} if _shares_heads(kernel) else {}
    if not shared:
        key, value = _repeated(key, query), _repeated(value, query)
    boundaries, longest = mask.boundaries(query.device), max(mask.lengths)
    # FlashAttention counts the positions before a query's own
    before = -1 if window is None else window - 1
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: Tensor = kernel(
        *rows, boundaries, boundaries, longest, longest, scale=scale, window_size=(before, 0), **shared
    )
    return output.transpose(0, 1)[None]


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values with a head for each of the query's, which share them in groups."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


@cache
def variable_length_kernel() -> Callable[..., Any] | None:
    """Torch's ``varlen_attn``; None where this version of torch has none with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale"} <= signature(varlen_attn).parameters.keys() else None


@cache
def _shares_heads(kernel: Callable[..., Any]) -> bool:
    """Whether the kernel takes fewer heads of keys and values than of queries, as from torch 2.12 on."""
    return "enable_gqa" in signature(kernel).parameters


def _kernel_supports(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and not options.get("dropout_p")
        and variable_length_kernel() is not None
    )


def _through_sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: BlockDiagonalMask, is_causal: bool = False, **options: Any
) -> Tensor:
    """``scaled_dot_product_attention`` of a model that calls it itself."""
    options.pop("enable_gqa", None)
    return packed_attention(query, key, value, attn_mask, **options)


def _through_registry(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function of ``sdpa``, except under a BlockDiagonalMask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockDiagonalMask) or arguments.get("softcap") is not None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **arguments,
        )
    output = packed_attention(
        query,
        key,
        value,
        attention_mask,
        sliding_window,
        dropout_p=dropout,
        **({} if scaling is None else {"scale": scaling}),
    )
    return output.transpose(1, 2).contiguous(), None


@cache
def _register_packed_attention() -> None:
    """Let transformers' models with ``sdpa`` attention call ``packed_attention`` under a BlockDiagonalMask.

    The registry hands over heads of keys and values that are not repeated, and the window of each layer.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", _through_registry)


def packing_of(model: Any, max_length: int) -> tuple[Packing, str]:
    """The packing that a model supports for examples of up to ``max_length`` tokens, and the reason if none."""
    config, causal_model = model.config.get_text_config(), _unwrap(model)
    attention, parameters = attention_implementation(config), signature(causal_model.forward).parameters
    packing: Packing = "none"
    if attention == "sdpa":
        packing = "mask"
    elif re.search(r"flash[-_]att", attention):  # FlashAttention's own package, or its kernels from the hub
        keywords = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
        packing = "boundaries" if keywords else "positions"
    if packing == "none":
        return "none", f"{attention} attention does not support packed examples"
    if getattr(config, "alibi", False):
        return "none", "ALiBi positions do not restart with each example"
    if packing == "mask" and not passes_windows_to_attention(causal_model):
        window = getattr(config, "sliding_window", None)
        if window is not None and window < max_length:
            return "none", f"its attention window of {window} tokens is shorter than batch.max_length"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < max_length:
        return "none", f"it attends in chunks of {chunk} tokens, which are shorter than batch.max_length"
    if "position_ids" not in parameters:
        return "none", "its forward takes no position_ids"
    return packing, ""


def _unwrap(model: Any) -> Any:
    """The transformers model under peft's wrapper, whose forward lists its parameters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
