"""Packing: examples end to end in one row, without padding, and attention that does not cross their boundaries.

A model passes a mask of four dimensions to ``scaled_dot_product_attention`` unchanged. ``BlockDiagonalMask`` has that
form, and replaces attention over the whole row, quadratic in its length, by causal attention over each example, on any
device. Rotary and learned positions come from ``position_ids``, which restart with each example. FlashAttention 2 finds
the boundaries from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from raydiv.utils.compat import attention_implementation

Packing = Literal["none", "mask", "positions"]
"""Layout of a micro-batch: padded to the longest example; packed into one row under a BlockDiagonalMask; or packed
without a mask, where positions mark the boundaries.
"""

PACKING_BY_ATTENTION: dict[str, Packing] = {"sdpa": "mask", "flash_attention_2": "positions"}
"""Packing by attention implementation."""

_sdpa = torch.nn.functional.scaled_dot_product_attention


class BlockDiagonalMask(Tensor):
    """A mask [1, 1, total, total] without content: each example attends to itself alone. ``lengths`` sum to total."""

    lengths: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        total = sum(lengths)
        mask: BlockDiagonalMask = torch.zeros(1).expand(1, 1, total, total).as_subclass(cls)
        mask.lengths = list(lengths)
        return mask

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _sdpa:
            return _block_diagonal_attention(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _block_diagonal_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: BlockDiagonalMask, is_causal: bool = False, **options: Any
) -> Tensor:
    """Causal attention over each example of a row; query, key and value are [1, heads, total, size]."""
    examples = (torch.split(tensor, attn_mask.lengths, dim=2) for tensor in (query, key, value))
    return torch.cat([_sdpa(q, k, v, is_causal=True, **options) for q, k, v in zip(*examples, strict=True)], dim=2)


def packing_of(model: Any, max_length: int) -> tuple[Packing, str]:
    """The packing that a model supports for examples of up to ``max_length`` tokens, and the reason if none."""
    config = model.config.get_text_config()
    attention, window = attention_implementation(config), getattr(config, "sliding_window", None)
    packing = PACKING_BY_ATTENTION.get(attention, "none")
    if packing == "none":
        return "none", f"{attention} attention does not support packed examples"
    if getattr(config, "alibi", False):
        return "none", "ALiBi positions do not restart with each example"
    if packing == "mask" and window is not None and window < max_length:
        return "none", f"its attention window of {window} tokens is shorter than batch.max_length"
    if "position_ids" not in signature(_unwrap(model).forward).parameters:
        return "none", "its forward takes no position_ids"
    return packing, ""


def _unwrap(model: Any) -> Any:
    """The transformers model under peft's wrapper, whose forward lists its parameters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
