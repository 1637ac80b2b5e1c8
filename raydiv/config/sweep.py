"""The section ``sweep``: the keys that are searched, the search, and its objectives and constraints."""

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
    """A range of numbers, by Ray Tune's names; ``randint`` and ``lograndint`` exclude the upper end."""

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
"""The kinds of intervals, and how many numbers each takes."""

Choices = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SearchParameter:
    """A dotted key of the recipe and its values; it has one only where the parameters in ``when`` have theirs."""

    key: str
    values: Interval | Choices
    when: Mapping[str, Choices]

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        return all(key in chosen and chosen[key] in choices for key, choices in self.when.items())

    def as_yaml(self) -> Any:
        """The parameter as a recipe has it."""
        values = str(self.values) if isinstance(self.values, Interval) else list(self.values)
        return {"in": values, "when": {key: list(own) for key, own in self.when.items()}} if self.when else values


class SweepObjective(Section):
    """A metric that is maximized or minimized."""

    metric: str
    direction: Literal["maximize", "minimize"]

    @property
    def sign(self) -> int:
        """The metric times its sign is higher where it is better."""
        return 1 if self.direction == "maximize" else -1

    def __str__(self) -> str:
        return f"{self.direction} {self.metric}"


class SweepConstraint(Section):
    """An upper or a lower bound of a metric, ``max`` or ``min``."""

    metric: str
    max: float | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> SweepConstraint:
        if (self.max is None) == (self.min is None):
            raise ValueError(f"{self.metric}: needs either max or min")
        return self

    @property
    def relation(self) -> Literal["<=", ">="]:
        return ">=" if self.max is None else "<="

    @property
    def bound(self) -> float:
        (bound,) = (bound for bound in (self.max, self.min) if bound is not None)
        return bound

    def violation(self, value: float) -> float:
        """By how much the value breaks the bound; 0 or less where it does not."""
        return value - self.bound if self.relation == "<=" else self.bound - value

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.bound:g}"


NO_POPULATION = (
    "population-based training is not supported: a trial that takes over another trial's weights under other values "
    "cannot be repeated from a recipe, and rewards under different beta are not comparable; "
    "scheduler: asha stops trials early"
)

EXPERIMENT_KEYS = ("name", "output_dir", "extends", "track", "cluster", "sweep", "study")
"""Keys and sections of the sweep or study as a whole, which its trials or cells cannot change."""


