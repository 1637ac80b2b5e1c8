"""``raydiv sweep``: check all trials, prepare data and evaluate the base once, run the trials under Ray Tune."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.config.sweep import SweepConfig, SweepObjective
from raydiv.experiments.shared import RunGroup, distinct_preparations, prepare_all
from raydiv.experiments.sweep.callback import SweepCallback
from raydiv.experiments.sweep.metric_names import full_metric_names
from raydiv.experiments.sweep.page import write_sweep_report
from raydiv.experiments.sweep.record import FAILED, SweepDirectory, SweepRecord
from raydiv.experiments.sweep.searchers import ListSearcher, OptunaSearcher
from raydiv.experiments.sweep.space import Values, representatives, trial_recipes
from raydiv.experiments.sweep.trial import TrialTask, run_trial
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.resume import with_template_date
from raydiv.runs.tracker import MlflowTracker, forwarded_uri
from raydiv.runtime.model_pool import end_pool
from raydiv.runtime.resources import concurrent_runs
from raydiv.runtime.session import ray_session, require_dashboard
from raydiv.utils.claim import claim
from raydiv.utils.errors import UserError
from raydiv.utils.versions import versions

DEFAULT_GRACE, DEFAULT_REDUCTION = 10, 3
"""Of asha."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep."""

    directory: SweepDirectory
    record: SweepRecord

    @property
    def report(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return self.record.as_json()


def sweep(recipe: Recipe, *, resume: bool = False, display: ProgressDisplay | None = None) -> SweepResult:
    """Search the recipe's space. Each trial is a run; they share prepared data, reference log-probs and the baseline.

    ``resume`` continues an existing sweep without repeating its ended trials. Before the first trial starts, raises
    UserError for values that are invalid in a recipe and for metrics that no trial reports; raises RuntimeError if
    every trial fails.
    """
    display = display or ProgressDisplay()
    directory = SweepDirectory.of(recipe)
    with claim(directory.path, display.print):
        return _sweep(recipe, directory, resume, display)


def _sweep(recipe: Recipe, directory: SweepDirectory, resume: bool, display: ProgressDisplay) -> SweepResult:
    section = recipe.sweep
    if section is None:
        raise UserError("the recipe has no section sweep, with the keys to search and the objectives")
    resumes = directory.can_resume(recipe, resume)
    # one date for all trials, also of a search that lasts over midnight
    recipe = with_template_date(recipe, directory.read_recipe() if resumes else None)
    candidates = representatives(recipe)
    variants = distinct_preparations(trial_recipes(recipe, candidates))
    record = SweepRecord.read(directory, recipe) if resumes else SweepRecord.of(directory, recipe)
    started = time.monotonic()
    # Ray Train frees a stopped trial's workers once the dashboard confirms that the trial's controller is gone
    with ray_session(recipe.cluster, dashboard=True):
        if section.scheduler != "none":
            require_dashboard("sweep.scheduler: asha")
        steps, base_metrics = prepare_all(variants, display)
        names = full_metric_names(recipe, variants, base_metrics)
        record.use_full_names(names)
        directory.create(recipe)
        record.write()
        tags = {"raydiv.kind": "sweep", "raydiv.goal": record.goal}
        tracker = MlflowTracker(recipe, tags, display.print, record.mlflow)
        with tracker.end_on_error():
            record.mlflow, record.versions = {"uri": tracker.uri, "run_id": tracker.run_id}, versions()
            objective = section.asha_objective
            objective = objective.model_copy(update={"metric": names[objective.metric]})
            _run_trials(recipe, record, candidates, _scheduler(section, objective, steps), display)
            record.seconds = round(time.monotonic() - started, 1)
            # a stopped trial may have written files after its weights were removed
            record.remove_weights(section.keep)
            _write_results(record, tracker)
        tracker.finish()
    return SweepResult(directory, record)


TRIAL_RESOURCES = {"cpu": 0, "memory": 1}
"""Reserved for a trial's own actor, which computes nothing; Tune accepts no empty request. Its workers reserve their
own.
"""

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # relative paths of a recipe are relative to the working directory of the command
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune's handler would end the search as if it had finished
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a line of metrics has what was measured at that step, not every objective
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
"""Turns off Ray Tune's tables, log files, folders, signal handlers and checks, in place of which raydiv has its own."""


def _run_trials(
    recipe: Recipe, record: SweepRecord, candidates: Sequence[Values], scheduler: Any, display: ProgressDisplay
) -> None:
    """Run the trials that have not ended, as many at once as there is room for."""
    os.environ.update(TUNE_ENVIRONMENT)
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    section = recipe.sweep
    assert section is not None
    assert record.mlflow is not None
    end_pool()  # the trials have pools of their own
    max_concurrent, cluster = concurrent_runs(recipe.cluster, section.max_concurrent)
    group = RunGroup(record.directory.trials, cluster, forwarded_uri(recipe), record.mlflow["run_id"])
    task = TrialTask(recipe, group, Path.cwd(), dict(record.trials))
    searcher, count = _searcher(recipe, record, candidates)
    with display.phase("trials") as update:
        callback = SweepCallback(record, section.keep, count, update)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, task=task), TRIAL_RESOURCES),
            tune_config=tune.TuneConfig(
                num_samples=count,
                max_concurrent_trials=max_concurrent,
                search_alg=searcher,
                scheduler=scheduler or FIFOScheduler(),
                # a reused actor would keep the workers of a trial that was stopped
                reuse_actors=scheduler is None,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(record.directory.path), callbacks=[callback], verbose=0
            ),
        ).fit()


