"""Names of the metrics that training under a recipe logs, before anything is trained."""

from __future__ import annotations

import torch

from raydiv.config import Recipe
from raydiv.losses import Batch
from raydiv.training.coefficients import LossOutput, evaluate_objective, initial_states
from raydiv.training.metrics import AVERAGED, MFU, RESERVED, STEP_COSTS, state_metrics
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest


def step_metrics(recipe: Recipe) -> set[str]:
    """Numeric metrics of every step: those of the loss, evaluated on two made-up pairs, and the costs of the step."""
    output = _evaluate_example(recipe)
    means = {f"{name}/ema" for name in AVERAGED if name in output.metrics}
    on_gpus = {MFU, RESERVED} if recipe.cluster.use_gpu else set()
    return {*output.metrics, *means, *state_metrics(recipe.loss.terms, output.states), *STEP_COSTS, *on_gpus}


def held_out_metrics(recipe: Recipe) -> set[str]:
    """Metrics of an evaluation on ``data.eval``, and on each of its sources; empty without it."""
    if recipe.data.eval is None:
        return set()
    names = _evaluate_example(recipe).metrics
    prefixes = ["eval", *(f"eval/{source}" for source in recipe.data.held_out_names)]
    return {f"{prefix}/{name}" for prefix in prefixes for name in names}


def training_metrics(recipe: Recipe) -> set[str]:
    """Metrics that a run logs while it trains, without those of separation, whose names only a measurement gives."""
    return step_metrics(recipe) | (held_out_metrics(recipe) if recipe.evaluate.every is not None else set())


def require_measured(recipe: Recipe) -> None:
    """Raise UserError where training never measures ``checkpoint.best_metric`` or ``optim.early_stop.metric``."""
    known = training_metrics(recipe)
    early, best = recipe.optim.early_stop, recipe.checkpoint.best_metric
    by_key = {"checkpoint.best_metric": best, "optim.early_stop.metric": early.metric if early else None}
    for key, metric in by_key.items():
        is_separation = recipe.separation.every is not None and str(metric).startswith("separation/")
        if metric is not None and metric not in known and not is_separation:
            if metric == "eval/depth/half":
                raise UserError(
                    f"{key}: {metric} has no value while the held-out margin is not positive: choose another"
                )
            raise UserError(
                f"{key}: {metric} is not measured while this recipe trains{nearest(metric, known)}; eval/* needs "
                "data.eval and evaluate.every, separation/* needs separation.every"
            )


def _evaluate_example(recipe: Recipe) -> LossOutput:
    zeros = torch.zeros(4)
    batch = Batch(
        logps=zeros - 2,
        reference_logps=zeros - 2,
        aligned=torch.tensor([True, False, True, False]),
        tokens=torch.full((4,), 5),
        pairs=torch.tensor([[0, 1], [2, 3]]),
        mismatched_log_ratios=zeros,
    )
    return evaluate_objective(recipe.loss.terms, initial_states(recipe.loss.terms), batch)
