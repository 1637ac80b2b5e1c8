"""Examples end to end in one row, without padding, and attention that keeps them apart.

A model passes its attention mask to ``scaled_dot_product_attention`` as it is when the mask has four dimensions.
``BlockDiagonalMask`` is such a mask in form; in place of one attention over the whole row, quadratic in its length, it runs a causal one over each
example, on whatever device the row is. Rotary and learned positions come from ``position_ids``, which begin anew with each
example. FlashAttention 2 reads where examples begin from these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

Packing = Literal["none", "mask", "positions"]
"""How the examples of a micro-batch share its tensors: padded to the longest; packed into one row under an Apart mask; or
packed, with positions alone to tell where each begins.
"""

PACKINGS: dict[str, Packing] = {"sdpa": "mask", "flash_attention_2": "positions"}
"""By the attention that a model uses."""

_attention = torch.nn.functional.scaled_dot_product_attention


class BlockDiagonalMask(Tensor):
    """A mask [1, 1, total, total] without content: each of ``lengths`` (they sum to total) attends to itself alone."""

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
        if function is _attention:
            return _attend_apart(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _attend_apart(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: BlockDiagonalMask, is_causal: bool = False, **options: Any
) -> Tensor:
    """Causal attention over each example of a row; query, key and value [1, heads, total, size]."""
    pieces = (torch.split(tensor, attn_mask.lengths, dim=2) for tensor in (query, key, value))
    return torch.cat([_attention(q, k, v, is_causal=True, **options) for q, k, v in zip(*pieces, strict=True)], dim=2)


def packing_of(model: Any, longest: int) -> tuple[Packing, str]:
    """How a model takes examples of up to ``longest`` tokens, and why not packed where it is not."""
    config = model.config.get_text_config()
    packing, window = PACKINGS.get(config._attn_implementation, "none"), getattr(config, "sliding_window", None)
    if packing == "none":
        return "none", f"{config._attn_implementation} attention knows no boundaries within a row"
    if getattr(config, "alibi", False):
        return "none", "ALiBi positions are counted along the row"
    if packing == "mask" and window is not None and window < longest:
        return "none", f"its attention window of {window} tokens is shorter than batch.max_length"
    if "position_ids" not in signature(_causal_model(model).forward).parameters:
        return "none", "its forward takes no positions"
    return packing, ""


def _causal_model(model: Any) -> Any:
    """The transformers model under adapters, whose forward has a signature that says something."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
