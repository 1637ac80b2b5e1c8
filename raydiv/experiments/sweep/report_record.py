"""The record of a sweep as its report reads it: its parameters, what it measures, and its trials, best first."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydiv.runs.metric_registry import SHARE, spec_of

Record = Mapping[str, Any]
Trial = Mapping[str, Any]

STATUSES = ("finished", "stopped", "failed", "running", "waiting")
"""In the order of the table."""

_RANGE = re.compile(r"q?(log)?(?:uniform|randint)\(([^,)]+),([^,)]+)")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key of the space, what it is called for short, and the axis its values lie on.

    ``ends`` are the least and the greatest value that the space allows, where it says so; a parameter that has no numbers to
    lie by has ``categories``, evenly spaced.
    """

    key: str
    name: str
    log: bool
    ends: tuple[float, ...]
    categories: tuple[str, ...]

    def place(self, trial: Trial) -> float:
        """Where the trial lies on the axis; NaN where the parameter does not apply to it."""
        if self.key not in trial["values"]:
            return math.nan
        value = trial["values"][self.key]
        return float(self.categories.index(written(value)) if self.categories else value)

    def varies(self, trials: Sequence[Trial]) -> bool:
        return len({place for trial in trials if not math.isnan(place := self.place(trial))}) > 1


@dataclass(frozen=True, slots=True)
class Aim:
    """A metric, and which way it is better."""

    metric: str
    higher: bool

    @property
    def label(self) -> str:
        return spec_of(self.metric).full_label

    @property
    def better(self) -> str:
        return f"{'higher' if self.higher else 'lower'} is better"

    @property
    def percent(self) -> bool:
        return spec_of(self.metric).unit == SHARE

    def value(self, trial: Trial) -> float:
        """What the trial reached; NaN where that was not measured, or is not finite."""
        value = trial["metrics"].get(self.metric)
        return math.nan if value is None or not math.isfinite(value) else float(value)

    def cost(self, trial: Trial) -> float:
        """What less of is better; infinite where there is no value."""
        value = self.value(trial)
        return math.inf if math.isnan(value) else -value if self.higher else value

    def words(self, value: float) -> str:
        """To more digits than a run's table has, since trials differ by little."""
        return "-" if math.isnan(value) else f"{value:.1%}" if self.percent else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Constraint(Aim):
    """A metric that must not be beyond its bound."""

    bound: float

    @property
    def relation(self) -> str:
        return ">=" if self.higher else "<="

    @property
    def bound_words(self) -> str:
        return f"{self.relation} {f'{100 * self.bound:g}%' if self.percent else f'{self.bound:g}'}"

    def holds(self, trial: Trial) -> bool:
        value = self.value(trial)
        return value >= self.bound if self.higher else value <= self.bound


def parameters(record: Record) -> list[Parameter]:
    """The keys of the space in its order, by their last words, where these are not those of another."""
    last = Counter(key.rpartition(".")[2] for key in record["space"])
    names = {key: name if last[name := key.rpartition(".")[2]] == 1 else key for key in record["space"]}
    return [_parameter(key, names[key], space, record["trials"]) for key, space in record["space"].items()]


def _parameter(key: str, name: str, space: Any, trials: Sequence[Trial]) -> Parameter:
    drawn_from = space["in"] if isinstance(space, Mapping) else space
    values = [trial["values"][key] for trial in trials if key in trial["values"]]
    chosen = isinstance(drawn_from, list)
    if chosen or not all(type(value) in (int, float) for value in values):
        known = [*(drawn_from if chosen else []), *values]
        return Parameter(key, name, False, (), tuple(dict.fromkeys(map(written, known))))
    found = _RANGE.match(str(drawn_from))
    log, ends = (bool(found[1]), (float(found[2]), float(found[3]))) if found else (False, ())
    return Parameter(key, name, log, ends, ())


def aims(record: Record) -> list[Aim]:
    return [Aim(goal["metric"], goal["direction"] == "maximize") for goal in record["objectives"]]


def constraints(record: Record) -> list[Constraint]:
    return [Constraint(rule["metric"], rule["relation"] == ">=", rule["bound"]) for rule in record["constraints"]]


def measures(record: Record) -> list[Aim]:
    """Objectives, then the constraints on other metrics, each metric once."""
    found: dict[str, Aim] = {}
    for aim in [*aims(record), *constraints(record)]:
        found.setdefault(aim.metric, aim)
    return list(found.values())


def finished(record: Record, *measured: Aim) -> list[Trial]:
    """Trials that came to their end and have a figure for each of these."""
    done = [trial for trial in record["trials"] if trial["status"] == "finished"]
    return [trial for trial in done if not any(math.isnan(aim.value(trial)) for aim in measured)]


def in_order(record: Record) -> list[Trial]:
    """All trials: the best, others within the bounds, those beyond one, each by the first objective; then the unfinished."""
    first, best = aims(record)[0], record["best"]
    rank = {
        trial["number"]: (not trial["feasible"], trial["number"] not in best, first.cost(trial))
        for trial in finished(record)
    }
    unranked = (False, False, 0.0)
    return sorted(
        record["trials"],
        key=lambda trial: (
            STATUSES.index(trial["status"]),
            rank.get(trial["number"], unranked),
            trial["number"],
        ),
    )


def written(value: Any) -> str:
    """A value as YAML has it, fractions to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
