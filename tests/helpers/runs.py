"""Run directories that training writes: how far a run is, and whether two of them are the same."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from safetensors.numpy import load_file

from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics
from raydiv.training.checkpoint.manifest import CheckpointStore
from raydiv.training.metrics import TIMED as OF_PHASES

TIMED = {"tokens_per_second", *OF_PHASES, "peak_memory_bytes"}
"""What a run that is made again does not repeat."""


def wait_for_step(run: RunDirectory, step: int, seconds: float = 300) -> None:
    _wait(lambda: run.metrics.path.exists() and run.metrics.steps_taken() >= step, f"step {step}", seconds)


def wait_for_checkpoint(run: RunDirectory, recipe: Recipe, step: int, seconds: float = 300) -> None:
    """Wait for a checkpoint of ``step`` or a later one. It is committed some steps after the one that it holds."""
    store = CheckpointStore(run.checkpoints(recipe))
    _wait(lambda: any(committed >= step for committed in store.steps()), f"a checkpoint of step {step}", seconds)


def _wait(reached: Callable[[], bool], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if reached():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} was not reached in {seconds} s")


def weights(run: RunDirectory) -> dict[str, np.ndarray]:
    (file,) = run.model.glob("*.safetensors")
    return dict(load_file(file))


def untimed(run: RunDirectory) -> list[Metrics]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in run.metrics.read()]


def assert_same_run(found: RunDirectory, expected: RunDirectory) -> None:
    """Bitwise the same weights, and the same lines of metrics: no gap, no repeat."""
    assert untimed(found) == untimed(expected)
    mine, others = weights(found), weights(expected)
    assert mine.keys() == others.keys()
    assert all(np.array_equal(mine[name], others[name]) for name in mine)
