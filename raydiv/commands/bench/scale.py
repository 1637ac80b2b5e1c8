"""``raydiv bench --part scale``: the work per step that every rank repeats, at more ranks than this machine has.

Each rank computes the layout of the whole step and evaluates the objective on all log-probs. Both are pure functions,
so they are timed on synthetic steps without a process per rank. The reported balance of the layout is the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from raydiv.config import Recipe
from raydiv.data.batching import BatchLayout
from raydiv.data.bundled.w1 import ANSWER_MEDIAN, ANSWER_SIGMA, MAX_ANSWER_WORDS, PROMPT_WORDS, REFUSAL_WORDS
from raydiv.losses import Batch, widest_scope
from raydiv.training.coefficients import evaluate_objective, initial_states

RANKS = (8, 64, 256, 1024)


def bench_scale(recipe: Recipe, repeats: int = 3) -> dict[str, Any]:
    """Time the layout and the objective of a step of compliance-refusal pairs at the RANKS, with the recipe's examples
    per rank.

    Returns for each number of ranks the ``examples`` of a step, the median ``deal_ms`` (layout) and ``judge_ms``
    (objective), the ``micro_batches`` of a rank, and ``balance``: tokens of the busiest rank, padding included, divided
    by the mean without padding.
    """
    each = max(2, recipe.batch.examples // recipe.cluster.num_workers // 2 * 2)
    return {str(ranks): _measure(recipe, ranks, ranks * each, repeats) for ranks in RANKS}


def _measure(recipe: Recipe, ranks: int, examples: int, repeats: int) -> dict[str, Any]:
    lengths, units = synthetic_step(examples, recipe.batch.max_length)
    tokens = recipe.batch.tokens_per_microbatch
    layout = BatchLayout(
        max(lengths) * examples if tokens == "auto" else tokens, ranks, widest_scope(recipe.loss.terms), packed=True
    )
    dealt, _ = layout.training(lengths, units)
    batch = _synthetic_batch(examples, units)
    states = initial_states(recipe.loss.terms)
    return {
        "examples": examples,
        "deal_ms": _milliseconds(lambda: layout.training(lengths, units), repeats),
        "judge_ms": _milliseconds(lambda: evaluate_objective(recipe.loss.terms, states, batch), repeats),
        "micro_batches": len(dealt[0]),
        "balance": layout.busiest(dealt, lengths) * ranks / sum(lengths),
    }


def synthetic_step(examples: int, longest: int) -> tuple[list[int], list[list[int]]]:
    """Tokens of each example of a step, distributed as in W1 (one token per word), and its answer-refusal pairs."""
    draw = np.random.default_rng(0)
    pairs = examples // 2
    prompts = draw.integers(PROMPT_WORDS[0], PROMPT_WORDS[1] + 1, pairs)
    refusals = draw.integers(REFUSAL_WORDS[0], REFUSAL_WORDS[1] + 1, pairs)
    answers = np.minimum(MAX_ANSWER_WORDS, np.rint(draw.lognormal(np.log(ANSWER_MEDIAN), ANSWER_SIGMA, pairs)))
    lengths = np.minimum(longest, np.concatenate([prompts + answers, prompts + refusals])).astype(int)
    return lengths.tolist(), np.stack([np.arange(pairs), pairs + np.arange(pairs)], axis=1).tolist()


def _synthetic_batch(examples: int, units: list[list[int]]) -> Batch:
    draw = torch.Generator().manual_seed(0)
    reference = -100.0 * torch.rand(examples, generator=draw)
    aligned = torch.arange(examples) < len(units)
    return Batch(
        logps=reference + torch.randn(examples, generator=draw),
        reference_logps=reference,
        aligned=aligned,
        tokens=torch.full((examples,), 100),
        pairs=torch.tensor(units),
        mismatched_log_ratios=torch.randn(examples, generator=draw),
    )


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken)


def scale_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_scale`` returns."""
    return ["ranks", "examples", "deal, ms", "judge, ms", "micro-batches", "busiest rank / mean"], [
        (
            ranks,
            f"{row['examples']:,}",
            f"{row['deal_ms']:.1f}",
            f"{row['judge_ms']:.1f}",
            str(row["micro_batches"]),
            f"{row['balance']:.3f}",
        )
        for ranks, row in report.items()
    ]
