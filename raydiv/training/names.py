"""The metrics that training under a recipe logs, by name, before anything is trained."""

from __future__ import annotations

import torch

from raydiv.config import Recipe
from raydiv.losses import Batch
from raydiv.training.coefficients import first_states, judge
from raydiv.training.metrics import MEANS, OF_A_STEP, state_metrics


def step_metrics(recipe: Recipe) -> set[str]:
    """Numbers of every step: those of the objective, judged on two made-up pairs, and those of the step itself."""
    objective, states = _judged(recipe)
    means = {f"{name}/ema" for name in MEANS if name in objective}
    return {*objective, *means, *state_metrics(recipe.loss.terms, states), *OF_A_STEP}


def held_out_metrics(recipe: Recipe) -> set[str]:
    """Numbers of an evaluation on ``data.eval``; none without it."""
    return set() if recipe.data.eval is None else {f"eval/{name}" for name in _judged(recipe)[0]}


def _judged(recipe: Recipe) -> tuple[dict[str, float], list[dict[str, float]]]:
    zeros = torch.zeros(4)
    batch = Batch(
        logps=zeros - 2,
        reference_logps=zeros - 2,
        aligned=torch.tensor([True, False, True, False]),
        tokens=torch.full((4,), 5),
        pairs=torch.tensor([[0, 1], [2, 3]]),
        mismatched_log_ratios=zeros,
    )
    verdict = judge(recipe.loss.terms, first_states(recipe.loss.terms), batch)
    return verdict.metrics, [dict(state) for state in verdict.states]
