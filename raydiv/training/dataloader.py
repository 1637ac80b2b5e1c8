"""The steps of a set in the order of their plan, each with the token ids that one rank forwards.

Ray Data tasks read ahead of the rank. A step is a function of its number alone, so a stream starts at any step as fast
as at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from raydiv.data.batching import BatchLayout, BatchPlan, MicroBatch
from raydiv.data.tokens import StoredExamples, TokenizedExamples, TokenValues
from raydiv.runtime.actor_pool import PrefetchedStream
from raydiv.training.step import RankLayout, RankStep

AHEAD = 4
"""Steps that are read before they are requested."""

SHORT_RUN = 100
"""Steps of a run that are all read in this process: tasks take longer to start than such a run waits for its data."""

WINDOW = 256
"""Consecutive steps that one task reads."""


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples with the reference log-prob of each, and what ``loss.position`` takes of their response tokens (see
    TokenizedExamples); for KTO also the mismatched ones, which correspond row by row.
    """

    examples: StoredExamples
    reference_logps: np.ndarray | None
    mismatched: StoredExamples | None = None
    mismatched_reference_logps: np.ndarray | None = None
    token_values: TokenValues | None = None
    mismatched_token_values: TokenValues | None = None


@dataclass(frozen=True, slots=True)
class RankShard:
    """Which micro-batches of every step one rank forwards.

    ``trains``: with gradient; ``scores``: without, as in evaluation, or to score the reference with the adapters off.
    """

    layout: BatchLayout
    rank: int
    trains: bool
    scores: bool

    def layout_of(self, examples: TokenizedExamples, mismatched: TokenizedExamples) -> RankLayout:
        """The rank's micro-batches of a step, for which the examples' token ids are not needed."""
        training: list[MicroBatch] = []
        streams = False
        if self.trains:
            by_rank, streams = self.layout.training(examples.lengths, examples.units)
            training = by_rank[self.rank]
        scoring = self.layout.scoring(examples.lengths)[self.rank] if self.scores else []
        return RankLayout(training, streams, scoring, self.layout.scoring(mismatched.lengths)[self.rank])


@dataclass(frozen=True, slots=True)
class StepLoader:
    """Reads the steps of a set for one rank."""

    examples: ExampleSet
    plan: BatchPlan
    shard: RankShard

    def read(self, number: int) -> RankStep:
        """Step ``number``, with the token ids of the examples that the rank forwards."""
        plan, data = self.plan.step(number), self.examples
        examples = data.examples.without_ids(plan.rows, plan.pair)
        if data.token_values is not None:
            examples = replace(examples, weight_sums=data.token_values.sums(plan.rows))
        mismatched = TokenizedExamples.from_ids([], [], [])
        if data.mismatched is not None:
            mismatched = data.mismatched.without_ids(plan.rows, np.full(len(plan.rows), -1))
        layout = self.shard.layout_of(examples, mismatched)
        return RankStep(
            plan,
            _with_ids(examples, data.examples, data.token_values, plan.rows, layout.positions),
            _with_ids(
                mismatched,
                data.mismatched,
                data.mismatched_token_values,
                plan.rows,
                layout.mismatched_positions,
            ),
            None if data.reference_logps is None else torch.from_numpy(data.reference_logps[plan.rows]),
            torch.zeros(len(mismatched))
            if data.mismatched_reference_logps is None
            else torch.from_numpy(data.mismatched_reference_logps[plan.rows]),
            layout,
        )


def _with_ids(
    examples: TokenizedExamples,
    stored: StoredExamples | None,
    token_values: TokenValues | None,
    rows: np.ndarray,
    positions: list[int],
) -> TokenizedExamples:
    """``examples``, those at ``positions`` with their token ids and the values of their tokens."""
    if stored is None or not positions:
        return examples
    values = [] if token_values is None else token_values.at(rows[positions])
    return examples.with_ids(positions, stored.ids(rows[positions]), values)


def read_steps(loader: StepLoader, start: int, stop: int) -> Iterator[RankStep]:
    """Steps ``start`` to ``stop``, each read when it is requested."""
    for number in range(start, stop):
        yield loader.read(number)


def stream_steps(
    loader: StepLoader, make_loader: Callable[[], StepLoader], start: int, stop: int
) -> Iterator[RankStep]:
    """Steps ``start`` to ``stop``, read ahead by Ray Data tasks; ``make_loader`` makes the same loader in a task.

    The first few are read in this process: tasks take seconds to start, and do so meanwhile. So are all steps of a
    short run.
    """
    streamed = stop if stop - start <= SHORT_RUN else start + AHEAD
    windows = [(first, min(first + WINDOW, stop)) for first in range(streamed, stop, WINDOW)]
    makers = [partial(_read_window, make_loader, *window) for window in windows]
    with closing(PrefetchedStream(makers, AHEAD)) as stream:
        steps = iter(stream)
        for number in range(start, stop):
            yield loader.read(number) if number < streamed else next(steps)


def _read_window(make_loader: Callable[[], StepLoader], start: int, stop: int) -> Iterator[RankStep]:
    return read_steps(make_loader(), start, stop)
