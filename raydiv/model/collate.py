"""From token ids to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

Ids = Sequence[int] | np.ndarray
"""Token ids."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A padded micro-batch of m examples and its t scored positions.

    ``ids`` and ``mask`` [m, length]; position ``(rows[t], columns[t])`` predicts response token ``targets[t]``.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Inputs:
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})

    def per_example(self, logps: Tensor, examples: int) -> Tensor:
        """Sum token log-probs [t] to sequence log-probs [examples]."""
        return logps.new_zeros(examples).index_add(0, self.rows, logps)


def collate(examples: Sequence[tuple[Ids, Ids]]) -> Inputs:
    """Inputs of (prompt ids, response ids) examples, padded on the right.

    Padding is masked and never scored, so its token id does not matter. Without examples: a dummy of one
    position, for a rank that must take part in the others' collectives.
    """
    if not examples:
        one, nothing = torch.zeros((1, 1), dtype=torch.long), torch.zeros(1, dtype=torch.long)
        return Inputs(one, torch.ones_like(one), nothing, nothing, nothing)
    length = max(len(prompt) + len(response) for prompt, response in examples)
    ids = torch.zeros((len(examples), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    rows, columns, targets = [], [], []
    for row, (prompt, response) in enumerate(examples):
        tokens = np.concatenate([np.asarray(prompt, dtype=np.int64), np.asarray(response, dtype=np.int64)])
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = 1
        rows.append(np.full(len(response), row))
        columns.append(np.arange(len(prompt) - 1, len(tokens) - 1))
        targets.append(tokens[len(prompt) :])
    return Inputs(ids, mask, *(torch.from_numpy(np.concatenate(part)) for part in (rows, columns, targets)))
