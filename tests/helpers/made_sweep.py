"""The record of a sweep made by hand, for whatever reads sweeps."""

from __future__ import annotations

from typing import Any

import numpy as np

D_B, OVER_REFUSAL = "separation/d_b", "evaluate/over_refusal"

SPACE: dict[str, Any] = {
    "loss.beta": "loguniform(0.01, 1)",
    "optim.steps": "randint(40, 400)",
    "loss.divergence": ["kl", "jensen-shannon", "alpha"],
    "loss.alpha": {"in": "uniform(0.2, 0.8)", "when": {"loss.divergence": "alpha"}},
    "loss.mix.sft.weight": [0, 0.5, 1.0],
    "model.lora": [None, True],
}


def make_sweep(count: int = 24, **changed: Any) -> dict[str, Any]:
    """A search of ``count`` finished trials, with one that was stopped and one that failed; ``changed`` are other entries."""
    generator = np.random.default_rng(0)
    *made, stopped, failed = (_trial(number, generator) for number in range(1, count + 3))
    unmeasured = {"metrics": {}, "feasible": None}
    trials = [
        *made,
        stopped | unmeasured | {"status": "stopped", "steps": 16, "seconds": 20.4},
        failed | unmeasured | {"status": "failed", "error": "the loss is not finite at update 7\nTraceback"},
    ]
    record = {
        "name": "beta",
        "goal": f"maximize {D_B} subject to {OVER_REFUSAL} <= 0.1",
        "objectives": [{"metric": D_B, "direction": "maximize"}],
        "constraints": [{"metric": OVER_REFUSAL, "relation": "<=", "bound": 0.1}],
        "space": SPACE,
        "search": "tpe",
        "scheduler": "asha",
        "best": [],
        "trials": trials,
        "mlflow": {"uri": "file:mlruns", "run_id": "0a1b2c"},
        "recipe": "name: beta\nloss:\n  type: fdo\n",
        "versions": {"raydiv": "1.0", "ray": "2.40"},
        "seconds": 5024.5,
    }
    feasible = [trial for trial in trials if trial["status"] == "finished" and trial["feasible"]]
    if feasible:
        record["best"] = [max(feasible, key=lambda trial: trial["metrics"][D_B])["number"]]
    return record | changed


def trial(number: int, values: dict[str, Any], metrics: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A finished trial that keeps all bounds, but for what is ``changed``."""
    return {
        "number": number,
        "values": values,
        "status": "finished",
        "metrics": metrics,
        "feasible": True,
        "error": None,
        "seconds": 61.2,
        "steps": 48,
        "run": f"trials/{number:03}",
        "kept": True,
    } | changed


def unfinished(number: int, status: str, **changed: Any) -> dict[str, Any]:
    return trial(number, {}, {}, status=status, feasible=None) | changed


def _trial(number: int, generator: np.random.Generator) -> dict[str, Any]:
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
    refused = float(np.clip(0.18 * strength + generator.normal(0, 0.04), 0, 1))
    metrics = {
        D_B: float(0.3 + 0.8 * strength + generator.normal(0, 0.05)),
        OVER_REFUSAL: refused,
        "separation/d_b_length_matched": float(0.2 + 0.7 * strength),
        "evaluate/asr": float(np.clip(0.9 - 0.8 * strength, 0, 1)),
        "divergence/name": "KL(D+ || D-)",
    }
    return trial(number, values, metrics, feasible=refused <= 0.1, seconds=60 + number)
