"""What reaches a rank: the steps of a set in the order of their plan, with the token ids that this rank forwards.

Ray Data tasks read ahead of the rank. A step is found by its number alone, so a stream begins at any step as fast as at the
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from raydiv.data.batching import BatchLayout, BatchPlan, StepPlan
from raydiv.data.tokens import StoredExamples, TokenizedExamples
from raydiv.runtime.actor_pool import Stream
from raydiv.training.step import StepExamples

AHEAD = 4
"""Steps that are read before they are asked for."""

WINDOW = 256
"""Steps that one task reads, one after another."""

RankStep = tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]
"""Positions in a step, and the token ids of the examples there."""


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples with the reference log-probs of each, and KTO's mismatched ones row by row, where the loss wants them."""

    examples: StoredExamples
    reference_logps: np.ndarray | None
    mismatched: StoredExamples | None = None
    mismatched_reference_logps: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class RankShard:
    """One rank's part of every step: ``scores`` when it also scores the step without training on it (adapters off)."""

    layout: BatchLayout
    rank: int
    trains: bool
    scores: bool

    def positions(self, examples: TokenizedExamples) -> list[int]:
        """Positions of the examples that the rank forwards."""
        layouts = [self.layout.training(examples.lengths, examples.units)[0]] if self.trains else []
        layouts += [self.layout.scoring(examples.lengths)] if self.scores else []
        return sorted({position for dealt in layouts for batch in dealt[self.rank] for position in batch})


@dataclass(frozen=True, slots=True)
class StepLoader:
    """The steps of a set, as one rank needs them."""

    examples: ExampleSet
    plan: BatchPlan
    share: RankShard

    def read(self, step: int) -> tuple[RankStep, RankStep]:
        """Token ids of step ``step`` that this rank forwards: of its examples, and of the mismatched ones."""
        plan = self.plan.step(step)
        own, others = self._without_ids(plan)
        scoring = RankShard(self.share.layout, self.share.rank, trains=False, scores=True)
        return _rank_step(self.examples.examples, plan, own, self.share), _rank_step(
            self.examples.mismatched, plan, others, scoring
        )

    def step(self, plan: StepPlan, held: tuple[RankStep, RankStep]) -> StepExamples:
        """The examples of a step, with the ids that ``read`` found."""
        own, others = self._without_ids(plan)
        reference, mismatched_reference = self.examples.reference_logps, self.examples.mismatched_reference_logps
        unused = torch.zeros(len(others))
        return StepExamples(
            plan.step,
            own.holding(*held[0]),
            others.holding(*held[1]),
            None if reference is None else torch.from_numpy(reference[plan.rows]),
            unused if mismatched_reference is None else torch.from_numpy(mismatched_reference[plan.rows]),
        )

    def _without_ids(self, plan: StepPlan) -> tuple[TokenizedExamples, TokenizedExamples]:
        own = self.examples.examples.without_ids(plan.rows, plan.pair)
        if self.examples.mismatched is None:
            return own, TokenizedExamples.from_ids([], [], [])
        return own, self.examples.mismatched.without_ids(plan.rows, np.full(len(plan.rows), -1))


def _rank_step(
    stored: StoredExamples | None, plan: StepPlan, examples: TokenizedExamples, share: RankShard
) -> RankStep:
    positions = share.positions(examples)
    return positions, stored.ids(plan.rows[positions]) if stored is not None and positions else []


def parts(feed: StepLoader, count: int) -> Iterator[StepExamples]:
    """The first ``count`` steps, each read when it is asked for: for evaluation, which no step waits for."""
    for number in range(count):
        yield feed.step(feed.plan.step(number), feed.read(number))


def stream_steps(
    feed: StepLoader, again: Callable[[], StepLoader], start: int, stop: int
) -> Iterator[tuple[StepPlan, StepExamples]]:
    """Steps ``start`` to ``stop``, read ahead by Ray Data tasks; ``again`` makes the same feed where these run.

    The first few are read here: tasks take seconds to start, and do so meanwhile.
    """
    streamed = min(start + AHEAD, stop)
    makers = [partial(_read_steps, again, first, min(first + WINDOW, stop)) for first in range(streamed, stop, WINDOW)]
    with closing(Stream(makers, AHEAD)) as stream:
        rows = iter(stream)
        for number in range(start, stop):
            plan = feed.plan.step(number)
            yield plan, feed.step(plan, feed.read(number) if number < streamed else next(rows))


def _read_steps(again: Callable[[], StepLoader], start: int, stop: int) -> Iterator[tuple[RankStep, RankStep]]:
    feed = again()
    for step in range(start, stop):
        yield feed.read(step)
