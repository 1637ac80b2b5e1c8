"""``raydiv bench --part trials``: what a sweep's trial takes beside its own training, and what the least one takes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from raydiv.commands.bench.harness import inside, run_module, steps_alone
from raydiv.commands.prepare import prepare
from raydiv.config import Recipe, save_recipe
from raydiv.config.sweep import SweepConfig
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import worker_environment
from raydiv.utils.versions import versions

AT_A_TIME = 3
"""Trials of a turn."""


def bench_trials(
    recipe: Recipe, repeats: int = 3, steps: int = 4, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """Time the trials of ``raydiv sweep``, each of ``steps`` updates and no measurement, one after another.

    Beside them, in turn, stand bare trials: Ray Tune over a ``TorchTrainer`` whose workers, as many, make a DeepSpeed step of
    one small layer. Data and reference are prepared.

    Returns medians in seconds: of what a trial of ``raydiv`` takes beyond its updates and of what a ``bare`` one takes, and
    ``ratio``, the median of their ratios within a turn.
    """
    display = display or ProgressDisplay()
    recipe = steps_alone(recipe, steps)
    prepare(recipe, display)
    turns: list[dict[str, list[float]]] = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            turns.append({"raydiv": _raydiv(recipe), "bare": _bare(recipe)})
    return {
        "cpus": os.cpu_count(),
        "workers": recipe.cluster.num_workers,
        "repeats": repeats,
        "versions": versions(),
        **{f"{name}_seconds": median(seconds for turn in turns for seconds in turn[name]) for name in turns[0]},
        "ratio": median(median(turn["raydiv"]) / median(turn["bare"]) for turn in turns),
        "turns": turns,
    }


def _raydiv(recipe: Recipe) -> list[float]:
    """Seconds of each trial without those of its updates."""
    with tempfile.TemporaryDirectory() as folder:
        betas = [round(0.05 * (number + 1), 2) for number in range(AT_A_TIME)]
        section = SweepConfig(space={"loss.beta": betas}, goal="minimize loss", search="grid", max_concurrent=1, keep=0)
        recipe = inside(recipe, folder).model_copy(update={"sweep": section})
        path = Path(folder) / "recipe.yaml"
        save_recipe(recipe, path)
        printed = run_module("raydiv", ["sweep", str(path), "--json"], worker_environment(recipe.cluster))
        sweep = RunDirectory.of(recipe).path
        return [trial["seconds"] - _training(sweep / trial["run"]) for trial in json.loads(printed)["trials"]]


def _training(run: Path) -> float:
    return sum(float(record.get("step_seconds", 0.0)) for record in RunDirectory(run).read_metrics())


def _bare(recipe: Recipe) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        given = [str(recipe.cluster.num_workers), str(recipe.cluster.use_gpu), folder, str(AT_A_TIME)]
        printed = run_module("raydiv.commands.bench.ray_baseline", given, worker_environment(recipe.cluster))
        seconds: list[float] = json.loads(printed.strip().splitlines()[-1])["seconds"]
        return seconds


def trials_table(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_trials`` returns."""
    return ["", "seconds"], [
        ("a trial of raydiv sweep, beyond its updates", f"{found['raydiv_seconds']:.1f}"),
        ("a bare trial: TorchTrainer, DeepSpeed, one small step", f"{found['bare_seconds']:.1f}"),
        ("ratio", f"{found['ratio']:.2f}"),
    ]
