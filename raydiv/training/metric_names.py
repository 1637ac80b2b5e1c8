"""The metrics that training under a recipe logs, by name, before anything is trained."""

from __future__ import annotations

import torch

from raydiv.config import Recipe
from raydiv.losses import Batch
from raydiv.training.coefficients import evaluate_objective, first_states
from raydiv.training.metrics import MEANS, MFU, OF_A_STEP, state_metrics
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest


def step_metrics(recipe: Recipe) -> set[str]:
    """Numbers of every step: those of the objective, judged on two made-up pairs, and those of the step itself."""
    objective, states = _judged(recipe)
    means = {f"{name}/ema" for name in MEANS if name in objective}
    on_gpus = {MFU} if recipe.cluster.use_gpu else set()
    return {*objective, *means, *state_metrics(recipe.loss.terms, states), *OF_A_STEP, *on_gpus}


def held_out_metrics(recipe: Recipe) -> set[str]:
    """Numbers of an evaluation on ``data.eval``; none without it."""
    return set() if recipe.data.eval is None else {f"eval/{name}" for name in _judged(recipe)[0]}


def training_metrics(recipe: Recipe) -> set[str]:
    """Numbers that are had while a run still trains, but those of separation, which only a measurement tells."""
    return step_metrics(recipe) | (held_out_metrics(recipe) if recipe.evaluate.every is not None else set())


def require_measured(recipe: Recipe) -> None:
    """Raise UserError where ``checkpoint.best_metric`` or ``optim.early_stop.metric`` is measured at no time in training."""
    known = training_metrics(recipe)
    early, best = recipe.optim.early_stop, recipe.checkpoint.best_metric
    asked = {"checkpoint.best_metric": best, "optim.early_stop.metric": early.metric if early else None}
    for key, metric in asked.items():
        apart = recipe.separation.every is not None and str(metric).startswith("separation/")
        if metric is not None and metric not in known and not apart:
            raise UserError(
                f"{key}: {metric} is not measured during training{nearest(metric, known)}; eval/* needs data.eval and "
                "evaluate.every, separation/* needs separation.every"
            )


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
    verdict = evaluate_objective(recipe.loss.terms, first_states(recipe.loss.terms), batch)
    return verdict.metrics, [dict(state) for state in verdict.states]
