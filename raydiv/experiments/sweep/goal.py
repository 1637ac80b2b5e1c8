"""The metrics that a goal names: found among those that the trials will report, before any of them starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raydiv.config import Recipe
from raydiv.training.metric_names import held_out_metrics, step_metrics, training_metrics
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest

AFTER_TRAINING = ("evaluate/kl", "evaluate/kl_per_token")
"""Measured of a trained model alone, where prompts are answered."""


def reported(recipe: Recipe, base: Iterable[str]) -> set[str]:
    """Every metric that a run of the recipe ends with; ``base`` are those that were measured of its model before training."""
    after = set(AFTER_TRAINING) if recipe.evaluate.prompts and recipe.evaluate.kl_prompts else set()
    won = {"evaluate/win_rate"} if recipe.evaluate.pairwise_judge else set()
    return step_metrics(recipe) | held_out_metrics(recipe) | set(base) | after | won


def during_training(recipe: Recipe, base: Iterable[str]) -> set[str]:
    """Of these, what is reported while a run still trains."""
    apart = {name for name in base if name.startswith("separation/")} if recipe.separation.every is not None else set()
    return training_metrics(recipe) | apart


def whole_names(recipe: Recipe, variants: Sequence[Recipe], base: Iterable[str]) -> dict[str, str]:
    """The whole name of each metric that the goal, or the scheduler, says: ``over_refusal`` is evaluate/over_refusal.

    Raises UserError for one that a variant does not report, with the names that there are.
    """
    sweep, base = recipe.sweep, list(base)
    assert sweep is not None
    common = set.intersection(*(reported(variant, base) for variant in variants))
    names = [*(one.metric for one in sweep.objectives), *(one.metric for one in sweep.constraints)]
    found = {name: _whole(f"sweep.goal: {name}", name, common) for name in names}
    if sweep.scheduler != "none":
        name = sweep.compared.metric
        early = set.intersection(*(during_training(variant, base) for variant in variants))
        found[name] = _whole(f"sweep.scheduler: {name}", name, early, " while they train", found.get(name))
    return found


def _whole(where: str, name: str, known: set[str], when: str = "", whole: str | None = None) -> str:
    name = whole or name
    if name in known:
        return name
    ends = sorted(one for one in known if one.endswith(f"/{name}"))
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{where}: may be {' or '.join(ends)}; say which")
    every = "; separation.every and evaluate.every make them report more" if when else ""
    raise UserError(f"{where}: no trial reports it{when} {nearest(name, known)}{every}")
