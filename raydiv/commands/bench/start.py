"""``raydiv bench --part start``: seconds from the command to the first step, compared with bare Ray and DeepSpeed."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydiv.commands.bench.harness import run_module, with_output_in, without_evaluation
from raydiv.commands.bench.ray_baseline import DONE_FILE
from raydiv.commands.prepare import prepare
from raydiv.config import Recipe, save_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import worker_environment
from raydiv.utils.versions import versions


def bench_start(recipe: Recipe, repeats: int = 3, display: ProgressDisplay | None = None) -> dict[str, Any]:
    """Time ``raydiv train`` from the start of its process until its first step begins to compute.

    Data and reference are prepared, and caches are warm. The baseline, in turns, is a bare ``TorchTrainer`` with as
    many workers, which make a DeepSpeed step of one small layer; it is timed until that step is done.

    Returns medians in seconds: ``raydiv``, the ``first_step`` after it, the baseline ``hello``, and ``over``, the
    difference of raydiv and the baseline within a turn.
    """
    display = display or ProgressDisplay()
    recipe = without_evaluation(recipe, 1)
    prepare(recipe, display)
    with display.phase("warm-up start"):
        _raydiv_start(recipe)
    turns = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            turns.append(_raydiv_start(recipe) | _bare_start(recipe))
    return {
        "cpus": os.cpu_count(),
        "workers": recipe.cluster.num_workers,
        "repeats": repeats,
        "versions": versions(),
        **{f"{name}_seconds": statistics.median(turn[name] for turn in turns) for name in turns[0]},
        "over_seconds": statistics.median(turn["raydiv"] - turn["hello"] for turn in turns),
        "turns": turns,
    }


def _raydiv_start(recipe: Recipe) -> dict[str, float]:
    """Time a run of one step, which writes its one line of metrics when the step is done."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = with_output_in(recipe, folder)
        path = Path(folder) / "recipe.yaml"
        save_recipe(recipe, path)
        run = RunDirectory.of(recipe)
        done = _seconds_until_write(run.metrics.path, recipe, "raydiv", ["train", str(path), "--json"])
        (record,) = run.metrics.read()
        step = record["step_seconds"] - record["data_seconds"]
        return {"raydiv": done - step, "first_step": step}


def _bare_start(recipe: Recipe) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(recipe.cluster.num_workers), str(recipe.cluster.use_gpu), folder]
        return {
            "hello": _seconds_until_write(
                Path(folder) / DONE_FILE, recipe, "raydiv.commands.bench.ray_baseline", arguments
            )
        }


def _seconds_until_write(written: Path, recipe: Recipe, module: str, arguments: Sequence[str]) -> float:
    """Run a module of raydiv to its end; seconds from its start to the last write of ``written``."""
    started = time.time()
    run_module(module, arguments, worker_environment(recipe.cluster))
    return written.stat().st_mtime - started


def start_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_start`` returns."""
    return ["", "seconds"], [
        ("raydiv train, until its first step starts", f"{report['raydiv_seconds']:.1f}"),
        ("bare TorchTrainer and DeepSpeed, to a first step", f"{report['hello_seconds']:.1f}"),
        ("difference within a turn", f"{report['over_seconds']:.1f}"),
        ("raydiv's first step", f"{report['first_step_seconds']:.1f}"),
    ]
