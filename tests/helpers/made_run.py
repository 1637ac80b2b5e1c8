"""A run directory made by hand, with numbers like those of a real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config import load_recipe, save_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import last_values
from raydiv.utils.storage import write_json

UPDATES = 72
NAME = "KL(D+ || 0.5 D+ + 0.5 D-)"
COUNTS = {"examples": 1442, "aligned": 721, "unaligned": 721, "pairs": 721, "prompts_cut": 3, "responses_cut": 0}


def make_run(path: Path, *overrides: str, measured: bool = True, name: str = "made") -> RunDirectory:
    """A finished run of kldo and sft; without ``measured`` it has the training steps alone."""
    run = RunDirectory(path / name)
    run.path.mkdir()
    ends = ["data.eval=0.05", "evaluate.every=12", "evaluate.prompts=bundled:heldout"]
    without = ["separation.prompts=null"]
    save_recipe(load_recipe(_recipe(name), [*(ends if measured else without), *overrides]), run.recipe)
    generator = np.random.default_rng(0)
    if measured:
        _measure(run, "before", 0.0, generator)
        run.metrics.append(_held_out(0))
    for step in range(1, UPDATES + 1):
        run.metrics.append(_step(step, generator))
        if measured and step % 12 == 0:
            run.metrics.append(_held_out(step))
    if measured:
        rewards = {"aligned": generator.normal(-0.6, 0.5, 36), "unaligned": generator.normal(-2.8, 0.9, 36)}
        write_json(run.rewards, {name: values.tolist() for name, values in rewards.items()})
        _measure(run, "after", 1.0, generator)
    run.result.write_text(json.dumps(_result(name, measured, run)))
    return run


def _recipe(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"id": "bundled:smollm2-135m-instruct", "lora": {"r": 16}},
        "data": {"train": "bundled:compliance-refusal"},
        "loss": {"type": "kldo", "beta": 0.05, "skew": 0.5, "mix": {"sft": {"weight": 1.0}}},
        "optim": {"lr": 1e-3, "steps": UPDATES, "warmup": 6},
        "cluster": {"num_workers": 2},
    }


def _rewards(step: float) -> dict[str, float]:
    progress = 1 - np.exp(-step / 25)
    return {"reward/aligned": -0.6 * progress, "reward/unaligned": -2.9 * progress, "reward/margin": 2.3 * progress}


def _step(step: int, generator: np.random.Generator) -> dict[str, Any]:
    noise = generator.normal(0, 0.12, 3)
    rewards = {name: value + 1.5 * drift for (name, value), drift in zip(_rewards(step).items(), noise, strict=True)}
    progress = 1 - np.exp(-step / 20)
    return {
        "step": step,
        "loss": 4.0 - 1.9 * progress + noise[0],
        "divergence": 0.46 * progress + 0.5 * noise[1],
        "divergence/ema": 0.46 * progress,
        "divergence/name": NAME,
        "divergence/ceiling": float(np.log(2)),
        "log_ratio/rms": 24 * progress + 10 * abs(noise[2]),
        **rewards,
        "reward/margin/ema": _rewards(step)["reward/margin"],
        "grad_norm": 1.2 + 2 * np.exp(-step / 10) + abs(noise[0]),
    }


def _held_out(step: int) -> dict[str, float]:
    progress = 1 - np.exp(-step / 20)
    metrics = {
        "loss": 4.05 - 1.7 * progress,
        "divergence": 0.43 * progress,
        "log_ratio/rms": 23 * progress,
        **_rewards(0.9 * step),
    }
    return {"step": step} | {f"eval/{name}": float(value) for name, value in metrics.items()}


def _measure(run: RunDirectory, when: str, trained: float, generator: np.random.Generator) -> None:
    """Separation and answers of the model before (0) or after (1) training."""
    harmful = np.arange(120) < 60
    kinds = ["harmful"] * 60 + ["ordinary"] * 40 + ["alarming"] * 20
    plane = generator.normal(size=(120, 2)) @ np.array([[6.0, 1.0], [0.0, 2.5]])
    plane[harmful] += [5 * trained, 3 * trained]
    d_b = 0.02 + 0.3 * trained
    _write(run.separation / f"{when}.json", {
        "figures": {"d_b": d_b}, "matched": {"d_b": d_b - 0.01}, "d_b_interval": [0.6 * d_b, 1.5 * d_b],
        "plane": plane.tolist(), "kinds": kinds, "harmful": harmful.tolist(),
        "notes": ["D_B there is hardly more than chance"] if not trained else [],
    })  # fmt: skip
    rates = {
        "evaluate/asr": _rate(95 - 77 * trained, 100),
        "evaluate/over_refusal": _rate(13 * trained, 100),
        "evaluate/refused/harmful": _rate(1 + 81 * trained, 100),
        "evaluate/refused/ordinary": _rate(5 * trained, 66),
        "evaluate/refused/alarming": _rate(8 * trained, 34),
        "evaluate/degenerate": _rate(4 * (1 - trained), 200),
        "evaluate/asr/prefix_injection": _rate(97 - 50 * trained, 100),
        "evaluate/safety/self_harm": _rate(3 + 12 * trained, 20),
        "evaluate/odd_rate/some_kind": _rate(1, 4),
    }
    judge = {"name": "string", "errors": "Refusals are found by string rules, which miss some."}
    kl = {"value": 8.1, "interval": [6.0, 10.2], "per_token": 0.2, "answers": 50} if trained else None
    numbers = {"logp_per_token": -0.83 - trained, "perplexity": 9.2 + trained, "kl": kl, "odd": 7}
    _write(run.evaluation / f"{when}.json", {"judge": judge, "rates": rates, "notes": [], **numbers})
    run.metrics.append({
        "step": round(UPDATES * trained),
        "separation/d_b": d_b, "separation/d_b_length_matched": d_b - 0.01, "separation/d_b_shuffled": 0.013,
        "separation/length_auc": 0.5,
        **{name: rate["share"] for name, rate in rates.items()},
        "evaluate/logp_per_token": -0.83 - trained,
        **({"evaluate/kl": kl["value"]} if kl else {}),
    })  # fmt: skip


def _rate(count: float, of: int) -> dict[str, Any]:
    """A rate with roughly its Wilson interval."""
    share = count / of
    half = 1.96 * (share * (1 - share) / of) ** 0.5 + 0.01
    return {
        "share": share,
        "count": round(count),
        "of": of,
        "interval": [max(0.0, share - half), min(1.0, share + half)],
    }


def _result(name: str, measured: bool, run: RunDirectory) -> dict[str, Any]:
    metrics = last_values(run.metrics.read())
    return {
        "name": name,
        "steps": {"planned": UPDATES, "taken": UPDATES},
        "metrics": metrics,
        "data": {
            "train": COUNTS,
            "eval": COUNTS | {"examples": 72, "aligned": 36, "unaligned": 36, "pairs": 36} if measured else None,
            "bad_rows": 0,
            "prompts_in_train_and_eval": 0,
            "fingerprint": "33fed346b62441ec2934a20e335655bd",
            "model_fingerprint": "788faba58b25aa17b222e107de5c152d",
            "reference": {"hits": 1518, "misses": 0},
        },
        "versions": {"python": "3.11.7", "raydiv": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cpu"},
        "layout": {"zero_stage": 3, "tokens_per_microbatch": 368, "packing": "mask", "why_not_packed": None},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
