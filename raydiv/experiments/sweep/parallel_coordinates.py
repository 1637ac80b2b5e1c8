"""Parallel coordinates of a sweep's trials; the axes lie one below another, so that many have room, on a phone too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.experiments.sweep.report_record import Aim, Parameter, Record, Trial, aims, finished, parameters, written
from raydiv.runs.report.drawing import INK, PAPER, RAMP, Picture, wrapped, new_axis

Array = NDArray[np.float64]

PITCH = 0.72
"""Inches from one axis to the next."""

LETTERS = 8.5
NAME_WIDTH = 18
TICKS_WIDTH = 42
"""Points; characters beside an axis in a line, and below its whole length."""

MOST_BELOW = 5
"""Categories whose names all stand below their axis; of more every second one stands above it."""

UNSET = -0.1
"""Where a line passes an axis whose parameter does not apply."""

ONE = {"linewidth": 1.0, "alpha": 0.7}
BEST = {"linewidth": 2.6, "zorder": 2.5}


@dataclass(frozen=True, slots=True)
class Rail:
    """An axis: where trials cross it, from 0 to 1, and what is written where."""

    name: str
    places: Array
    ticks: Sequence[tuple[float, str]]


def parallel(record: Record) -> Picture | None:
    """Every trial as a line down through its values to what it reached. Of one parameter it would say nothing new."""
    goals = aims(record)
    trials = finished(record, *goals)
    varied = [parameter for parameter in parameters(record) if parameter.varies(trials)]
    if len(varied) < 2:
        return None
    rails = [*(_of_parameter(one, trials) for one in varied), *(_of_aim(goal, trials) for goal in goals)]
    title = "from parameters to objectives"
    figure, axis = new_axis(title, "")
    figure.set_figheight(PITCH * (len(rails) + 1))
    _draw_lines(axis, record, trials, rails)
    for depth, rail in enumerate(rails):
        _draw_rail(axis, rail, depth)
    axis.set_yticks([-depth for depth in range(len(rails))], [rail.name for rail in rails], fontsize=LETTERS)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlim(UNSET - 0.03, 1.03)
    axis.set_ylim(0.5 - len(rails), 0.5)
    return Picture("parallel", title, figure, _caption(record, goals[0], rails))


def _caption(record: Record, first: Aim, rails: Sequence[Rail]) -> str:
    words = [f"A line is a finished trial. Amber: the best by {first.label}; violet: the worst; thick: chosen."]
    if record["constraints"]:
        words.append("Dotted: beyond a bound.")
    if any(np.isnan(rail.places).any() for rail in rails):
        words.append("A dash: the parameter does not apply.")
    return " ".join(words)


def _of_parameter(parameter: Parameter, trials: Sequence[Trial]) -> Rail:
    name = wrapped(parameter.name, NAME_WIDTH, 3)
    places = np.array([parameter.place(trial) for trial in trials])
    if not parameter.categories:
        return _of_numbers(name, places, _number, log=parameter.log)
    last = len(parameter.categories) - 1
    return Rail(name, places / last, [(place / last, words) for place, words in enumerate(parameter.categories)])


def _of_aim(aim: Aim, trials: Sequence[Trial]) -> Rail:
    name = f"{wrapped(aim.label, NAME_WIDTH, 3)}\n{aim.better}"
    return _of_numbers(name, np.array([aim.value(trial) for trial in trials]), aim.words)


def _of_numbers(name: str, values: Array, words: Callable[[float], str], log: bool = False) -> Rail:
    """From the least to the greatest of the values; in the middle where they are one."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        return Rail(name, np.full(len(values), 0.5), [(0.5, words(low))])
    shares = np.log(values / low) / np.log(high / low) if log else (values - low) / (high - low)
    return Rail(name, shares, [(0, words(low)), (1, words(high))])


def _number(value: float) -> str:
    return written(int(value) if value.is_integer() else value)


def _draw_lines(axis: Any, record: Record, trials: Sequence[Trial], rails: Sequence[Rail]) -> None:
    """The best last, above all others."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("ramp", RAMP)
    costs = np.array([aims(record)[0].cost(trial) for trial in trials])
    spread = np.ptp(costs) or 1.0
    depths = -np.arange(len(rails))
    for one in np.argsort(-costs, kind="stable"):
        places = [UNSET if np.isnan(rail.places[one]) else rail.places[one] for rail in rails]
        style = BEST if trials[one]["number"] in record["best"] else ONE
        dashes = "-" if trials[one]["feasible"] else ":"
        axis.plot(places, depths, color=colours((costs.max() - costs[one]) / spread), linestyle=dashes, **style)


def _draw_rail(axis: Any, rail: Rail, depth: int) -> None:
    axis.plot([0, 1], [-depth, -depth], color=INK, linewidth=0.8, zorder=1)
    spacing = max(len(rail.ticks) - 1, 1)
    stagger = len(rail.ticks) > MOST_BELOW
    # the outermost begin and end with the axis, and so reach as far as their neighbours' middles do twice over
    width = int(TICKS_WIDTH / (2 if spacing == 1 else 1.5 * spacing / (2 if stagger else 1)))
    for number, (place, words) in enumerate(rail.ticks):
        _write(axis, place, -depth, wrapped(words, max(width, 3), 2), above=stagger and number % 2 == 1)
    if np.isnan(rail.places).any():
        _write(axis, UNSET, -depth, "-", above=False)


def _write(axis: Any, place: float, height: float, words: str, above: bool) -> None:
    side = {0.0: "left", 1.0: "right"}.get(place, "center")
    axis.plot(place, height, marker="|", markersize=5, color=INK, markeredgewidth=0.8)
    axis.annotate(
        words,
        (place, height),
        xytext=(0, 5 if above else -5),
        textcoords="offset points",
        horizontalalignment=side,
        verticalalignment="bottom" if above else "top",
        fontsize=LETTERS,
        linespacing=1.0,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
    )