def _searcher(recipe: Recipe, record: SweepRecord, candidates: Sequence[Values]) -> tuple[ListSearcher, int]:
    """The searcher, and the most trials that it will suggest."""
    section = recipe.sweep
    assert section is not None
    if section.search != "tpe":
        return ListSearcher(dict(enumerate(candidates, 1))), len(candidates)
    assert section.trials is not None, "SweepConfig has checked it"
    earlier = {number: trial.values for number, trial in record.trials.items()}
    searcher = OptunaSearcher(section.parameters, record.objectives, record.constraints, recipe.seed, earlier)
    return searcher, max(section.trials, *earlier, 1)


def _scheduler(section: SweepConfig, objective: SweepObjective, steps: int) -> Any | None:
    """ASHA by this objective; None for ``scheduler: none``."""
    if section.scheduler == "none":
        return None
    from raydiv.experiments.sweep.asha import TrialASHA

    grace = section.grace or DEFAULT_GRACE
    if grace >= steps:
        raise UserError(
            f"sweep.grace: asha cannot stop a trial after {grace} of {steps} updates; set fewer than {steps}"
        )
    return TrialASHA(objective.metric, objective.direction, steps, grace, section.reduction or DEFAULT_REDUCTION)


def _write_results(record: SweepRecord, tracker: MlflowTracker) -> None:
    """Write the record and its report, and tag the trials in MLflow. Raises RuntimeError if every trial failed."""
    directory, best = record.directory, record.best
    record.write()
    write_sweep_report(directory.report, directory.pictures, record)
    tracker.tag_children(
        "raydiv.trial",
        {
            str(trial.number): {"raydiv.status": trial.status, "raydiv.best": str(trial in best).lower()}
            for trial in record.trials.values()
        },
    )
    if len(best) == 1:
        tracker.log_metrics({"step": 0} | {f"best/{name}": value for name, value in best[0].metrics.items()})
    for path in (directory.record, directory.recipe, directory.report, *sorted(directory.pictures.glob("*.png"))):
        tracker.log_artifact(path)
    failures = [trial.error for trial in record.trials.values() if trial.status == FAILED]
    if len(failures) == len(record.trials):
        raise RuntimeError(f"every trial failed, the first with: {failures[0]}")
