"""A run's workers in plain processes: the real worker and step, without Ray Train and Ray Data's tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import cloudpickle

from raydiv.commands.prepare import load_inputs, prepare_data
from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.training import worker
from raydiv.training.dataloader import read_steps
from raydiv.training.worker import TrainTask, run_worker


def prepared(recipe: Recipe) -> TrainTask:
    """The task of a new run's workers."""
    inputs = load_inputs(recipe, ProgressDisplay(quiet=True))
    with ray_session(recipe.cluster):
        data = prepare_data(recipe, inputs, ProgressDisplay(quiet=True))
    run = RunDirectory.of(recipe)
    run.create(recipe, data.fingerprints)
    run.stage.training_started(recipe.optim.steps or 0)
    return TrainTask(recipe, data.model_directory, run.path, 0, data.train, data.eval)


def without_tasks() -> AbstractContextManager[Any]:
    """While the block runs, steps are read in the process that makes them, without Ray Data tasks."""

    def local_steps(loader: Any, make_loader: Any, start: int, stop: int) -> Iterator[Any]:
        return read_steps(loader, start, stop)

    return patch.object(worker, "stream_steps", local_steps)


def train_each(pickled: list[bytes]) -> None:
    """Train run after run; runs on every rank."""
    with without_tasks():
        for task in pickled:
            run_worker(cloudpickle.loads(task), None)
