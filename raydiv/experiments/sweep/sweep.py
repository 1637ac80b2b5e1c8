"""``raydiv sweep``: check everything, prepare and measure once, run the trials under Ray Tune, and say which is the best."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.config.sweep import SweepConfig as SweepSection
from raydiv.experiments.shared import RunGroup, distinct_preparations, prepare_all
from raydiv.experiments.sweep.callback import SweepCallback
from raydiv.experiments.sweep.goal import whole_names
from raydiv.experiments.sweep.page import write_sweep_report
from raydiv.experiments.sweep.record import FAILED, SweepDirectory, SweepRecord
from raydiv.experiments.sweep.searchers import ListSearcher, OptunaSearcher
from raydiv.experiments.sweep.space import Values, recipes_of, representatives
from raydiv.experiments.sweep.trial import TrialTask, run_trial
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.tracker import MlflowTracker, forwarded_environment
from raydiv.runtime.resources import concurrent_runs
from raydiv.runtime.session import ray_session, require_dashboard
from raydiv.utils.errors import UserError
from raydiv.utils.versions import versions

GRACE, REDUCTION = 10, 3
"""Of asha, where the recipe does not say."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep: its directory, and the content of sweep.json."""

    directory: SweepDirectory
    report: dict[str, Any]


def sweep(recipe: Recipe, *, resume: bool = False, display: ProgressDisplay | None = None) -> SweepResult:
    """Search the recipe's space: a run for each trial, all on one preparation, one reference and one measurement of the base.

    ``resume`` goes on with a sweep that was stopped; what is over is not done again. Raises UserError for what the user must
    change, values that no run could have and a goal that no trial reports included, before the first trial starts;
    RuntimeError when no trial finishes.
    """
    display = display or ProgressDisplay()
    if recipe.sweep is None:
        raise UserError("the recipe has no section sweep: it says which keys are searched, and for what")
    tried = representatives(recipe)
    variants = distinct_preparations(recipes_of(recipe, tried))
    directory = SweepDirectory.of(recipe)
    begun = directory.can_resume(recipe, resume)
    record = SweepRecord.read(directory, recipe) if begun else SweepRecord(directory, recipe)
    started = time.monotonic()
    # Ray Train asks the dashboard whether a stopped trial's controller is gone, and only then frees its workers
    with ray_session(recipe.cluster, dashboard=True):
        if recipe.sweep.scheduler != "none":
            require_dashboard("sweep.scheduler: asha")
        steps, measured = prepare_all(variants, display)
        names = whole_names(recipe, variants, measured)
        record.named(names)
        directory.create(recipe)
        record.write()
        tags = {"raydiv.kind": "sweep", "raydiv.goal": recipe.sweep.goal}
        tracker = MlflowTracker(recipe, tags, display.print, record.facts.get("mlflow"))
        with tracker.told_of_its_end():
            record.facts = {"mlflow": {"uri": tracker.uri, "run_id": tracker.run_id}, "versions": versions()}
            _search(recipe, record, tried, _scheduler(recipe.sweep, names, steps), display)
            record.facts["seconds"] = round(time.monotonic() - started, 1)
            # a trial that was stopped may have written something after it was looked at
            record.forget_weights(recipe.sweep.keep)
            _conclude(record, tracker)
        tracker.finish()
    return SweepResult(directory, record.as_json())


DRIVER = {"cpu": 0, "memory": 1}
"""What a trial's own actor reserves: it computes nothing, and Tune wants something to place. Its workers ask for themselves."""

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # a recipe's relative paths are of where the command was given
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune's would end the search as if it were done
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a line of metrics has what was measured then: not all of them have the goal's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
"""Ray Tune's own tables, log files, folders, signals and checks: raydiv has its own."""


def _search(
    recipe: Recipe, record: SweepRecord, tried: Sequence[Values], scheduler: Any, display: ProgressDisplay
) -> None:
    """Run the trials that are not over, as many at once as there is room for."""
    os.environ.update(QUIET)
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    section = recipe.sweep
    assert section is not None
    room, part = concurrent_runs(recipe.cluster, section.max_concurrent)
    family = RunGroup(record.directory.trials, part, forwarded_environment(recipe), record.facts["mlflow"]["run_id"])
    given = TrialTask(recipe, family, Path.cwd(), dict(record.trials))
    searcher, count = _searcher(recipe, record, tried)
    with display.phase("trials") as update:
        follower = SweepCallback(record, section.keep, count, update)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, given=given), DRIVER),
            tune_config=tune.TuneConfig(
                num_samples=count,
                max_concurrent_trials=room,
                search_alg=searcher,
                scheduler=scheduler or FIFOScheduler(),
                # an actor that is kept for reuse would keep the workers of a trial that was stopped
                reuse_actors=scheduler is None,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(record.directory.path), callbacks=[follower], verbose=0
            ),
        ).fit()


def _searcher(recipe: Recipe, record: SweepRecord, tried: Sequence[Values]) -> tuple[ListSearcher, int]:
    """Who says what is tried, and how many trials there will be at most."""
    section = recipe.sweep
    assert section is not None
    if section.search != "tpe":
        return ListSearcher(dict(enumerate(tried, 1))), len(tried)
    assert section.trials is not None, "the recipe sees to it"
    earlier = {number: trial.values for number, trial in record.trials.items()}
    asked = OptunaSearcher(section.parameters, record.objectives, record.constraints, recipe.seed, earlier)
    return asked, max(section.trials, *earlier, 1)


def _scheduler(section: SweepSection, names: Mapping[str, str], steps: int) -> Any | None:
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934) by optimizer updates, or nothing."""
    if section.scheduler == "none":
        return None
    from raydiv.experiments.sweep.asha import TrialASHA

    grace = section.grace or GRACE
    if grace >= steps:
        raise UserError(f"sweep.grace: {grace} of {steps} updates leave asha nothing to stop; give fewer")
    compared = section.compared
    return TrialASHA(names[compared.metric], compared.direction, steps, grace, section.reduction or REDUCTION)


def _conclude(record: SweepRecord, tracker: MlflowTracker) -> None:
    """Write the record and its report, and mark the trials in MLflow. Raises RuntimeError where every trial failed."""
    directory, best = record.directory, {trial.number for trial in record.best}
    record.write()
    write_sweep_report(directory.report, directory.pictures, record.as_json())
    tracker.tag_children(
        "raydiv.trial",
        {
            str(trial.number): {"raydiv.status": trial.status, "raydiv.best": str(trial.number in best).lower()}
            for trial in record.trials.values()
        },
    )
    if len(best) == 1:
        (trial,) = record.best
        tracker.metrics({"step": 0} | {f"best/{name}": value for name, value in trial.metrics.items()})
    for path in (directory.record, directory.recipe, directory.report, *sorted(directory.pictures.glob("*.png"))):
        tracker.artifact(path)
    failures = [trial.error for trial in record.trials.values() if trial.status == FAILED]
    if len(failures) == len(record.trials):
        raise RuntimeError(f"every trial failed, the first with: {failures[0]}")
