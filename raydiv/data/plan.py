"""The data plan: which examples make which step, and which micro-batch of which rank each of them lands in.

Pure functions of small arrays: every rank computes the same plan without talking to another, step k is reached without
replaying what came before, and the objective does not see how its examples were laid out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The examples of one optimizer step: ``rows`` [n] of the prepared set, in example order."""

    step: int
    epoch: float
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Epochs:
    """The order of a data set: shuffled units (a pair, or a lone example) cut into steps.

    ``units`` lists the rows of each unit; ``examples`` is the size of the global batch. The last step of an epoch takes
    what is left, so an epoch loses and repeats nothing.
    """

    units: Sequence[Sequence[int]]
    examples: int
    seed: int
    fingerprint: str

    @property
    def steps_per_epoch(self) -> int:
        return len(self._boundaries()) - 1

    def step(self, step: int) -> StepPlan:
        """Plan of optimizer step ``step`` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        boundaries = self._boundaries()
        chosen = order[boundaries[within] : boundaries[within + 1]]
        rows = np.array([row for unit in chosen for row in self.units[unit]], dtype=np.int64)
        return StepPlan(step, (step + 1) / self.steps_per_epoch, rows)

    def _boundaries(self) -> np.ndarray:
        """Unit offsets of the steps. Units count by the largest, so that no step exceeds ``examples``."""
        size = max(1, self.examples // max(len(unit) for unit in self.units))
        return np.append(np.arange(0, len(self.units), size), len(self.units))

    def _order(self, epoch: int) -> np.ndarray:
        key = hashlib.sha256(f"{self.seed}/{epoch}/{self.fingerprint}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big"))).permutation(len(self.units))


MicroBatch = list[int]
"""Positions (in example order) of the examples that one forward takes together; empty: a dummy forward."""


Group = Sequence[int]
"""Positions of examples that must share a micro-batch."""


def micro_batches(
    lengths: Sequence[int], tokens: int, ranks: int, groups: Sequence[Group] | None = None
) -> list[list[MicroBatch]]:
    """Cut a step's examples into micro-batches and deal them to the ranks: ``result[rank][i]``.

    Longest first, similar lengths together, at most ``tokens`` padded tokens in one (a group longer than that gets one to
    itself). Every rank gets the same number of micro-batches, since ZeRO's collectives must match: what is missing is
    an empty one. ``lengths`` are tokens per example, prompt and response; ``groups`` (by default every example alone) cover
    each example once.
    """
    if groups is None:
        groups = [[position] for position in range(len(lengths))]
    longest_first = sorted(groups, key=lambda group: (-_longest(group, lengths), group[0]))
    batches = list(_within_budget(longest_first, lengths, tokens))
    if len(batches) % ranks > 0 or not batches:
        batches = _spread(longest_first, lengths, tokens, ranks)
    load, dealt = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list[MicroBatch]]]
    for batch in sorted(batches, key=lambda b: -_padded(b, lengths)):
        fewest = min(len(mine) for mine in dealt)
        rank = min((r for r in range(ranks) if len(dealt[r]) == fewest), key=lambda r: load[r])
        dealt[rank].append(batch)
        load[rank] += _padded(batch, lengths)
    most = max(1, max(len(mine) for mine in dealt))
    return [mine + [[] for _ in range(most - len(mine))] for mine in dealt]


def largest_micro_batch(dealt: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> int:
    """Tokens, padding included, of the largest of ``micro_batches``: what a forward's memory goes by."""
    return max(_padded(batch, lengths) for mine in dealt for batch in mine)


def tokens_of_busiest_rank(dealt: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> int:
    """Tokens, padding included, of the rank that has most of them: what a pass over ``micro_batches`` costs."""
    return max(sum(_padded(batch, lengths) for batch in mine) for mine in dealt)


def _within_budget(order: Sequence[Group], lengths: Sequence[int], tokens: int) -> Iterator[MicroBatch]:
    """Consecutive runs of ``order`` (longest first) of at most ``tokens`` padded tokens."""
    batch: MicroBatch = []
    longest = 0
    for group in order:
        if batch and (len(batch) + len(group)) * longest > tokens:
            yield batch
            batch = []
        longest = longest if batch else _longest(group, lengths)
        batch.extend(group)
    if batch:
        yield batch


def _spread(order: Sequence[Group], lengths: Sequence[int], tokens: int, ranks: int) -> list[MicroBatch]:
    """The smallest budget-respecting number of micro-batches that every rank can get equally many of.

    Shrinks the budget until the count is a multiple of ``ranks``, or every group stands alone.
    """
    fewest = len(list(_within_budget(order, lengths, tokens)))
    wanted = -(-max(fewest, 1) // ranks) * ranks
    best: list[MicroBatch] = [list(group) for group in order]
    low, high = 1, tokens
    while low <= high:
        middle = (low + high) // 2
        batches = list(_within_budget(order, lengths, middle))
        if len(batches) <= wanted:
            best, high = batches, middle - 1
        else:
            low = middle + 1
    return best


def _longest(group: Group, lengths: Sequence[int]) -> int:
    return max((lengths[position] for position in group), default=0)


def _padded(batch: MicroBatch, lengths: Sequence[int]) -> int:
    return len(batch) * _longest(batch, lengths)
