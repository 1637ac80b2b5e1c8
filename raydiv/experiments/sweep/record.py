"""The directory of a sweep, and the record of its trials in sweep.json."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any, Self

import yaml

from raydiv.config import Recipe, save_recipe
from raydiv.config.sweep import SearchParameter, SweepConstraint, SweepObjective
from raydiv.experiments.sweep.space import Values
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import numbers
from raydiv.runs.output_directory import OutputDirectory
from raydiv.runs.resume import with_template_date
from raydiv.utils.errors import UserError
from raydiv.utils.storage import intact, read_json, write_json

FINISHED, STOPPED, FAILED, RUNNING, WAITING = "finished", "stopped", "failed", "running", "waiting"
"""The statuses of a trial; the scheduler has stopped a trial that is ``stopped``."""

STATUSES = (FINISHED, STOPPED, FAILED, RUNNING, WAITING)
"""In the order of tables."""

ENDED = (FINISHED, STOPPED, FAILED)


@dataclass(slots=True)
class TrialRecord:
    """A trial: its values, its status, and the last value of each of its metrics; ``kept``: its weights are there."""

    number: int
    values: Values
    status: str = WAITING
    metrics: dict[str, float] = field(default_factory=dict)
    feasible: bool = False
    error: str | None = None
    seconds: float | None = None
    steps: int = 0
    kept: bool = False

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """A trial of sweep.json. Raises KeyError, TypeError or ValueError where it is none."""
        if entry["status"] not in STATUSES:
            raise ValueError(f"unknown status {entry['status']!r}")
        fields = {name: entry[name] for name in cls.__dataclass_fields__ if name in entry}
        metrics = {str(name): float(value) for name, value in entry["metrics"].items()}
        return cls(**fields | {"number": int(entry["number"]), "values": dict(entry["values"]), "metrics": metrics})

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def run(self) -> str:
        """The path of its run in the sweep's directory."""
        return f"trials/{self.name}"

    def value(self, metric: str) -> float:
        """The metric's last value; NaN where it was not measured or is not finite."""
        value = self.metrics.get(metric, nan)
        return value if isfinite(value) else nan

    def cost(self, objective: SweepObjective) -> float:
        """Lower where the objective is better; infinite without a value."""
        value = self.value(objective.metric)
        return inf if isnan(value) else -objective.sign * value

    def satisfies(self, constraint: SweepConstraint) -> bool:
        # a comparison with NaN is false
        return constraint.violation(self.metrics.get(constraint.metric, nan)) <= 0


