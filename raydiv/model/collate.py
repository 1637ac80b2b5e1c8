"""Collation: from token ids to the input tensors of one forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raydiv.model.chat import Ids
from raydiv.model.packing import BlockDiagonalMask, Packing, boundaries_of
from raydiv.utils.devices import to_device


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """A micro-batch of m examples and its t scored positions, in the order of the examples.

    ``ids``, ``mask`` and ``positions`` are the model's inputs: padded [m, length], or packed [1, total]. Position
    ``(rows[t], columns[t])`` of ``ids`` predicts token ``targets[t]`` of the response of example ``examples[t]``.
    ``boundaries`` [m + 1] and ``longest``, the tokens of the longest example, are arguments of FlashAttention.
    ``ends`` [m] are the scored positions before the end of each example, on the host. ``weights`` [t] is what each
    counts in its example's log-prob; None: 1. ``constraint`` [2, t] are betas and the reference's log-probs, where the
    log-ratio of each is bounded (TokenConstraint).
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    rows: Tensor
    columns: Tensor
    targets: Tensor
    examples: Tensor
    boundaries: Tensor | None = None
    longest: int = 0
    ends: Sequence[int] = ()
    weights: Tensor | None = None
    constraint: Tensor | None = None

    def to(self, device: torch.device) -> ModelInputs:
        tensors = {name: getattr(self, name) for name in self.__slots__}
        moved: dict[str, Any] = {
            name: to_device(tensor, device) for name, tensor in tensors.items() if type(tensor) is Tensor
        }
        return replace(self, **moved)

    def forward_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        tensors = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        kwargs: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        kwargs["use_cache"] = False
        if self.boundaries is not None:
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.boundaries)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), self.longest)
        return kwargs

    def terms(self, logps: Tensor, part: slice = slice(None)) -> Tensor:
        """What the scored positions, or a ``part`` of them, with token log-probs ``logps`` add to their examples'
        log-probs.
        """
        if self.constraint is not None:
            betas, reference = self.constraint[:, part]
            terms: Tensor = reference + (logsigmoid(betas * (logps - reference)) + math.log(2)) * (2 / betas)
            return terms
        return logps if self.weights is None else logps * self.weights[part]

    def slopes(self, logps: Tensor, part: slice = slice(None)) -> Tensor:
        """Derivatives of ``terms`` by ``logps``."""
        if self.constraint is not None:
            betas, reference = self.constraint[:, part]
            return 2 * torch.sigmoid(betas * (reference - logps))
        return torch.ones_like(logps) if self.weights is None else self.weights[part]

    def sum_per_example(self, logps: Tensor, examples: int) -> Tensor:
        """Sum the terms of token log-probs [t] to sequence log-probs [examples]."""
        return logps.new_zeros(examples).index_add(0, self.examples, self.terms(logps))


def collate(
    examples: Sequence[tuple[Ids, Ids]],
    packing: Packing = "none",
    weights: Sequence[np.ndarray] | None = None,
    constraint: Sequence[np.ndarray] | None = None,
) -> ModelInputs:
    """Inputs of (prompt ids, response ids) examples, padded on the right, or packed end to end.

    Padding is masked and never scored, so its token id does not matter. Without examples: a dummy of one position, for
    a rank without work, which must still join the collectives of the others. ``weights[i]`` [t_i] and
    ``constraint[i]`` [2, t_i] are those of response i's tokens.
    """
    if not examples:
        return _dummy()
    tokens = [np.concatenate([np.asarray(p, dtype=np.int64), np.asarray(r, dtype=np.int64)]) for p, r in examples]
    lengths = [len(ids) for ids in tokens]
    packed = packing != "none"
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.zeros(len(examples), dtype=np.int64)
    responses = [len(response) for _, response in examples]
    ids, mask, positions = _packed_row(tokens, packing) if packed else _padded_rows(tokens)
    columns = [
        np.arange(start + length - response - 1, start + length - 1)
        for start, length, response in zip(starts, lengths, responses, strict=True)
    ]
    indices = torch.from_numpy(np.repeat(np.arange(len(examples)), responses))
    targets = [ids[len(ids) - response :] for ids, response in zip(tokens, responses, strict=True)]
    return ModelInputs(
        ids,
        mask,
        positions,
        rows=torch.zeros_like(indices) if packed else indices,
        columns=torch.from_numpy(np.concatenate(columns)),
        targets=torch.from_numpy(np.concatenate(targets)),
        examples=indices,
        boundaries=boundaries_of(lengths) if packing == "boundaries" else None,
        longest=max(lengths),
        ends=np.cumsum(responses).tolist(),
        weights=None if weights is None else torch.from_numpy(np.concatenate(weights)),
        constraint=None if constraint is None else torch.from_numpy(np.concatenate(constraint, axis=1)),
    )


def _dummy() -> ModelInputs:
    ids, zero = torch.zeros((1, 1), dtype=torch.long), torch.zeros(1, dtype=torch.long)
    return ModelInputs(ids, torch.ones_like(ids), None, zero, zero, zero, zero)


def _padded_rows(tokens: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, None]:
    ids = torch.zeros((len(tokens), max(map(len, tokens))), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(tokens):
        ids[row, : len(example)] = torch.from_numpy(example)
        mask[row, : len(example)] = 1
    return ids, mask, None


def _packed_row(tokens: Sequence[np.ndarray], packing: Packing) -> tuple[Tensor, Tensor | None, Tensor]:
    lengths = [len(example) for example in tokens]
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    return (
        torch.from_numpy(np.concatenate(tokens))[None],
        BlockDiagonalMask.of(lengths) if packing == "mask" else None,
        positions[None],
    )
