"""The schedule of a run as pure functions: the order of its data, its number of updates, the learning rate of each.

Loads no Ray, so that ``raydiv plan`` can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from raydiv.config import Recipe
from raydiv.config.recipe import OptimConfig
from raydiv.data.batching import EpochPlan
from raydiv.data.tokens import StoredExamples


def epoch_plan(recipe: Recipe, examples: StoredExamples) -> EpochPlan:
    """The order of the training set."""
    source, weights = examples.source[examples.units[:, 0]], [source.weight for source in recipe.data.train]
    return EpochPlan(examples.units, recipe.batch.examples, recipe.seed, examples.fingerprint, source, weights)


def total_steps(recipe: Recipe, steps_in: Callable[[float], int]) -> int:
    """Optimizer updates of the run; ``steps_in`` gives those of so many epochs."""
    if recipe.optim.steps is not None:
        return recipe.optim.steps
    assert recipe.optim.epochs is not None
    return steps_in(recipe.optim.epochs)


def learning_rate(optim: OptimConfig, update: int, updates: int) -> float:
    """Rate of ``update`` (from 0) of ``updates``.

    It rises linearly to ``optim.lr`` over ``optim.warmup`` updates. Then it stays, or falls to 0 at the end of the run,
    linearly or along half a cosine.
    """
    if update < optim.warmup:
        return optim.lr * (update + 1) / optim.warmup
    progress = (update - optim.warmup) / max(1, updates - optim.warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return optim.lr * factor[optim.schedule]


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens ``every`` so many steps happens after ``step`` of them."""
    return every is not None and step % every == 0
