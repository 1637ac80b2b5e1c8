"""The data plan: which examples make which step, and which micro-batch of which rank each of them lands in.

Pure functions of small arrays: every rank computes the same plan without talking to another, step k is reached without
replaying what came before, and the objective does not see how its examples were laid out.
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
    """The examples of one optimizer step: ``rows`` [n] of the set in example order, and ``pair`` [n], a number that the
    two examples of a pair share, -1 without.
    """

    step: int
    epoch: float
    rows: np.ndarray
    pair: np.ndarray

    @classmethod
    def of_units(cls, step: int, epoch: float, units: np.ndarray) -> StepPlan:
        """The step of ``units`` [u, 2]: a pair's rows, or a lone row and -1."""
        pair = np.where(units[:, 1:] >= 0, np.arange(len(units))[:, None], -1).repeat(2, axis=1).ravel()
        rows = units.ravel()
        return cls(step, epoch, rows[rows >= 0], pair[rows >= 0])


class BatchPlan(Protocol):
    """An order of examples, cut into steps."""

    def step(self, step: int) -> StepPlan: ...


class EpochPlan:
    """The order of a training set: its units (a pair, or a lone example), shuffled anew every epoch and cut into steps.

    ``units`` [u, 2] as in StoredExamples, ``source`` [u] the source of each, and ``weights`` the passes over each source in
    an epoch. ``examples`` is the size of the global batch. The last step of an epoch takes what is left, so at weight 1 an
    epoch loses and repeats nothing. A weight's fraction takes another part of its source every epoch, and all parts in turn.
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
        self._sources = [np.flatnonzero(source == number) for number in range(len(weights))]
        self._weights = list(weights)
        self._shuffled: tuple[int, np.ndarray] | None = None
        # units count by the largest, so that no step exceeds ``examples``
        self._size = max(1, examples // (2 if (units[:, 1] >= 0).any() else 1))

    @property
    def steps_per_epoch(self) -> int:
        taken = sum(int(weight) * len(own) + self._part(own, weight) for own, weight in self._mixed())
        return -(-taken // self._size)

    def step(self, step: int) -> StepPlan:
        """Plan of optimizer step ``step`` (from 0): a function of it alone, whatever was asked before."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[within * self._size : (within + 1) * self._size]
        return StepPlan.of_units(step, (step + 1) / self.steps_per_epoch, self.units[chosen])

    def _mixed(self) -> list[tuple[np.ndarray, float]]:
        return list(zip(self._sources, self._weights, strict=True))

    @staticmethod
    def _part(own: np.ndarray, weight: float) -> int:
        """Units that a weight's fraction takes, if only one."""
        part = weight - int(weight)
        return min(len(own), max(1, round(part * len(own)))) if part else 0

    def _order(self, epoch: int) -> np.ndarray:
        """Units of an epoch, shuffled; the last epoch asked for is remembered."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            taken = [self._taken(number, own, weight, epoch) for number, (own, weight) in enumerate(self._mixed())]
            self._shuffled = (epoch, self._random(epoch).permutation(np.concatenate(taken)))
        return self._shuffled[1]

    def _taken(self, number: int, own: np.ndarray, weight: float, epoch: int) -> np.ndarray:
        """The units that an epoch takes of a source: all of them as often as the weight is whole, and a part."""
        part = self._part(own, weight)
        whole = np.tile(own, int(weight))
        if not part:
            return whole
        turn = self._random(f"source {number}").permutation(own)
        return np.concatenate([whole, np.take(turn, np.arange(epoch * part, (epoch + 1) * part), mode="wrap")])

    def _random(self, purpose: object) -> np.random.Generator:
        key = hashlib.sha256(f"{self.seed}/{purpose}/{self.fingerprint}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))


class SequentialPlan:
    """A set once through, similar lengths together, in parts of ``examples``: for scoring, where the order is no matter."""

    def __init__(self, lengths: np.ndarray, examples: int) -> None:
        self.order, self._size = np.argsort(lengths, kind="stable"), examples

    @property
    def parts(self) -> int:
        return -(-len(self.order) // self._size)

    def step(self, step: int) -> StepPlan:
        rows = self.order[step * self._size : (step + 1) * self._size]
        return StepPlan(step, 0.0, rows, np.full(len(rows), -1))


MicroBatch = list[int]
"""Positions (in example order) of the examples that one forward takes together; empty: a dummy forward."""


Group = Sequence[int]
"""Positions of examples that must share a micro-batch."""


def micro_batches(
    lengths: Sequence[int],
    tokens: int,
    ranks: int,
    groups: Sequence[Group] | None = None,
    packed: bool = False,
) -> list[list[MicroBatch]]:
    """Cut a step's examples into micro-batches and deal them to the ranks: ``result[rank][i]``.

    At most ``tokens`` in one, padding included (a group longer than that gets one to itself): ``packed`` ones have none and are
    made equally long; padded ones hold similar lengths, longest first. Every rank gets the same number of micro-batches, since
    ZeRO's collectives must match: what is missing is an empty one. ``lengths`` are tokens per example, prompt and response;
    ``groups`` (by default every example alone) cover each example once.
    """
    if groups is None:
        groups = [[position] for position in range(len(lengths))]
    if packed:
        order = sorted(groups, key=lambda group: (-_total(group, lengths), group[0]))
        batches = _packed(order, lengths, tokens, ranks)
    else:
        order = sorted(groups, key=lambda group: (-_longest(group, lengths), group[0]))
        batches = list(_within_budget(order, lengths, tokens))
        if len(batches) % ranks > 0 or not batches:
            batches = _spread(order, lengths, tokens, ranks)
    size = _total if packed else _padded
    dealt: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    # whoever has fewest micro-batches is next, and among them who has fewest tokens
    turns = [(0, 0, rank) for rank in range(ranks)]
    for batch in sorted(batches, key=lambda b: -size(b, lengths)):
        count, load, rank = turns[0]
        dealt[rank].append(batch)
        heapq.heapreplace(turns, (count + 1, load + size(batch, lengths), rank))
    most = max(1, max(len(mine) for mine in dealt))
    return [mine + [[] for _ in range(most - len(mine))] for mine in dealt]


ONE_PASS, GRAPH_KEPT, TWO_PASSES = 3, 3.25, 4
"""What a token costs, in forwards: a backward costs two, and where a graph is kept the head makes its logits again."""


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """How steps are dealt to ranks. A pure function of lengths, so that a rank and whoever reads for it agree unasked.

    ``scope``: whose log-probs a coefficient depends on (see raydiv.losses.Scope).
    """

    tokens_per_microbatch: int
    ranks: int
    scope: Literal["example", "pair", "batch"]
    packed: bool = False

    def scoring(self, lengths: Sequence[int]) -> list[list[MicroBatch]]:
        """Micro-batches of examples that are only scored."""
        return self._dealt(lengths, None)

    def training(self, lengths: Sequence[int], units: Sequence[Group]) -> tuple[list[list[MicroBatch]], bool]:
        """Micro-batches of a step, and whether each is enough to tell its own coefficients.

        Pairs are kept together where they fit the token budget, and where what it saves (a second forward, or the head's
        second visit) makes up for padding and for ranks that are less equal.
        """
        free = self.scoring(lengths)
        if self.scope == "pair":
            paired = self._dealt(lengths, units)
            fits = self.largest(paired, lengths) <= self.tokens_per_microbatch
            apart = GRAPH_KEPT if len(free[0]) == 1 else TWO_PASSES
            if fits and ONE_PASS * self.busiest(paired, lengths) <= apart * self.busiest(free, lengths):
                return paired, True
        return free, self.scope == "example"

    def largest(self, dealt: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> int:
        """Tokens, padding included, of the largest micro-batch: what a forward's memory goes by."""
        return max(self._tokens(batch, lengths) for mine in dealt for batch in mine)

    def busiest(self, dealt: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> int:
        """Tokens, padding included, of the rank that has most of them: what a pass over the step costs."""
        return max(sum(self._tokens(batch, lengths) for batch in mine) for mine in dealt)

    def _dealt(self, lengths: Sequence[int], groups: Sequence[Group] | None) -> list[list[MicroBatch]]:
        return micro_batches(lengths, self.tokens_per_microbatch, self.ranks, groups, self.packed)

    def _tokens(self, batch: MicroBatch, lengths: Sequence[int]) -> int:
        return _total(batch, lengths) if self.packed else _padded(batch, lengths)


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


def _total(batch: Group, lengths: Sequence[int]) -> int:
    return sum(lengths[position] for position in batch)


def _packed(order: Sequence[Group], lengths: Sequence[int], tokens: int, ranks: int) -> list[MicroBatch]:
    """As few micro-batches of at most ``tokens`` as every rank can get equally many of, about equally long.

    Each group (longest first) goes to the shortest one. Empty ones are left out.
    """
    count = ranks * max(1, -(-sum(_total(group, lengths) for group in order) // (tokens * ranks)))
    while True:
        batches: list[MicroBatch] = [[] for _ in range(count)]
        shortest = [(0, number) for number in range(count)]
        for group in order:
            load, number = heapq.heappop(shortest)
            batches[number].extend(group)
            heapq.heappush(shortest, (load + _total(group, lengths), number))
        if count >= len(order) or all(_total(batch, lengths) <= tokens for batch in batches):
            return [batch for batch in batches if batch]
        count += ranks
