"""A trial: what Ray Tune runs in an actor of its own. It is an ordinary run, whose metrics Tune is told of."""

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
from raydiv.experiments.sweep.record import FAILED, FINISHED, OVER, TrialRecord
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics, numbers
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.resume import resumes

ERROR = "error.txt"
"""Why a run failed, in its directory."""


@dataclass(frozen=True, slots=True)
class TrialTask:
    """What all trials of a sweep share, and what became of those of an earlier attempt.

    ``cwd``: where the command was given, which relative paths of the recipe begin at.
    """

    recipe: Recipe
    family: RunGroup
    cwd: Path
    earlier: Mapping[int, TrialRecord]


def run_trial(config: Mapping[str, Any], given: TrialTask) -> None:
    """Run a trial and tell Tune every line of its metrics; of one that is over, tell them again and train nothing."""
    from ray import tune

    os.chdir(given.cwd)
    _name_the_cluster()
    number = int(config["number"])
    name, tags = TrialRecord(number, config["values"]).name, {"raydiv.trial": str(number)}
    recipe = given.family.member_recipe(with_changes(given.recipe, config["values"]), name, tags)
    run, earlier = RunDirectory.of(recipe), given.earlier.get(number)
    if earlier is not None and earlier.status in OVER:
        if earlier.status == FINISHED and resumes(run, recipe):
            # killed with its sweep it may have no report, and MLflow not all of it
            train(recipe, ProgressDisplay(quiet=True), resume=True)
        for record in run.metrics.read() if run.metrics.path.exists() else []:
            tune.report(numbers(record))
        if earlier.status == FAILED:
            raise RuntimeError(earlier.error)
    else:
        _train(recipe, run)
    # a searcher reads the last report alone
    tune.report(numbers(run.metrics.trained_values()))


def _name_the_cluster() -> None:
    """Let what frees a stopped trial's workers ask this cluster whether the trial is gone.

    Ray Train would ask the one that was last started on the machine, which may be another, or gone; then it frees nothing, and
    says nothing.
    """
    import ray
    from ray.train.v2._internal import constants

    name = "RAY_ADDRESS"
    os.environ[name] = ray.get_runtime_context().gcs_address
    if name not in constants.ENV_VARS_TO_PROPAGATE:
        constants.ENV_VARS_TO_PROPAGATE = {*constants.ENV_VARS_TO_PROPAGATE, name}


def _train(recipe: Recipe, run: RunDirectory) -> None:
    from ray import tune

    resume = resumes(run, recipe)  # an attempt that was not finished
    if not resume:
        shutil.rmtree(run.path, ignore_errors=True)

    def report(record: Metrics) -> None:
        tune.report(numbers(record) | {TRAINED: run.stage.read().ended is not None})

    try:
        train(recipe, ProgressDisplay(quiet=True), resume=resume, watch=report)
    except Exception as error:
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / ERROR).write_text(str(error))
        raise
