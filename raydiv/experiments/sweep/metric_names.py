"""Full names of the metrics in a sweep's objectives and constraints, found before the first trial starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raydiv.config import Recipe
from raydiv.training.metric_names import held_out_metrics, step_metrics, training_metrics
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest

AFTER_TRAINING = ("evaluate/kl", "evaluate/kl_per_token", "evaluate/depth/half")
"""Metrics of trained models alone, where prompts are answered."""


def run_metrics(recipe: Recipe, base: Iterable[str]) -> set[str]:
    """Every metric of a finished run of the recipe; ``base`` are the metrics of its model before training."""
    after = set(AFTER_TRAINING) if recipe.evaluate.prompts and recipe.evaluate.kl_prompts else set()
    win_rate = {"evaluate/win_rate"} if recipe.evaluate.pairwise_judge else set()
    return step_metrics(recipe) | held_out_metrics(recipe) | set(base) | after | win_rate


def metrics_during_training(recipe: Recipe, base: Iterable[str]) -> set[str]:
    """The metrics that a run of the recipe reports while it trains."""
    measured = recipe.separation.every is not None
    return training_metrics(recipe) | {name for name in base if measured and name.startswith("separation/")}


def full_metric_names(recipe: Recipe, variants: Sequence[Recipe], base: Iterable[str]) -> dict[str, str]:
    """The full name of each metric in the section ``sweep``: ``over_refusal`` is evaluate/over_refusal.

    ``variants`` are recipes of trials. Raises UserError for a metric that one of them does not report.
    """
    sweep, base = recipe.sweep, list(base)
    assert sweep is not None
    available = set.intersection(*(run_metrics(variant, base) for variant in variants))
    objectives = {objective.metric: "objectives" for objective in sweep.objectives}
    constraints = {constraint.metric: "constraints" for constraint in sweep.constraints}
    full_names = {
        metric: _full_name(f"sweep.{key}: {metric}", metric, available)
        for metric, key in (constraints | objectives).items()
    }
    if sweep.scheduler != "none":
        metric = sweep.asha_objective.metric
        key = "objectives" if sweep.stop_on is None else "stop_on"
        available = set.intersection(*(metrics_during_training(variant, base) for variant in variants))
        name = full_names.get(metric, metric)
        full_names[metric] = _full_name(f"sweep.{key}: {metric}", name, available, during_training=True)
    return full_names


def _full_name(where: str, metric: str, available: set[str], *, during_training: bool = False) -> str:
    if metric in available:
        return metric
    matches = sorted(name for name in available if name.endswith(f"/{metric}"))
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{where}: ambiguous: {' or '.join(matches)}")
    hint = nearest(metric, available)
    if during_training:
        hint = f" during training, which scheduler: asha needs{hint}; separation.every and evaluate.every add metrics"
    raise UserError(f"{where}: no trial reports it{hint}")
