"""Training steps as test cases: objective, layout and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiv.config import Recipe, load_recipe
from raydiv.data.batching import BatchLayout, StepPlan
from raydiv.data.tokens import TokenizedExamples
from raydiv.model.packing import Packing
from raydiv.training.dataloader import RankShard
from raydiv.training.step import RankLayout, RankStep
from raydiv.utils import distributed as dist

LR = 0.5


@dataclass(frozen=True)
class Case:
    """A step: its objective, its layout, and the kind of its examples."""

    loss: dict[str, Any]
    tokens: int
    zero_stage: int = 3
    examples: str = "pairs"
    lora: bool = False
    dropout: float = 0.0
    persistent: int = 0
    packing: Packing = "none"
    position: dict[str, Any] = field(default_factory=lambda: {"kind": "flat"})
    engine: dict[str, Any] = field(default_factory=dict)

    def recipe(self, model: Path) -> Recipe:
        return load_recipe(
            {
                "model": {"id": str(model), **({"lora": {"r": 4, "dropout": self.dropout}} if self.lora else {})},
                "loss": {**self.loss, "position": self.position},
                "optim": {"steps": 1, "lr": LR, "clip": None},
                "batch": {"tokens_per_microbatch": self.tokens},
                "engine": {"zero_stage": self.zero_stage, **self.engine},
            }
        )


def make_step(
    number: int,
    examples: TokenizedExamples,
    mismatched: TokenizedExamples,
    reference_logps: torch.Tensor | None,
    mismatched_reference_logps: torch.Tensor | None,
) -> RankStep:
    """A step with all token ids, without a layout."""
    plan = StepPlan(number, 0.0, np.arange(len(examples)), examples.pair)
    layout = RankLayout([], False, [], [])
    return RankStep(plan, examples, mismatched, reference_logps, mismatched_reference_logps, layout)


def with_token_weights(step: RankStep) -> RankStep:
    """``step`` with weights of the tokens of aligned examples, those of a reward model, and of 1 for the others."""
    generator, examples = np.random.default_rng(3), step.examples
    weights = [
        np.exp(generator.normal(0, 1, length)).astype(np.float32) if good else np.ones(length, np.float32)
        for length, good in zip(examples.response_lengths.tolist(), examples.aligned.tolist(), strict=True)
    ]
    ones = [np.ones(length, np.float32) for length in step.mismatched.response_lengths.tolist()]

    def of(examples: TokenizedExamples, values: list[np.ndarray]) -> TokenizedExamples:
        rows = range(len(examples))
        with_values = examples.with_ids(rows, [examples[row] for row in rows], values)
        return replace(with_values, weight_sums=np.array([row.sum() for row in values], np.float32))

    return replace(step, examples=of(examples, weights), mismatched=of(step.mismatched, ones))


def with_reference_tokens(step: RankStep) -> RankStep:
    """``step`` with the reference's log-prob of each example split over its tokens, later ones more improbable."""

    def split(examples: TokenizedExamples, logps: torch.Tensor) -> TokenizedExamples:
        parts = [np.arange(1, length + 1) for length in examples.response_lengths.tolist()]
        tokens = [
            (logp * part / part.sum()).astype(np.float32) for logp, part in zip(logps.tolist(), parts, strict=True)
        ]
        rows = range(len(examples))
        return examples.with_ids(rows, [examples[row] for row in rows], tokens)

    assert step.reference_logps is not None
    return replace(
        step,
        examples=split(step.examples, step.reference_logps),
        mismatched=split(step.mismatched, step.mismatched_reference_logps),
    )


def on_this_rank(step: RankStep, layout: BatchLayout) -> RankStep:
    """``step`` with this rank's micro-batches."""
    shard = RankShard(layout, dist.rank(), trains=True, scores=step.reference_logps is None)
    return replace(step, layout=shard.layout_of(step.examples, step.mismatched))


def step_examples(kind: str, with_mismatched: bool = False) -> RankStep:
    """A step of ``kind``, without a layout.

    Aligned responses are long and unaligned ones short, so that sorting by length leaves ranks with one class.
    """
    generator = np.random.default_rng(7)

    def ids(length: int) -> list[int]:
        return [int(token) for token in generator.integers(6, 300, length)]

    prompts = [ids(n) for n in (3, 9, 5, 7, 4)]
    pairs = [(prompt, ids(18 + 3 * n), ids(2 + n)) for n, prompt in enumerate(prompts)]
    rows = [
        (prompt, response, good, n)
        for n, (prompt, *both) in enumerate(pairs)
        for response, good in zip(both, (True, False), strict=True)
    ]
    if kind == "aligned only":
        rows = [row for row in rows if row[2]]
    if kind == "unaligned only":
        rows = [row for row in rows if not row[2]]
    if kind == "one":
        rows = rows[:1]
    if kind == "even pairs":
        rows = [(prompt, response[:4], good, n) for prompt, response, good, n in rows]
    examples = TokenizedExamples.from_ids(
        [(p, r) for p, r, _, _ in rows], [g for _, _, g, _ in rows], [n for *_, n in rows]
    )
    derangement = mismatched(rows) if with_mismatched else TokenizedExamples.from_ids([], [], [])
    noise = lambda n: torch.tensor(generator.normal(-60, 20, n), dtype=torch.float32)  # noqa: E731
    # far enough below the policy for kto's z0, the mean mismatched log-ratio, to be above 0
    return make_step(0, examples, derangement, noise(len(examples)), noise(len(derangement)) - 80)


def mismatched(rows: Sequence[tuple[list[int], list[int], bool, int]]) -> TokenizedExamples:
    """Each row's prompt with the response of a row of the next prompt, where there is one."""
    donors = [*rows[2:], *rows[:2]]
    ids = [(prompt, response) for (prompt, *_), (_, response, *_) in zip(rows, donors, strict=True)]
    return TokenizedExamples.from_ids(ids, [False] * len(rows), [-1] * len(rows))
