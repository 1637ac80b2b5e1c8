"""A trial: the function that Ray Tune runs in an actor. It is an ordinary run, whose metrics are reported to Tune."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.commands.train import train
from raydiv.config import Recipe, with_changes
from raydiv.experiments.shared import RunGroup
from raydiv.experiments.sweep.asha import TRAINED
from raydiv.experiments.sweep.record import ENDED, FAILED, FINISHED, TrialRecord
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics, numbers
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.resume import resumes
from raydiv.utils.compat import propagate_to_train_controllers

ERROR = "error.txt"
"""The file in a run's directory with the message of the error that it failed with."""


@dataclass(frozen=True, slots=True)
class TrialTask:
    """What all trials of a sweep share, and the records of an ``earlier`` attempt by number.

    ``cwd`` is the working directory of the command, to which paths of the recipe are relative.
    """

    recipe: Recipe
    group: RunGroup
    cwd: Path
    earlier: Mapping[int, TrialRecord]


def run_trial(config: Mapping[str, Any], task: TrialTask) -> None:
    """Run a trial and report each line of its metrics to Tune; an ended trial is reported again without a run."""
    import ray
    from ray import tune

    os.chdir(task.cwd)
    # Ray Train's placement-group cleaner, which frees a stopped trial's workers, connects to the cluster of this
    # variable. Without it, it connects to the one started last on the machine, which may be another: the placement
    # group would leak
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    propagate_to_train_controllers("RAY_ADDRESS")
    number = int(config["number"])
    name, tags = TrialRecord(number, config["values"]).name, {"raydiv.trial": str(number)}
    recipe = task.group.member_recipe(with_changes(task.recipe, config["values"]), name, tags)
    run, earlier = RunDirectory.of(recipe), task.earlier.get(number)
    if earlier is not None and earlier.status in ENDED:
        if earlier.status == FINISHED and resumes(run, recipe):
            # if it was killed with its sweep, its report and a part of its MLflow run may be missing
            train(recipe, ProgressDisplay(quiet=True), resume=True)
        for record in run.metrics.read() if run.metrics.path.exists() else []:
            tune.report(numbers(record))
        if earlier.status == FAILED:
            raise RuntimeError(earlier.error)
    else:
        _train(recipe, run)
    # a searcher reads only the last report
    tune.report(numbers(run.metrics.trained_values()))


def _train(recipe: Recipe, run: RunDirectory) -> None:
    """Train, from the checkpoint of an unfinished attempt if there is one."""
    from ray import tune

    resume = resumes(run, recipe)
    if not resume:
        shutil.rmtree(run.path, ignore_errors=True)

    def report(record: Metrics) -> None:
        tune.report(numbers(record) | {TRAINED: run.stage.read().metrics_bytes_at_end is not None})

    try:
        train(recipe, ProgressDisplay(quiet=True), resume=resume, watch=report)
    except Exception as error:
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / ERROR).write_text(str(error))
        raise
