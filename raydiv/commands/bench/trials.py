"""``raydiv bench --part trials``: the overhead of a sweep's trial, compared with a minimal trial of Ray Tune."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from raydiv.commands.bench.harness import run_module, with_output_in, without_evaluation
from raydiv.commands.prepare import prepare
from raydiv.config import Recipe, save_recipe
from raydiv.config.sweep import SweepConfig, SweepObjective
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import worker_environment
from raydiv.utils.versions import versions

TRIALS_PER_TURN = 3
"""Number of trials in a turn."""


def bench_trials(
    recipe: Recipe, repeats: int = 3, steps: int = 4, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """Time the trials of ``raydiv sweep``, each of ``steps`` updates without evaluation, one after another.

    The baseline, in turns, are bare trials: Ray Tune runs a ``TorchTrainer`` with as many workers, which make a
    DeepSpeed step of one small layer. Data and reference are prepared.

    Returns medians in seconds: a trial of ``raydiv`` without its updates, and a ``bare`` trial; ``ratio`` is the median
    of their ratios within a turn.
    """
    display = display or ProgressDisplay()
    recipe = without_evaluation(recipe, steps)
    prepare(recipe, display)
    turns: list[dict[str, list[float]]] = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            turns.append({"raydiv": _raydiv_trials(recipe), "bare": _bare_trials(recipe)})
    return {
        "cpus": os.cpu_count(),
        "workers": recipe.cluster.num_workers,
        "repeats": repeats,
        "versions": versions(),
        **{f"{name}_seconds": median(seconds for turn in turns for seconds in turn[name]) for name in turns[0]},
        "ratio": median(median(turn["raydiv"]) / median(turn["bare"]) for turn in turns),
        "turns": turns,
    }


def _raydiv_trials(recipe: Recipe) -> list[float]:
    """Seconds of each trial, without its updates."""
    with tempfile.TemporaryDirectory() as folder:
        betas = [round(0.05 * (number + 1), 2) for number in range(TRIALS_PER_TURN)]
        objectives = [SweepObjective(metric="loss", direction="minimize")]
        section = SweepConfig(
            space={"loss.beta": betas}, objectives=objectives, search="grid", max_concurrent=1, keep=0
        )
        recipe = with_output_in(recipe, folder).model_copy(update={"sweep": section})
        path = Path(folder) / "recipe.yaml"
        save_recipe(recipe, path)
        printed = run_module("raydiv", ["sweep", str(path), "--json"], worker_environment(recipe.cluster))
        sweep = RunDirectory.of(recipe).path
        return [trial["seconds"] - _update_seconds(sweep / trial["run"]) for trial in json.loads(printed)["trials"]]


def _update_seconds(run: Path) -> float:
    return sum(float(record.get("step_seconds", 0.0)) for record in RunDirectory(run).metrics.read())


def _bare_trials(recipe: Recipe) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(recipe.cluster.num_workers), str(recipe.cluster.use_gpu), folder, str(TRIALS_PER_TURN)]
        printed = run_module("raydiv.commands.bench.ray_baseline", arguments, worker_environment(recipe.cluster))
        seconds: list[float] = json.loads(printed.strip().splitlines()[-1])["seconds"]
        return seconds


def trials_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_trials`` returns."""
    return ["", "seconds"], [
        ("a trial of raydiv sweep, without its updates", f"{report['raydiv_seconds']:.1f}"),
        ("a bare trial: TorchTrainer, DeepSpeed, one small step", f"{report['bare_seconds']:.1f}"),
        ("ratio", f"{report['ratio']:.2f}"),
    ]
