"""The order of data: the examples of each step, and their micro-batches on each rank.

All are pure functions of small arrays: every rank computes the same result without communication, step k is computed
without the steps before it, and the objective does not depend on the layout of its examples.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The examples of one optimizer step: ``rows`` [n] of the set, in example order.

    ``pair`` [n] is a number that the two examples of a pair share, or -1 for no pair.
    """

    step: int
    epoch: float
    rows: np.ndarray
    pair: np.ndarray

    @classmethod
    def from_units(cls, step: int, epoch: float, units: np.ndarray) -> StepPlan:
        """The step of ``units`` [u, 2] (see StoredExamples.units)."""
        pair = np.where(units[:, 1:] >= 0, np.arange(len(units))[:, None], -1).repeat(2, axis=1).ravel()
        rows = units.ravel()
        return cls(step, epoch, rows[rows >= 0], pair[rows >= 0])


class BatchPlan(Protocol):
    """An order of examples, divided into steps."""

    def step(self, step: int) -> StepPlan: ...


class EpochPlan:
    """The order of a training set: units (pairs and single examples), shuffled every epoch and divided into steps.

    ``units`` [u, 2] as in StoredExamples, ``source`` [u] the source of each, and ``weights`` the passes over each
    source in an epoch. ``examples`` is the size of the global batch. The last step of an epoch takes the remainder, so
    an epoch at weight 1 omits and repeats nothing. A fractional weight takes another part of its source every epoch,
    all parts in turn: after e epochs, weight * e * (units of the source) of them, to the nearest integer. So epochs may
    differ by a unit of each source.
    """

    def __init__(
        self,
        units: np.ndarray,
        examples: int,
        seed: int,
        fingerprint: str,
        source: np.ndarray | None = None,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.units, self.examples, self.seed, self.fingerprint = units, examples, seed, fingerprint
        source = np.zeros(len(units), np.int16) if source is None else source
        self._sources = [(np.flatnonzero(source == number), weight) for number, weight in enumerate(weights)]
        self._order: tuple[int, np.ndarray] | None = None
        # every unit counts as the largest one, so that no step exceeds ``examples``
        self._units_per_step = max(1, examples // (2 if (units[:, 1] >= 0).any() else 1))
        self._starts = self._starts_of_epochs(1)

    def steps_in(self, epochs: float) -> int:
        """The steps of so many epochs, at least 1."""
        whole = int(epochs)
        starts = self._starts_of_epochs(whole + 1)
        return max(1, round(int(starts[whole]) + (epochs - whole) * int(starts[whole + 1] - starts[whole])))

    def step(self, step: int) -> StepPlan:
        """The plan of optimizer step ``step`` (from 0): a function of ``step`` alone."""
        while self._starts[-1] <= step:
            self._starts = self._starts_of_epochs(2 * len(self._starts))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        start, stop = self._starts[epoch : epoch + 2].tolist()
        first = (step - start) * self._units_per_step
        units = self._epoch_order(epoch)[first : first + self._units_per_step]
        return StepPlan.from_units(step, epoch + (step + 1 - start) / (stop - start), self.units[units])

    def rows_until(self, steps: int) -> np.ndarray:
        """The distinct rows of the first ``steps`` steps, in ascending order."""
        taken, epoch = np.zeros(len(self.units), bool), 0
        starts = self._starts_of_epochs(1)
        while starts[epoch] < steps and not taken.all():
            starts = self._starts_of_epochs(epoch + 1)
            taken[self._epoch_order(epoch)[: (steps - int(starts[epoch])) * self._units_per_step]] = True
            epoch += 1
        rows = self.units[taken]
        return np.sort(rows[rows >= 0])

    def _starts_of_epochs(self, epochs: int) -> np.ndarray:
        """The first step of each epoch [epochs + 1]; the last is the number of all steps. An epoch may have none."""
        units = sum(_taken(len(members) * weight, np.arange(epochs + 1)) for members, weight in self._sources)
        return np.cumsum([0, *-(-np.diff(units) // self._units_per_step)])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The units of an epoch, shuffled; the last epoch is cached."""
        if self._order is None or self._order[0] != epoch:
            units = [self._drawn(number, *source, epoch) for number, source in enumerate(self._sources)]
            self._order = (epoch, self._generator(epoch).permutation(np.concatenate(units)))
        return self._order[1]

    def _drawn(self, number: int, members: np.ndarray, weight: float, epoch: int) -> np.ndarray:
        """The units that an epoch takes of a source: all of them ``int(weight)`` times, and a part."""
        repeated = np.tile(members, int(weight))
        start, stop = _taken(len(members) * (weight - int(weight)), np.array([epoch, epoch + 1])).tolist()
        if start == stop:
            return repeated
        shuffled = self._generator(f"source {number}").permutation(members)
        return np.concatenate([repeated, np.take(shuffled, np.arange(start, stop), mode="wrap")])

    def _generator(self, purpose: object) -> np.random.Generator:
        key = hashlib.sha256(f"{self.seed}/{purpose}/{self.fingerprint}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))


def _taken(units: float, epochs: np.ndarray) -> np.ndarray:
    """Units that are taken in the first ``epochs`` [e], of a source that gives ``units`` an epoch on average."""
    # 1.1 - 1 is a little more than 0.1: halves are rounded down
    return np.ceil(np.round(units * epochs, 6) - 0.5).astype(np.int64)


class SequentialPlan:
    """One pass over a set, similar lengths together, ``examples`` a step: for scoring, where order does not matter."""

    def __init__(self, lengths: np.ndarray, examples: int) -> None:
        self.order, self._size = np.argsort(lengths, kind="stable"), examples

    @property
    def steps(self) -> int:
        """The number of steps."""
        return -(-len(self.order) // self._size)

    def step(self, step: int) -> StepPlan:
        rows = self.order[step * self._size : (step + 1) * self._size]
        return StepPlan(step, 0.0, rows, np.full(len(rows), -1))


MicroBatch = list[int]
"""Positions (in example order) of the examples of one forward; empty: a dummy forward."""

Group = Sequence[int]
"""Positions of examples that must share a micro-batch."""


def micro_batches(
    lengths: Sequence[int],
    tokens: int,
    ranks: int,
    groups: Sequence[Group] | None = None,
    packed: bool = False,
) -> list[list[MicroBatch]]:
    """Divide a step's examples into micro-batches and assign them to ranks: ``result[rank][i]``.

    A micro-batch has at most ``tokens`` tokens, padding included; a group that is longer gets one to itself. ``packed``
    micro-batches have no padding and similar sizes; padded ones hold examples of similar length, longest first. All
    ranks get the same number of micro-batches, since ZeRO's collectives must match; the shortfall is empty ones.
    ``lengths`` are tokens per example, prompt and response; ``groups`` (by default one per example) contain each
    example once.
    """
    if groups is None:
        groups = [[position] for position in range(len(lengths))]
    if packed:
        order = sorted(groups, key=lambda group: (-_tokens(group, lengths), group[0]))
        batches = _packed_batches(order, lengths, tokens, ranks)
    else:
        order = sorted(groups, key=lambda group: (-_longest(group, lengths), group[0]))
        batches = list(_padded_batches(order, lengths, tokens))
        if len(batches) % ranks > 0 or not batches:
            batches = _equal_count_batches(order, lengths, tokens, ranks)
    size = _tokens if packed else _padded_tokens
    assigned: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    # the next micro-batch goes to the rank with the fewest micro-batches, and among those with the fewest tokens
    queue = [(0, 0, rank) for rank in range(ranks)]
    for batch in sorted(batches, key=lambda b: -size(b, lengths)):
        count, load, rank = queue[0]
        assigned[rank].append(batch)
        heapq.heapreplace(queue, (count + 1, load + size(batch, lengths), rank))
    most = max(1, max(len(rank_batches) for rank_batches in assigned))
    return [rank_batches + [[] for _ in range(most - len(rank_batches))] for rank_batches in assigned]


STREAMED, GRAPH_KEPT, TWO_PASSES = 3, 3.25, 4
"""Cost of a token in forwards. A backward costs two; with a kept graph, the head recomputes its logits (0.25)."""


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The micro-batches of steps on all ranks: pure functions of lengths, so that a rank and its data loader agree.

    ``scope``: the examples on whose log-probs a coefficient depends (see raydiv.losses.Scope).
    """

    tokens_per_microbatch: int
    ranks: int
    scope: Literal["example", "pair", "batch"]
    packed: bool = False

    def scoring(self, lengths: Sequence[int]) -> list[list[MicroBatch]]:
        """Micro-batches of examples that are only scored."""
        return self._micro_batches(lengths, None)

    def training(self, lengths: Sequence[int], units: Sequence[Group]) -> tuple[list[list[MicroBatch]], bool]:
        """Micro-batches of a step, and whether the coefficients of each depend on that micro-batch alone (streamed).

        Under scope "pair", pairs are kept together if they fit the token budget, and if the saving (a second forward,
        or the head's second visit) outweighs more padding and less equal ranks.
        """
        free = self.scoring(lengths)
        if self.scope == "pair":
            paired = self._micro_batches(lengths, units)
            fits = self.largest(paired, lengths) <= self.tokens_per_microbatch
            free_cost = GRAPH_KEPT if len(free[0]) == 1 else TWO_PASSES
            if fits and STREAMED * self.busiest(paired, lengths) <= free_cost * self.busiest(free, lengths):
                return paired, True
        return free, self.scope == "example"

    def largest(self, batches: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> int:
        """Tokens of the largest micro-batch, padding included: determines the memory of a forward."""
        return max(self._size(batch, lengths) for rank_batches in batches for batch in rank_batches)

    def busiest(self, batches: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> int:
        """Tokens of the rank with the most, padding included: determines the time of a pass over the step."""
        return max(sum(self._size(batch, lengths) for batch in rank_batches) for rank_batches in batches)

    def _micro_batches(self, lengths: Sequence[int], groups: Sequence[Group] | None) -> list[list[MicroBatch]]:
        return micro_batches(lengths, self.tokens_per_microbatch, self.ranks, groups, self.packed)

    def _size(self, batch: MicroBatch, lengths: Sequence[int]) -> int:
        return _tokens(batch, lengths) if self.packed else _padded_tokens(batch, lengths)


def _padded_batches(order: Sequence[Group], lengths: Sequence[int], tokens: int) -> Iterator[MicroBatch]:
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


def _equal_count_batches(order: Sequence[Group], lengths: Sequence[int], tokens: int, ranks: int) -> list[MicroBatch]:
    """Micro-batches within the budget, in the smallest number that is a multiple of ``ranks``.

    Reduces the budget until the number is reached, or every group is a micro-batch of its own.
    """
    fewest = len(list(_padded_batches(order, lengths, tokens)))
    target = -(-max(fewest, 1) // ranks) * ranks
    best: list[MicroBatch] = [list(group) for group in order]
    low, high = 1, tokens
    while low <= high:
        middle = (low + high) // 2
        batches = list(_padded_batches(order, lengths, middle))
        if len(batches) <= target:
            best, high = batches, middle - 1
        else:
            low = middle + 1
    return best


def _longest(group: Group, lengths: Sequence[int]) -> int:
    return max((lengths[position] for position in group), default=0)


def _padded_tokens(batch: MicroBatch, lengths: Sequence[int]) -> int:
    return len(batch) * _longest(batch, lengths)


def _tokens(batch: Group, lengths: Sequence[int]) -> int:
    return sum(lengths[position] for position in batch)


def _packed_batches(order: Sequence[Group], lengths: Sequence[int], tokens: int, ranks: int) -> list[MicroBatch]:
    """Micro-batches of at most ``tokens`` and similar sizes, in the smallest number that is a multiple of ``ranks``.

    Each group (longest first) goes to the shortest micro-batch so far. Empty ones are left out.
    """
    count = ranks * max(1, -(-sum(_tokens(group, lengths) for group in order) // (tokens * ranks)))
    while True:
        batches: list[MicroBatch] = [[] for _ in range(count)]
        shortest = [(0, number) for number in range(count)]
        for group in order:
            load, number = heapq.heappop(shortest)
            batches[number].extend(group)
            heapq.heappush(shortest, (load + _tokens(group, lengths), number))
        if count >= len(order) or all(_tokens(batch, lengths) <= tokens for batch in batches):
            return [batch for batch in batches if batch]
        count += ranks