class SweepDirectory(OutputDirectory):
    """The directory of a sweep; its trials are runs under ``trials/``."""

    kind = "sweep"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.trials = path / "trials"

    def can_resume(self, recipe: Recipe, resume: bool) -> bool:
        """Whether this sweep has started here. Raises UserError if it may not be resumed or has another recipe."""
        started = self.has_started(resume=resume)
        if started:
            earlier = self.read_recipe()
            _require_same(earlier, with_template_date(recipe, earlier), self.path)
        return started

    def create(self, recipe: Recipe) -> None:
        """Make the directory, with the recipe in it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_recipe(recipe, self.recipe)

    def run(self, trial: TrialRecord) -> RunDirectory:
        return RunDirectory(self.path / trial.run)


MAY_CHANGE = {"sweep": ("trials", "keep", "max_concurrent"), "cluster": None, "track": None}
"""Keys of each section that a resumed sweep may change; None: every key of the section."""


def _require_same(before: Recipe, now: Recipe, path: Path) -> None:
    """Raise UserError for changes between two attempts that would make their trials incomparable."""
    old, new = (recipe.model_dump(mode="json", by_alias=True) for recipe in (before, now))
    for section, names in MAY_CHANGE.items():
        for tree in (old, new):
            for name in list(tree[section]) if names is None else names:
                tree[section].pop(name, None)
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(
            f"{path}: the sweep started with another {', '.join(changed)}; resume it with its recipe.yaml, or start a "
            "new sweep under another name"
        )


@dataclass(slots=True)
class SweepRecord:
    """The content of sweep.json: what is searched and for what, and the trials by number.

    ``recipe`` is YAML. ``mlflow`` is the address and the id of the sweep's MLflow run.
    """

    directory: SweepDirectory
    name: str
    goal: str
    objectives: Sequence[SweepObjective]
    constraints: Sequence[SweepConstraint]
    parameters: Sequence[SearchParameter]
    search: str
    scheduler: str
    recipe: str
    trials: dict[int, TrialRecord]
    mlflow: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, directory: SweepDirectory, recipe: Recipe, trials: Iterable[TrialRecord] = ()) -> Self:
        sweep = recipe.sweep
        assert sweep is not None
        return cls(
            directory,
            recipe.name,
            sweep.goal,
            sweep.objectives,
            sweep.constraints,
            sweep.parameters,
            sweep.search,
            sweep.scheduler,
            yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False),
            {trial.number: trial for trial in trials},
        )

    @classmethod
    def read(cls, directory: SweepDirectory, recipe: Recipe) -> Self:
        """The record of an earlier attempt; trials that had not ended are waiting again."""
        content = read_json(directory.record)
        with intact(directory.record):
            record = cls.of(directory, recipe, map(TrialRecord.from_json, content["trials"]))
            record.mlflow = None if content.get("mlflow") is None else dict(content["mlflow"])
        for trial in record.trials.values():
            # a run may have finished just before its sweep was killed
            if trial.status not in ENDED:
                trial.status = FINISHED if directory.run(trial).result.is_file() else WAITING
            if trial.status in ENDED:
                record.end_trial(trial, trial.status, trial.error)
        return record

    def use_full_names(self, names: Mapping[str, str]) -> None:
        """Replace metrics of objectives and constraints by their full names (see sweep/metric_names.py)."""
        self.objectives = [
            objective.model_copy(update={"metric": names[objective.metric]}) for objective in self.objectives
        ]
        self.constraints = [
            constraint.model_copy(update={"metric": names[constraint.metric]}) for constraint in self.constraints
        ]
        for trial in self.trials.values():
            trial.feasible = self._is_feasible(trial)

    def end_trial(self, trial: TrialRecord, status: str, error: str | None = None) -> None:
        """Set the status of a trial, and its metrics from its run."""
        run = self.directory.run(trial)
        trial.status, trial.error = status, error
        if run.metrics.path.exists():
            trial.metrics = numbers(run.metrics.trained_values())
            trial.steps = run.metrics.steps_taken()
        trial.feasible = self._is_feasible(trial)
        trial.kept = run.model.is_dir()

    def _is_feasible(self, trial: TrialRecord) -> bool:
        """Whether a trial has finished and satisfies every constraint."""
        return trial.status == FINISHED and all(map(trial.satisfies, self.constraints))

    @property
    def best(self) -> list[TrialRecord]:
        """The best feasible trial; with several objectives the Pareto front."""
        feasible = sorted(
            (trial for trial in self._measured() if trial.feasible),
            key=lambda trial: (trial.cost(self.objectives[0]), trial.number),
        )
        return undominated(feasible, self.objectives) if len(self.objectives) > 1 else feasible[:1]

    def by_number(self) -> list[TrialRecord]:
        return sorted(self.trials.values(), key=lambda trial: trial.number)

    def ranked(self) -> list[TrialRecord]:
        """All trials: finished ones first, of which the best, then the feasible ones, each by the first objective."""
        best = [trial.number for trial in self.best]

        def rank(trial: TrialRecord) -> tuple[bool, bool, float]:
            if trial.status != FINISHED:
                return False, False, 0.0
            return not trial.feasible, trial.number not in best, trial.cost(self.objectives[0])

        return sorted(
            self.trials.values(), key=lambda trial: (STATUSES.index(trial.status), *rank(trial), trial.number)
        )

    def finished(self, *metrics: str) -> list[TrialRecord]:
        """Finished trials that have a value of each of these metrics, by number."""
        return [
            trial
            for trial in self.by_number()
            if trial.status == FINISHED and all(isfinite(trial.value(metric)) for metric in metrics)
        ]

    def _measured(self) -> list[TrialRecord]:
        """Finished trials that have every objective."""
        return self.finished(*(objective.metric for objective in self.objectives))

    def remove_weights(self, keep: int) -> None:
        """Remove the checkpoints of ended trials, and the weights of all but the ``keep`` best finished ones."""
        measured = [trial.number for trial in self._measured()]
        kept = [trial.number for trial in self.ranked() if trial.number in measured][:keep]
        for trial in self.trials.values():
            if trial.status not in ENDED:
                continue
            run = self.directory.run(trial)
            # workers that are still stopping may add a file while the folder is removed; the next call removes it
            with suppress(OSError):
                run.remove_checkpoints()
            if trial.number not in kept:
                for folder in (run.model, run.ray):
                    shutil.rmtree(folder, ignore_errors=True)
                trial.kept = False

    def as_json(self) -> dict[str, Any]:
        """The content of sweep.json."""
        facts = {"mlflow": self.mlflow, "versions": self.versions, "seconds": self.seconds}
        return {
            "name": self.name,
            "goal": self.goal,
            "objectives": [
                {"metric": objective.metric, "direction": objective.direction} for objective in self.objectives
            ],
            "constraints": [
                {"metric": constraint.metric, "relation": constraint.relation, "bound": constraint.bound}
                for constraint in self.constraints
            ],
            "space": self.space,
            "search": self.search,
            "scheduler": self.scheduler,
            "best": [trial.number for trial in self.best],
            "trials": [{**asdict(trial), "run": trial.run} for trial in self.by_number()],
            "recipe": self.recipe,
            **{name: fact for name, fact in facts.items() if fact is not None},
        }

    @property
    def space(self) -> dict[str, Any]:
        """The searched keys and their values, as in the recipe."""
        return {parameter.key: parameter.as_yaml() for parameter in self.parameters}

    def write(self) -> None:
        write_json(self.directory.record, self.as_json(), indent=1)


def undominated(trials: Sequence[TrialRecord], objectives: Sequence[SweepObjective]) -> list[TrialRecord]:
    """The Pareto front: trials that no other is at least as good as in every objective and better in one."""
    costs = {trial.number: [trial.cost(objective) for objective in objectives] for trial in trials}

    def dominates(costs: list[float], others: list[float]) -> bool:
        return costs != others and all(cost <= other for cost, other in zip(costs, others, strict=True))

    return [trial for trial in trials if not any(dominates(other, costs[trial.number]) for other in costs.values())]
