"""A run's workers in plain processes: the real worker and step, without Ray Train."""

from __future__ import annotations

import cloudpickle

from raydiv.commands.prepare import load_inputs, prepare_data
from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
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


def train_each(pickled: list[bytes]) -> None:
    """Train run after run; runs on every rank."""
    for task in pickled:
        run_worker(cloudpickle.loads(task), None)
