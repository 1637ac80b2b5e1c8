"""What a sweep leaves behind: its directory, and the record of its trials in sweep.json."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml

from raydiv.config import Recipe, save_recipe
from raydiv.config.sweep import SweepConstraint, SweepObjective
from raydiv.experiments.sweep.space import Values
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import numbers
from raydiv.runs.output_directory import OutputDirectory
from raydiv.utils.errors import UserError
from raydiv.utils.storage import read_json, write_json

FINISHED, STOPPED, FAILED, RUNNING, WAITING = "finished", "stopped", "failed", "running", "waiting"
"""What became of a trial; ``stopped``: by the scheduler."""

OVER = (FINISHED, STOPPED, FAILED)


@dataclass(slots=True)
class TrialRecord:
    """A trial: its values, what became of it, and the last value of each of its metrics; ``kept``: its weights are there."""

    number: int
    values: Values
    status: str = WAITING
    metrics: dict[str, float] = field(default_factory=dict)
    feasible: bool = False
    error: str | None = None
    seconds: float | None = None
    steps: int = 0
    kept: bool = False

    @property
    def name(self) -> str:
        return f"{self.number:03d}"


class SweepDirectory(OutputDirectory):
    """The directory of a sweep; its trials are runs under ``trials/``."""

    kind = "sweep"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.trials = path / "trials"

    def can_resume(self, recipe: Recipe, resume: bool) -> bool:
        """Whether this sweep has started here. Raises UserError where it is not to be resumed, or another one is there."""
        started = self.has_started(resume=resume)
        if started:
            _require_same(self.read_recipe(), recipe, self.path)
        return started

    def create(self, recipe: Recipe) -> None:
        """Make the directory this sweep's."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, self.recipe)

    def run(self, trial: TrialRecord) -> RunDirectory:
        return RunDirectory(self.trials / trial.name)


MAY_CHANGE = {"sweep": ("trials", "keep", "max_concurrent"), "cluster": None, "track": None}
"""What a resumed sweep may have otherwise than when it began; None: all of the section."""


def _require_same(before: Recipe, now: Recipe, path: Path) -> None:
    """Raises UserError for what changed between two attempts and would make their trials incomparable."""
    old, new = (recipe.model_dump(mode="json", by_alias=True) for recipe in (before, now))
    for section, names in MAY_CHANGE.items():
        for tree in (old, new):
            for name in list(tree[section]) if names is None else names:
                tree[section].pop(name, None)
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(
            f"{path}: was begun with another {', '.join(changed)}; resume it as it was (its recipe.yaml), or start a new "
            "one with another name"
        )


