"""The section ``sweep``: which keys are searched, how, and for what."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_serializer, field_validator, model_validator

from raydiv.config.section import Section


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers between two ends, by the names that Ray Tune has: of ``randint`` and ``lograndint`` the upper end is left out."""

    kind: str
    low: float
    high: float
    step: float | None = None

    @property
    def log(self) -> bool:
        return self.kind.startswith("log")

    @property
    def integer(self) -> bool:
        return self.kind.endswith("randint")

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest value."""
        return (int(self.low), int(self.high) - 1) if self.integer else (self.low, self.high)

    def __str__(self) -> str:
        numbers = [number for number in (self.low, self.high, self.step) if number is not None]
        return f"{self.kind}({', '.join(str(int(n)) if n.is_integer() else repr(n) for n in numbers)})"


KINDS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2, "lograndint": 2}
"""Intervals, and how many numbers each is said with."""

Choices = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SearchParameter:
    """A dotted key of the recipe, its values, and what other parameters must be for it to have one (nothing: always)."""

    key: str
    values: Interval | Choices
    when: Mapping[str, Choices]

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        return all(key in chosen and chosen[key] in values for key, values in self.when.items())

    def written(self) -> Any:
        """As a recipe has it."""
        values = str(self.values) if isinstance(self.values, Interval) else list(self.values)
        return {"in": values, "when": {key: list(own) for key, own in self.when.items()}} if self.when else values


@dataclass(frozen=True, slots=True)
class SweepObjective:
    """A metric that is to be large, or small."""

    metric: str
    direction: Literal["maximize", "minimize"]

    @property
    def sign(self) -> int:
        """What the metric is multiplied with to be better where it is larger."""
        return 1 if self.direction == "maximize" else -1


@dataclass(frozen=True, slots=True)
class SweepConstraint:
    """A bound that a metric must keep."""

    metric: str
    relation: Literal["<=", ">="]
    bound: float

    def violation(self, value: float) -> float:
        """By how much the value breaks the bound; 0 or less where it does not."""
        return value - self.bound if self.relation == "<=" else self.bound - value


NO_POPULATION = (
    "population-based training is not offered: a trial that takes over another's weights and goes on with other values is no "
    "recipe that runs again, and its rewards under one beta do not compare with those under another; asha stops trials early"
)

EXPERIMENT_KEYS = ("name", "output_dir", "extends", "track", "cluster", "sweep", "study")
"""Keys and sections that are a sweep's own, and no trial's."""


class SweepConfig(Section):
    """A search over values of the recipe's keys by Ray Tune; each trial is a run."""

    space: dict[str, Any] = Field(
        min_length=1,
        description="dotted keys, each with a list of choices, uniform(a, b), loguniform(a, b), quniform(a, b, step), "
        "randint(a, b) or lograndint(a, b); {in: VALUES, when: {KEY: CHOICES}} where it depends on another key",
    )
    goal: str = Field(
        description="maximize METRIC, minimize METRIC, several with commas; subject to METRIC <= X and METRIC >= Y"
    )
    search: Literal["grid", "random", "tpe"] = Field(
        default="tpe", description="every combination of the lists, draws, or Optuna's tree-structured Parzen estimator"
    )
    trials: PositiveInt | None = Field(default=None, description="how many, for random and tpe")
    scheduler: Literal["none", "asha"] = Field(default="none", description="asha stops trials that fall behind")
    stop_on: str | None = Field(
        default=None,
        description="asha: what trials are compared by while they train, maximize METRIC; by default the goal",
    )
    grace: PositiveInt | None = Field(default=None, description="asha: updates that every trial makes (default: 10)")
    reduction: int | None = Field(
        default=None, ge=2, description="asha: one in so many goes on at each of its steps (default: 3)"
    )
    max_concurrent: PositiveInt | None = Field(
        default=None, description="most trials at once; by default, and never more than, what the cluster has room for"
    )
    keep: NonNegativeInt = Field(default=1, description="best trials that keep their weights; others keep metrics only")

    @property
    def parameters(self) -> list[SearchParameter]:
        return [_parameter(key, said) for key, said in self.space.items()]

    @property
    def objectives(self) -> list[SweepObjective]:
        return _goal(self.goal)[0]

    @property
    def compared(self) -> SweepObjective:
        """What asha compares trials by."""
        return self.objectives[0] if self.stop_on is None else _objective(self.stop_on)

    @property
    def constraints(self) -> list[SweepConstraint]:
        return _goal(self.goal)[1]

    @field_validator("scheduler", mode="before")
    @classmethod
    def _no_population(cls, value: Any) -> Any:
        if value in ("pbt", "pb2"):
            raise ValueError(NO_POPULATION)
        return value

    @field_validator("space")
    @classmethod
    def _is_a_space(cls, space: dict[str, Any]) -> dict[str, Any]:
        parameters = [_parameter(key, said) for key, said in space.items()]
        for number, parameter in enumerate(parameters):
            before = {one.key: one for one in parameters[:number]}
            for key in parameter.when:
                _require_choices(parameter, key, before.get(key))
        return space

    @field_serializer("space")
    def _as_written(self, space: dict[str, Any]) -> dict[str, Any]:
        return {parameter.key: parameter.written() for parameter in self.parameters}

    @field_validator("goal")
    @classmethod
    def _is_a_goal(cls, goal: str) -> str:
        _goal(goal)
        return goal

    @field_validator("stop_on")
    @classmethod
    def _is_an_objective(cls, stop_on: str | None) -> str | None:
        if stop_on is not None:
            _objective(stop_on)
        return stop_on

    @model_validator(mode="after")
    def _as_many_as_there_are(self) -> SweepConfig:
        if self.search == "grid":
            drawn = [one for one in self.parameters if isinstance(one.values, Interval)]
            if drawn:
                raise ValueError(f"search: grid needs lists; {drawn[0].key} is {drawn[0].values}")
            if self.trials is not None:
                raise ValueError("trials means nothing with search: grid, which tries every combination")
        elif self.trials is None:
            raise ValueError(f"search: {self.search} needs trials, the number of them")
        return self

    @model_validator(mode="after")
    def _asha_has_its_own(self) -> SweepConfig:
        if self.scheduler == "none":
            for name in ("stop_on", "grace", "reduction"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} means nothing without scheduler: asha")
        elif self.stop_on is None and len(self.objectives) > 1:
            raise ValueError(
                "scheduler: asha compares trials by one metric; with several objectives say which, as stop_on"
            )
        return self


