"""The order of a training set, and how many updates the run takes of it; loads no Ray, so that a plan can be made without."""

from __future__ import annotations

from raydiv.config import Recipe
from raydiv.data.batching import EpochPlan
from raydiv.data.tokens import StoredExamples


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer updates of the run."""
    if recipe.optim.steps is not None:
        return recipe.optim.steps
    assert recipe.optim.epochs is not None
    return max(1, round(recipe.optim.epochs * steps_per_epoch))


def epochs_of(recipe: Recipe, examples: StoredExamples) -> EpochPlan:
    """The order of the training set."""
    source, weights = examples.source[examples.units[:, 0]], [source.weight for source in recipe.data.train]
    return EpochPlan(examples.units, recipe.batch.examples, recipe.seed, examples.fingerprint, source, weights)