class SweepRecord:
    """The trials of a sweep, by number, and which of them are the best."""

    def __init__(self, directory: SweepDirectory, recipe: Recipe, trials: Iterable[TrialRecord] = ()) -> None:
        assert recipe.sweep is not None
        self.directory, self._recipe = directory, recipe
        self.objectives: list[SweepObjective] = recipe.sweep.objectives
        self.constraints: list[SweepConstraint] = recipe.sweep.constraints
        self.trials = {trial.number: trial for trial in trials}
        self.facts: dict[str, Any] = {}

    @classmethod
    def read(cls, directory: SweepDirectory, recipe: Recipe) -> SweepRecord:
        """What an earlier attempt left; trials that it had not finished are waiting again."""
        written = read_json(directory.record)
        names = TrialRecord.__dataclass_fields__.keys()
        trials = [
            TrialRecord(**{key: value for key, value in one.items() if key in names}) for one in written["trials"]
        ]
        for trial in trials:
            # a run that was finished when its sweep was killed may not have been noted yet
            if trial.status not in OVER:
                trial.status = FINISHED if directory.run(trial).result.is_file() else WAITING
        record = cls(directory, recipe, trials)
        record.facts = {"mlflow": written.get("mlflow", {})}
        for trial in trials:
            if trial.status in OVER:
                record.settle(trial, trial.status, trial.error)
        return record

    def named(self, metrics: Mapping[str, str]) -> None:
        """Give the goal's metrics their whole names (see raydiv.experiments.sweep.goal)."""
        self.objectives = [SweepObjective(metrics[one.metric], one.direction) for one in self.objectives]
        self.constraints = [SweepConstraint(metrics[one.metric], one.relation, one.bound) for one in self.constraints]
        for trial in self.trials.values():
            trial.feasible = self._within(trial)

    def settle(self, trial: TrialRecord, status: str, error: str | None = None) -> None:
        """Note what became of a trial, read from its run."""
        run = self.directory.run(trial)
        trial.status, trial.error = status, error
        if run.metrics.path.exists():
            trial.metrics = numbers(run.metrics.trained_values())
            trial.steps = run.metrics.steps_taken()
        trial.feasible = self._within(trial)
        trial.kept = run.model.is_dir()

    def _within(self, trial: TrialRecord) -> bool:
        """Whether a finished trial keeps every constraint."""
        return trial.status == FINISHED and all(
            one.metric in trial.metrics and one.violation(trial.metrics[one.metric]) <= 0 for one in self.constraints
        )

    @property
    def finished(self) -> list[TrialRecord]:
        """Finished trials that have every objective, best first: those within the constraints, then by the objectives."""
        whole = [
            trial
            for trial in self.trials.values()
            if trial.status == FINISHED and all(isfinite(trial.metrics.get(one.metric, nan)) for one in self.objectives)
        ]
        feasible = [trial for trial in whole if trial.feasible]
        front = (
            {trial.number for trial in undominated(feasible, self.objectives)} if len(self.objectives) > 1 else set()
        )
        first = self.objectives[0]
        return sorted(
            whole,
            key=lambda trial: (
                not trial.feasible,
                trial.number not in front,
                -first.sign * trial.metrics[first.metric],
                trial.number,
            ),
        )

    @property
    def best(self) -> list[TrialRecord]:
        """The best trial within the constraints; with several objectives all that no other beats in each."""
        feasible = [trial for trial in self.finished if trial.feasible]
        return undominated(feasible, self.objectives) if len(self.objectives) > 1 else feasible[:1]

    def forget_weights(self, keep: int) -> None:
        """Remove the weights of all finished trials but the ``keep`` best, and of those that were stopped or failed.

        Of one that is over no checkpoint is kept.
        """
        ranked = [trial.number for trial in self.finished][:keep]
        for trial in self.trials.values():
            run = self.directory.run(trial)
            if trial.status in OVER:
                # one whose workers still end may have a file come while they are removed; the next time finds it
                with suppress(OSError):
                    run.remove_checkpoints()
            if trial.status in OVER and trial.number not in ranked:
                for folder in (run.model, run.ray):
                    shutil.rmtree(folder, ignore_errors=True)
                trial.kept = False

    def as_json(self) -> dict[str, Any]:
        """The content of sweep.json."""
        sweep = self._recipe.sweep
        assert sweep is not None
        trials = [
            {**asdict(trial), "run": f"{self.directory.trials.name}/{trial.name}"}
            for trial in sorted(self.trials.values(), key=lambda trial: trial.number)
        ]
        return {
            "name": self._recipe.name,
            "goal": sweep.goal,
            "objectives": [asdict(one) for one in self.objectives],
            "constraints": [asdict(one) for one in self.constraints],
            "space": {one.key: one.written() for one in sweep.parameters},
            "search": sweep.search,
            "scheduler": sweep.scheduler,
            "best": [trial.number for trial in self.best],
            "trials": trials,
            "recipe": yaml.safe_dump(self._recipe.model_dump(mode="json", by_alias=True), sort_keys=False),
            **self.facts,
        }

    def write(self) -> None:
        write_json(self.directory.record, self.as_json(), indent=1)


def undominated(trials: Sequence[TrialRecord], objectives: Sequence[SweepObjective]) -> list[TrialRecord]:
    """The trials that no other is at least as good as in every objective and better in one."""

    def worth(trial: TrialRecord) -> list[float]:
        return [one.sign * trial.metrics[one.metric] for one in objectives]

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    worths = {trial.number: worth(trial) for trial in trials}
    return [trial for trial in trials if not any(beats(one, worths[trial.number]) for one in worths.values())]