class SweepConfig(Section):
    """A search over values of the recipe's keys by Ray Tune; each trial is a run."""

    space: dict[str, Any] = Field(
        min_length=1,
        description="dotted keys, each with a list of choices, uniform(a, b), loguniform(a, b), quniform(a, b, step), "
        "randint(a, b) or lograndint(a, b); {in: VALUES, when: {KEY: CHOICES}} where it depends on another key",
    )
    objectives: list[SweepObjective] = Field(
        min_length=1,
        description="metrics to optimize, each {metric: METRIC, direction: maximize | minimize}; "
        "several give a Pareto front",
    )
    constraints: list[SweepConstraint] = Field(
        default=[], description="bounds of metrics that the best trial keeps, each {metric: METRIC, max: X} or min"
    )
    search: Literal["grid", "random", "tpe"] = Field(
        default="tpe",
        description="every combination of the lists, random draws, or Optuna's tree-structured Parzen estimator",
    )
    trials: PositiveInt | None = Field(default=None, description="number of trials of random and tpe")
    scheduler: Literal["none", "asha"] = Field(default="none", description="asha stops trials that fall behind")
    stop_on: SweepObjective | None = Field(
        default=None,
        description="asha: metric by which it compares trials while they train, and direction; default: the objective",
    )
    grace: PositiveInt | None = Field(default=None, description="asha: updates that every trial makes (default: 10)")
    reduction: int | None = Field(
        default=None, ge=2, description="asha: one in so many trials continues at each of its rungs (default: 3)"
    )
    max_concurrent: PositiveInt | None = Field(
        default=None, description="most trials at once; default and upper limit: what the cluster has room for"
    )
    keep: NonNegativeInt = Field(default=1, description="best trials that keep their weights; others keep metrics only")

    @property
    def parameters(self) -> list[SearchParameter]:
        return [_parameter(key, text) for key, text in self.space.items()]

    @property
    def asha_objective(self) -> SweepObjective:
        """The objective by which asha compares trials."""
        return self.stop_on or self.objectives[0]

    @property
    def goal(self) -> str:
        """Objectives and constraints in one line."""
        bounds = " and ".join(map(str, self.constraints))
        return ", ".join(map(str, self.objectives)) + (f" subject to {bounds}" if bounds else "")

    @model_validator(mode="before")
    @classmethod
    def _without_goal(cls, section: Any) -> Any:
        """Replace the key ``goal`` of older recipes by objectives and constraints."""
        if not isinstance(section, dict) or "goal" not in section:
            return section
        structured = sorted({"objectives", "constraints"} & section.keys())
        if structured:
            raise ValueError(
                f"goal and {structured[0]} are both set: goal is the older form; keep objectives and constraints"
            )
        return {key: value for key, value in section.items() if key != "goal"} | _parse_goal(str(section["goal"]))

    @field_validator("stop_on", mode="before")
    @classmethod
    def _structured_stop_on(cls, stop_on: Any) -> Any:
        return _parse_objective(stop_on) if isinstance(stop_on, str) else stop_on

    @field_validator("scheduler", mode="before")
    @classmethod
    def _no_population(cls, value: Any) -> Any:
        if value in ("pbt", "pb2"):
            raise ValueError(NO_POPULATION)
        return value

    @field_validator("space")
    @classmethod
    def _valid_space(cls, space: dict[str, Any]) -> dict[str, Any]:
        parameters = [_parameter(key, text) for key, text in space.items()]
        for number, parameter in enumerate(parameters):
            earlier = {other.key: other for other in parameters[:number]}
            for key in parameter.when:
                _require_choices(parameter, key, earlier.get(key))
        return space

    @field_serializer("space")
    def _space_as_yaml(self, space: dict[str, Any]) -> dict[str, Any]:
        return {parameter.key: parameter.as_yaml() for parameter in self.parameters}

    @field_validator("objectives")
    @classmethod
    def _distinct_metrics(cls, objectives: list[SweepObjective]) -> list[SweepObjective]:
        metrics = [objective.metric for objective in objectives]
        for metric in metrics:
            if metrics.count(metric) > 1:
                raise ValueError(f"{metric} occurs twice")
        return objectives

    @model_validator(mode="after")
    def _trials_fit_search(self) -> SweepConfig:
        if self.search == "grid":
            intervals = [parameter for parameter in self.parameters if isinstance(parameter.values, Interval)]
            if intervals:
                raise ValueError(f"search: grid needs lists; {intervals[0].key} is {intervals[0].values}")
            if self.trials is not None:
                raise ValueError("trials does not apply to search: grid, which tries every combination")
        elif self.trials is None:
            raise ValueError(f"search: {self.search} needs trials, the number of them")
        return self

    @model_validator(mode="after")
    def _asha_options(self) -> SweepConfig:
        if self.scheduler == "none":
            for name in ("stop_on", "grace", "reduction"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs scheduler: asha")
        elif self.stop_on is None and len(self.objectives) > 1:
            raise ValueError("scheduler: asha compares trials by one metric; with several objectives set stop_on")
        return self


def _require_choices(parameter: SearchParameter, key: str, other: SearchParameter | None) -> None:
    """Raise ValueError where the condition on the parameter ``other`` of this key is invalid or can never hold."""
    where = f"{parameter.key}: when: {key}"
    if other is None:
        raise ValueError(f"{where} must be a key of the space, above {parameter.key}")
    if isinstance(other.values, Interval):
        raise ValueError(f"{where} must be a list of choices in the space, found {other.values}")
    for value in parameter.when[key]:
        if value not in other.values:
            raise ValueError(f"{where} is never {value!r}: the space has {', '.join(map(repr, other.values))}")


def _parameter(key: str, text: Any) -> SearchParameter:
    """The parameter of an entry of the space. Raises ValueError where the entry is invalid."""
    if key.split(".")[0] in EXPERIMENT_KEYS:
        raise ValueError(f"{key}: cannot be searched; it is the same for all trials of a sweep")
    if isinstance(text, Mapping):
        if text.keys() != {"in", "when"} or not isinstance(text["when"], Mapping) or not text["when"]:
            raise ValueError(f"{key}: a parameter that depends on others is {{in: VALUES, when: {{KEY: CHOICES}}}}")
        when = {name: _choices(own if isinstance(own, list) else [own]) for name, own in text["when"].items()}
        return SearchParameter(key, _values(key, text["in"]), when)
    return SearchParameter(key, _values(key, text), {})


def _values(key: str, text: Any) -> Interval | Choices:
    if isinstance(text, list):
        if not text:
            raise ValueError(f"{key}: the list of choices is empty")
        choices = _choices(text)
        duplicates = [choice for choice in choices if choices.count(choice) > 1]
        if duplicates:
            raise ValueError(f"{key}: duplicate choice {duplicates[0]!r}")
        return choices
    call = re.fullmatch(r"\s*([a-z]+)\s*\(([^()]*)\)\s*", text) if isinstance(text, str) else None
    if call is None or call[1] not in KINDS:
        raise ValueError(f"{key}: must be a list of choices or one of {', '.join(KINDS)} with its ends, found {text!r}")
    return _interval(key, call[1], call[2])


def _choices(values: list[Any]) -> Choices:
    """The values; YAML reads 1e-3 as text, since it has no point: it becomes a number here."""
    exponent = re.compile(r"[-+]?\d+[eE][-+]?\d+")
    return tuple(float(value) if isinstance(value, str) and exponent.fullmatch(value) else value for value in values)


def _interval(key: str, kind: str, arguments: str) -> Interval:
    try:
        numbers = [float(word) for word in arguments.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != KINDS[kind] or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{key}: {kind} takes {KINDS[kind]} numbers, found ({arguments})")
    interval = Interval(kind, *numbers)
    low, high = interval.ends
    if not low < high:
        raise ValueError(f"{key}: {kind}({arguments}) is empty: its lower end must be below its upper end")
    if interval.log and low <= 0:
        raise ValueError(f"{key}: {kind} needs ends above 0, found {low:g}")
    if interval.integer and not all(number.is_integer() for number in numbers):
        raise ValueError(f"{key}: {kind} takes whole numbers, found ({arguments})")
    if interval.step is not None and not 0 < interval.step <= high - low:
        raise ValueError(f"{key}: {kind} takes a step between 0 and {high - low:g}, found {interval.step:g}")
    return interval


METRIC = r"[\w./:-]+"


def _parse_goal(goal: str) -> dict[str, Any]:
    """Objectives and constraints of the older form ``maximize A, minimize B subject to C <= X and D >= Y``."""
    objectives, _, constraints = goal.strip().partition(" subject to ")
    bounds = re.split(r",| and ", constraints) if constraints else []
    return {
        "objectives": [_parse_objective(text) for text in objectives.split(",")],
        "constraints": [_parse_constraint(text) for text in bounds],
    }


def _parse_objective(text: str) -> dict[str, str]:
    match = re.fullmatch(rf"\s*(maximi|minimi)[sz]e\s+({METRIC})\s*", text)
    if match is None:
        raise ValueError(
            f"{text.strip()!r} is not an objective; write {{metric: METRIC, direction: maximize}} or minimize"
        )
    return {"metric": match[2], "direction": f"{match[1]}ze"}


def _parse_constraint(text: str) -> dict[str, str]:
    match = re.fullmatch(rf"\s*({METRIC})\s*(<=|>=)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise ValueError(f"{text.strip()!r} is not a constraint; write {{metric: METRIC, max: X}} or min")
    return {"metric": match[1], "max" if match[2] == "<=" else "min": match[3]}
