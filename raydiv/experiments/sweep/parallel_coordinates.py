"""Parallel coordinates of a sweep's trials. The axes are horizontal, one below another, so that many fit on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.config.sweep import Interval, SearchParameter, SweepObjective
from raydiv.experiments.sweep import labels
from raydiv.experiments.sweep.record import SweepRecord, TrialRecord
from raydiv.runs.report.drawing import INK, PAPER, RAMP, Picture, new_axis, wrapped

Array = NDArray[np.float64]

ROW_HEIGHT = 0.72
"""Inches from one axis to the next."""

FONT_SIZE = 8.5
NAME_WIDTH = 18
TICKS_WIDTH = 42
"""Characters of a line beside an axis, and of all ticks below it."""

MOST_BELOW = 5
"""Categories that are all named below their axis; of more, every second is named above it."""

UNSET = -0.1
"""Where a line passes an axis whose parameter does not apply."""

LINE = {"linewidth": 1.0, "alpha": 0.7}
BEST_LINE = {"linewidth": 2.6, "zorder": 2.5}


@dataclass(frozen=True, slots=True)
class Rail:
    """An axis: its name, the position of each trial from 0 to 1, and its ticks (position, text)."""

    name: str
    positions: Array
    ticks: Sequence[tuple[float, str]]


def parallel_coordinates(record: SweepRecord) -> Picture | None:
    """Each finished trial as a line through its values and its objectives; None with fewer than two parameters."""
    trials = record.finished(*(objective.metric for objective in record.objectives))
    names = labels.parameter_names(record.parameters)
    varied = [named for named in zip(names, record.parameters, strict=True) if labels.varies(named[1], trials)]
    if len(varied) < 2:
        return None
    rails = [
        *(_parameter_rail(name, parameter, trials) for name, parameter in varied),
        *(_objective_rail(objective, trials) for objective in record.objectives),
    ]
    title = "from parameters to objectives"
    figure, axis = new_axis(title, "")
    figure.set_figheight(ROW_HEIGHT * (len(rails) + 1))
    _draw_trials(axis, record, trials, rails)
    for row, rail in enumerate(rails):
        _draw_rail(axis, rail, row)
    axis.set_yticks([-row for row in range(len(rails))], [rail.name for rail in rails], fontsize=FONT_SIZE)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlim(UNSET - 0.03, 1.03)
    axis.set_ylim(0.5 - len(rails), 0.5)
    return Picture("parallel", title, figure, _caption(record, rails))


def _caption(record: SweepRecord, rails: Sequence[Rail]) -> str:
    metric = labels.label(record.objectives[0].metric)
    sentences = [f"Each line is a finished trial. Amber: the best by {metric}; violet: the worst; thick: chosen."]
    if record.constraints:
        sentences.append("Dotted: beyond a bound.")
    if any(np.isnan(rail.positions).any() for rail in rails):
        sentences.append("A dash: the parameter does not apply.")
    return " ".join(sentences)


def _parameter_rail(name: str, parameter: SearchParameter, trials: Sequence[TrialRecord]) -> Rail:
    name = wrapped(name, NAME_WIDTH, 3)
    positions = np.array([labels.position(parameter, trial) for trial in trials])
    if isinstance(parameter.values, Interval):
        return _number_rail(name, positions, _number, log=parameter.values.log)
    texts = labels.categories(parameter)
    last = len(texts) - 1
    return Rail(name, positions / last, [(index / last, text) for index, text in enumerate(texts)])


def _objective_rail(objective: SweepObjective, trials: Sequence[TrialRecord]) -> Rail:
    metric = objective.metric
    name = f"{wrapped(labels.label(metric), NAME_WIDTH, 3)}\n{labels.direction(objective)}"
    return _number_rail(
        name, np.array([trial.value(metric) for trial in trials]), lambda value: labels.metric_text(metric, value)
    )


def _number_rail(name: str, values: Array, text: Callable[[float], str], log: bool = False) -> Rail:
    """An axis from the least to the greatest value; equal values are in its middle."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        return Rail(name, np.full(len(values), 0.5), [(0.5, text(low))])
    positions = np.log(values / low) / np.log(high / low) if log else (values - low) / (high - low)
    return Rail(name, positions, [(0, text(low)), (1, text(high))])


def _number(value: float) -> str:
    return labels.value_text(int(value) if value.is_integer() else value)


def _draw_trials(axis: Any, record: SweepRecord, trials: Sequence[TrialRecord], rails: Sequence[Rail]) -> None:
    """Draw the best trial last, above all others."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("ramp", RAMP)
    best = [trial.number for trial in record.best]
    costs = np.array([trial.cost(record.objectives[0]) for trial in trials])
    spread = np.ptp(costs) or 1.0
    rows = -np.arange(len(rails))
    for index in np.argsort(-costs, kind="stable"):
        trial = trials[index]
        positions = [UNSET if np.isnan(rail.positions[index]) else rail.positions[index] for rail in rails]
        colour = ramp((costs.max() - costs[index]) / spread)
        style = BEST_LINE if trial.number in best else LINE
        axis.plot(positions, rows, color=colour, linestyle="-" if trial.feasible else ":", **style)


def _draw_rail(axis: Any, rail: Rail, row: int) -> None:
    axis.plot([0, 1], [-row, -row], color=INK, linewidth=0.8, zorder=1)
    spacing = max(len(rail.ticks) - 1, 1)
    stagger = len(rail.ticks) > MOST_BELOW
    # the first and the last text end with the axis, so between two texts the room is that of one and a half
    width = int(TICKS_WIDTH / (2 if spacing == 1 else 1.5 * spacing / (2 if stagger else 1)))
    for number, (place, text) in enumerate(rail.ticks):
        _draw_tick(axis, place, -row, wrapped(text, max(width, 3), 2), above=stagger and number % 2 == 1)
    if np.isnan(rail.positions).any():
        _draw_tick(axis, UNSET, -row, "-", above=False)


def _draw_tick(axis: Any, place: float, height: float, text: str, above: bool) -> None:
    side = {0.0: "left", 1.0: "right"}.get(place, "center")
    axis.plot(place, height, marker="|", markersize=5, color=INK, markeredgewidth=0.8)
    axis.annotate(
        text,
        (place, height),
        xytext=(0, 5 if above else -5),
        textcoords="offset points",
        horizontalalignment=side,
        verticalalignment="bottom" if above else "top",
        fontsize=FONT_SIZE,
        linespacing=1.0,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
    )
