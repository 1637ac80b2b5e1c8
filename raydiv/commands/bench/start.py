"""``raydiv bench --part start``: seconds from the command to the first step, beside the least that Ray and DeepSpeed take."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydiv.commands.bench.harness import inside, run_module, steps_alone
from raydiv.commands.bench.ray_baseline import STEPPED
from raydiv.commands.prepare import prepare
from raydiv.config import Recipe, save_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import worker_environment
from raydiv.utils.versions import versions


def bench_start(recipe: Recipe, repeats: int = 3, display: ProgressDisplay | None = None) -> dict[str, Any]:
    """Time ``raydiv train`` from the start of its process until its first step begins to compute.

    Data and reference are prepared, and the model has been trained before. Beside it, in turn, stands a bare ``TorchTrainer``
    whose workers, as many, make a DeepSpeed step of one small layer, until that is done.

    Returns medians in seconds: of ``raydiv``, of the ``first_step`` that follows, of ``hello``, and ``over``, what raydiv takes
    more within a turn.
    """
    display = display or ProgressDisplay()
    recipe = steps_alone(recipe, 1)
    prepare(recipe, display)
    with display.phase("a first start, which leaves caches"):
        _raydiv(recipe)
    turns = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            turns.append(_raydiv(recipe) | _hello(recipe))
    return {
        "cpus": os.cpu_count(),
        "workers": recipe.cluster.num_workers,
        "repeats": repeats,
        "versions": versions(),
        **{f"{name}_seconds": statistics.median(turn[name] for turn in turns) for name in turns[0]},
        "over_seconds": statistics.median(turn["raydiv"] - turn["hello"] for turn in turns),
        "turns": turns,
    }


def _raydiv(recipe: Recipe) -> dict[str, float]:
    """A run of one step and no measurement: it writes one line of metrics, when the step is done."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = inside(recipe, folder)
        path = Path(folder) / "recipe.yaml"
        save_recipe(recipe, path)
        run = RunDirectory.of(recipe)
        done = _seconds_until(run.metrics_file, recipe, "raydiv", ["train", str(path), "--json"])
        (record,) = run.read_metrics()
        step = record["step_seconds"] - record["data_seconds"]
        return {"raydiv": done - step, "first_step": step}


def _hello(recipe: Recipe) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        given = [str(recipe.cluster.num_workers), str(recipe.cluster.use_gpu), folder]
        return {"hello": _seconds_until(Path(folder) / STEPPED, recipe, "raydiv.commands.bench.ray_baseline", given)}


def _seconds_until(written: Path, recipe: Recipe, module: str, arguments: Sequence[str]) -> float:
    """Run a module of ours to its end; seconds from its start until it last wrote a file."""
    started = time.time()
    run_module(module, arguments, worker_environment(recipe.cluster))
    return written.stat().st_mtime - started


def start_table(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_start`` returns."""
    return ["", "seconds"], [
        ("raydiv train, until its first step begins", f"{found['raydiv_seconds']:.1f}"),
        ("bare TorchTrainer and DeepSpeed, to a first step", f"{found['hello_seconds']:.1f}"),
        ("raydiv's more", f"{found['over_seconds']:.1f}"),
        ("raydiv's first step", f"{found['first_step_seconds']:.1f}"),
    ]
