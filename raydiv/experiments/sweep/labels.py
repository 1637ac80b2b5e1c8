"""Labels, numbers and positions in the table, the page and the pictures of a sweep."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from raydiv.config.sweep import Interval, SearchParameter, SweepConstraint, SweepObjective
from raydiv.experiments.sweep.record import SweepRecord, TrialRecord
from raydiv.runs.metric_registry import SHARE, spec_of


def label(metric: str) -> str:
    return spec_of(metric).full_label


def is_share(metric: str) -> bool:
    """Whether the metric is shown as a percentage."""
    return spec_of(metric).unit == SHARE


def direction(objective: SweepObjective) -> str:
    return f"{'higher' if objective.sign > 0 else 'lower'} is better"


def bound(constraint: SweepConstraint) -> str:
    number = f"{100 * constraint.bound:g}%" if is_share(constraint.metric) else f"{constraint.bound:g}"
    return f"{constraint.relation} {number}"


def metric_text(metric: str, value: float) -> str:
    """The value with more digits than in a run's table, since trials differ by little; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1%}" if is_share(metric) else f"{value:.4g}"


def value_text(value: Any) -> str:
    """A parameter's value as YAML has it; fractions have four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def parameter_names(parameters: Sequence[SearchParameter]) -> list[str]:
    """The last word of each key; the whole key where two keys have the same last word."""
    last = [parameter.key.rpartition(".")[2] for parameter in parameters]
    counts = Counter(last)
    return [name if counts[name] == 1 else parameter.key for name, parameter in zip(last, parameters, strict=True)]


def categories(parameter: SearchParameter) -> list[str]:
    """The choices of a parameter; empty for an interval."""
    return [] if isinstance(parameter.values, Interval) else list(map(value_text, parameter.values))


def position(parameter: SearchParameter, trial: TrialRecord) -> float:
    """The trial's value on the parameter's axis, the index of a choice; NaN where the parameter does not apply."""
    if parameter.key not in trial.values:
        return math.nan
    value = trial.values[parameter.key]
    return float(value if isinstance(parameter.values, Interval) else parameter.values.index(value))


def varies(parameter: SearchParameter, trials: Iterable[TrialRecord]) -> bool:
    return len({place for trial in trials if not math.isnan(place := position(parameter, trial))}) > 1


def as_objective(constraint: SweepConstraint) -> SweepObjective:
    """The constraint's metric, better away from its bound."""
    return SweepObjective(metric=constraint.metric, direction="minimize" if constraint.relation == "<=" else "maximize")


def measures(record: SweepRecord) -> list[SweepObjective]:
    """Objectives, then the metrics of constraints, each metric once."""
    unique: dict[str, SweepObjective] = {}
    for objective in (*record.objectives, *map(as_objective, record.constraints)):
        unique.setdefault(objective.metric, objective)
    return list(unique.values())
