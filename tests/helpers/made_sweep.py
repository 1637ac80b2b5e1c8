"""Hand-made records of sweeps, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config.sweep import SearchParameter, SweepConfig, SweepConstraint, SweepObjective
from raydiv.experiments.sweep.record import SweepDirectory, SweepRecord, TrialRecord

D_B, OVER_REFUSAL = "separation/d_b", "evaluate/over_refusal"

SPACE: dict[str, Any] = {
    "loss.beta": "loguniform(0.01, 1)",
    "optim.steps": "randint(40, 400)",
    "loss.divergence": ["kl", "jensen-shannon", "alpha"],
    "loss.alpha": {"in": "uniform(0.2, 0.8)", "when": {"loss.divergence": "alpha"}},
    "loss.mix.sft.weight": [0, 0.5, 1.0],
    "model.lora": [None, True],
}


def maximize(metric: str) -> SweepObjective:
    return SweepObjective(metric=metric, direction="maximize")


def minimize(metric: str) -> SweepObjective:
    return SweepObjective(metric=metric, direction="minimize")


def at_most(metric: str, bound: float) -> SweepConstraint:
    return SweepConstraint(metric=metric, max=bound)


def at_least(metric: str, bound: float) -> SweepConstraint:
    return SweepConstraint(metric=metric, min=bound)


def parameters_of(space: dict[str, Any]) -> list[SearchParameter]:
    return SweepConfig(space=space, objectives=[maximize("y")], trials=1).parameters


def make_sweep(count: int = 24, *, space: dict[str, Any] = SPACE, **changed: Any) -> SweepRecord:
    """A search of ``count`` finished trials, a stopped and a failed one; ``changed`` are other fields."""
    generator = np.random.default_rng(0)
    trials = [_random_trial(number, generator) for number in range(1, count + 3)]
    *_, stopped, failed = trials
    stopped.status, stopped.steps, stopped.seconds = "stopped", 16, 20.4
    failed.status, failed.error = "failed", "the loss is not finite at update 7\nTraceback"
    for trial in (stopped, failed):
        trial.metrics, trial.feasible = {}, False
    fields = {
        "directory": SweepDirectory(Path("beta")),
        "name": "beta",
        "goal": f"maximize {D_B} subject to {OVER_REFUSAL} <= 0.1",
        "objectives": [maximize(D_B)],
        "constraints": [at_most(OVER_REFUSAL, 0.1)],
        "parameters": parameters_of(space),
        "search": "tpe",
        "scheduler": "asha",
        "trials": trials,
        "mlflow": {"uri": "file:mlruns", "run_id": "0a1b2c"},
        "recipe": "name: beta\nloss:\n  type: fdo\n",
        "versions": {"raydiv": "1.0", "ray": "2.40"},
        "seconds": 5024.5,
    } | changed
    fields["trials"] = {trial.number: trial for trial in fields["trials"]}
    return SweepRecord(**fields)


def finished_trial(number: int, values: dict[str, Any], metrics: dict[str, Any], **changed: Any) -> TrialRecord:
    """A finished feasible trial; ``changed`` are other fields."""
    fields = {"status": "finished", "feasible": True, "seconds": 61.2, "steps": 48, "kept": True} | changed
    return TrialRecord(number, values, metrics=metrics, **fields)


def unfinished_trial(number: int, status: str, **changed: Any) -> TrialRecord:
    fields = {"values": {}, "metrics": {}, "feasible": False} | changed
    return finished_trial(number, status=status, **fields)


def _random_trial(number: int, generator: np.random.Generator) -> TrialRecord:
    divergence = ["kl", "jensen-shannon", "alpha"][number % 3]
    values = {
        "loss.beta": float(10 ** generator.uniform(-2, 0)),
        "optim.steps": int(generator.integers(40, 400)),
        "loss.divergence": divergence,
        "loss.mix.sft.weight": [0, 0.5, 1.0][int(generator.integers(3))],
        "model.lora": [None, True][int(generator.integers(2))],
    }
    if divergence == "alpha":
        values["loss.alpha"] = float(generator.uniform(0.2, 0.8))
    strength = 1 - abs(np.log10(values["loss.beta"]) + 1) / 1.2
    over_refusal = float(np.clip(0.18 * strength + generator.normal(0, 0.04), 0, 1))
    metrics = {
        D_B: float(0.3 + 0.8 * strength + generator.normal(0, 0.05)),
        OVER_REFUSAL: over_refusal,
        "separation/d_b_length_matched": float(0.2 + 0.7 * strength),
        "evaluate/asr": float(np.clip(0.9 - 0.8 * strength, 0, 1)),
    }
    return finished_trial(number, values, metrics, feasible=over_refusal <= 0.1, seconds=60 + number)