def _require_choices(parameter: SearchParameter, key: str, other: SearchParameter | None) -> None:
    """Raises ValueError where a parameter would never apply, or not as it is said."""
    where = f"{parameter.key}: when: {key}"
    if other is None:
        raise ValueError(f"{where} must stand in the space too, and before it")
    if isinstance(other.values, Interval):
        raise ValueError(f"{where} must be a list of choices in the space, and is {other.values}")
    for value in parameter.when[key]:
        if value not in other.values:
            raise ValueError(f"{where} is never {value!r}: the space has {', '.join(map(repr, other.values))}")


def _parameter(key: str, said: Any) -> SearchParameter:
    """A parameter as it is written. Raises ValueError where it says nothing to search."""
    if key.split(".")[0] in EXPERIMENT_KEYS:
        raise ValueError(f"{key}: is the same for all trials of a sweep")
    if isinstance(said, Mapping):
        if said.keys() != {"in", "when"} or not isinstance(said["when"], Mapping) or not said["when"]:
            raise ValueError(f"{key}: a parameter that depends on others is {{in: VALUES, when: {{KEY: CHOICES}}}}")
        when = {name: _choices(own if isinstance(own, list) else [own]) for name, own in said["when"].items()}
        return SearchParameter(key, _values(key, said["in"]), when)
    return SearchParameter(key, _values(key, said), {})


def _values(key: str, said: Any) -> Interval | Choices:
    if isinstance(said, list):
        if not said:
            raise ValueError(f"{key}: an empty list has nothing to choose from")
        choices = _choices(said)
        if any(choices.count(one) > 1 for one in choices):
            raise ValueError(f"{key}: a choice is there twice")
        return choices
    found = re.fullmatch(r"\s*([a-z]+)\s*\(([^()]*)\)\s*", said) if isinstance(said, str) else None
    if found is None or found[1] not in KINDS:
        raise ValueError(f"{key}: must be a list of choices or one of {', '.join(KINDS)} with its ends, found {said!r}")
    return _interval(key, found[1], found[2])


def _choices(said: list[Any]) -> Choices:
    """YAML takes 1e-3 for a text, since it has no point: here it is the number that is meant."""
    exponent = re.compile(r"[-+]?\d+[eE][-+]?\d+")
    return tuple(float(one) if isinstance(one, str) and exponent.fullmatch(one) else one for one in said)


def _interval(key: str, kind: str, inside: str) -> Interval:
    try:
        numbers = [float(word) for word in inside.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != KINDS[kind] or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{key}: {kind} takes {KINDS[kind]} numbers, found ({inside})")
    interval = Interval(kind, *numbers)
    low, high = interval.ends
    if not low < high:
        raise ValueError(f"{key}: {kind}({inside}) has nothing between its ends")
    if interval.log and low <= 0:
        raise ValueError(f"{key}: {kind} needs ends above 0, found {low:g}")
    if interval.integer and not all(number.is_integer() for number in numbers):
        raise ValueError(f"{key}: {kind} takes whole numbers, found ({inside})")
    if interval.step is not None and not 0 < interval.step <= high - low:
        raise ValueError(f"{key}: {kind} takes a step between 0 and {high - low:g}, found {interval.step:g}")
    return interval


METRIC = r"[\w./:-]+"
EXAMPLE = "maximize separation/d_b subject to evaluate/over_refusal <= 0.1"


def _goal(words: str) -> tuple[list[SweepObjective], list[SweepConstraint]]:
    """The objectives and constraints of a goal. Raises ValueError for what is none."""
    wanted, _, bounds = words.strip().partition(" subject to ")
    objectives = [_objective(part) for part in wanted.split(",")]
    constraints = [_constraint(part) for part in re.split(r",| and ", bounds)] if bounds else []
    named = [one.metric for one in objectives]
    if len(set(named)) < len(named):
        raise ValueError(f"an objective is there twice in {words!r}")
    return objectives, constraints


def _objective(words: str) -> SweepObjective:
    found = re.fullmatch(rf"\s*(maximi[sz]e|minimi[sz]e)\s+({METRIC})\s*", words)
    if found is None:
        raise ValueError(f"{words.strip()!r} is neither maximize METRIC nor minimize METRIC (such as: {EXAMPLE})")
    return SweepObjective(found[2], "maximize" if found[1].startswith("max") else "minimize")


def _constraint(words: str) -> SweepConstraint:
    found = re.fullmatch(rf"\s*({METRIC})\s*(<=|>=)\s*([-+.\deE]+)\s*", words)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound):
        raise ValueError(f"{words.strip()!r} is no bound such as METRIC <= 0.1 (such as: {EXAMPLE})")
    return SweepConstraint(found[1], "<=" if found[2] == "<=" else ">=", bound)
