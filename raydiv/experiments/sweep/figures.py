"""The pictures of a sweep, a function each; one that would show nothing is None."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.experiments.sweep.parallel_coordinates import parallel
from raydiv.experiments.sweep.report_record import (
    Aim,
    Parameter,
    Record,
    Trial,
    aims,
    constraints,
    finished,
    parameters,
)
from raydiv.runs.report.drawing import (
    AMBER,
    BLUE,
    GREY,
    INK,
    TEAL,
    Picture,
    wrapped,
    legend,
    new_axis,
    shortened,
    styled,
)

Array = NDArray[np.float64]

WITHIN = {"s": 22, "linewidth": 1, "alpha": 0.8, "color": BLUE}
BEYOND = {"s": 22, "linewidth": 1, "facecolors": "none", "edgecolors": GREY}
BEST = {"s": 120, "linewidth": 0, "marker": "*", "color": AMBER, "zorder": 3}

LABEL_WIDTH = 32
"""Characters of a vertical label in a line."""

TICKS_WIDTH = 54
"""Characters below an axis, all categories together."""

MOST_BESIDE = 8
"""Categories whose names stand side by side."""

TURNED_LENGTH = 18
TURNED_HEIGHT = 0.7
"""Of names that stand upright: characters, and inches that the figure grows by."""

JITTER = 0.5
"""Of the distance between two categories."""

GOLDEN = 0.618034
"""Its multiples, less their whole parts, lie evenly, and neighbours far apart."""


def sweep_pictures(record: Record) -> dict[str, list[Picture]]:
    """By section of the page: trade-off, parameters."""
    with styled():
        single = [by_parameter(record, aim, one) for aim in aims(record) for one in parameters(record)]
        drawn = {"trade-off": fronts(record), "parameters": [*single, parallel(record)]}
    return {section: [picture for picture in found if picture] for section, found in drawn.items()}


def by_parameter(record: Record, aim: Aim, parameter: Parameter) -> Picture | None:
    """What trials reached over the values they were given."""
    trials = [trial for trial in finished(record, aim) if not math.isnan(parameter.place(trial))]
    if not parameter.varies(trials):
        return None
    figure, axis = new_axis(aim.label, parameter.key)
    axis.set_ylabel(aim.better)
    _as_measured(axis.yaxis, aim)
    places = np.array([parameter.place(trial) for trial in trials])
    reached = np.array([aim.value(trial) for trial in trials])
    if parameter.categories:
        _categories(figure, axis, parameter.categories)
        places += [_jitter(trial) for trial in trials]
    else:
        _numbers(axis, parameter, places, reached[0])
    _dots(axis, record, trials, places, reached)
    legend(figure, axis)
    return Picture(
        _name(aim.metric, "by", parameter.key), f"{aim.label} by {parameter.key}", figure, _caption(parameter)
    )


def _caption(parameter: Parameter) -> str:
    if parameter.categories:
        return "Each finished trial. Values that differ by less than their own trials do are not told apart."
    return "Each finished trial, over the range of the space. Where the best lie at an end, a wider range may hold better ones."


def _name(*words: str) -> str:
    """Of a file, and of the ids of a picture in the page."""
    return "-".join(re.sub(r"[^\w.-]", "-", word) for word in words)


def _as_measured(axis: Any, aim: Aim) -> None:
    """Rates are in percent."""
    from matplotlib.ticker import PercentFormatter

    if aim.percent:
        axis.set_major_formatter(PercentFormatter(1))


def _numbers(axis: Any, parameter: Parameter, places: Array, height: float) -> None:
    """The whole range of the space; whole numbers have no fractions between them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min([*parameter.ends, *places]), max([*parameter.ends, *places])
    if parameter.log:
        steps = (1.0, 2.0, 5.0) if high <= 100 * low else (1.0,)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=steps))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif all(place == round(place) for place in places):
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.update_datalim([(low, height), (high, height)])


def _categories(figure: Any, axis: Any, categories: Sequence[str]) -> None:
    """Names side by side while each has room, else upright."""
    beside = len(categories) <= MOST_BESIDE
    width = TICKS_WIDTH // len(categories)
    words = [wrapped(name, width, 2) if beside else shortened(name, TURNED_LENGTH) for name in categories]
    axis.set_xticks(range(len(categories)), words, rotation=0 if beside else 90)
    axis.set_xlim(-0.6, len(categories) - 0.4)
    axis.grid(visible=False, axis="x")
    if not beside:
        figure.set_figheight(figure.get_figheight() + TURNED_HEIGHT)


def _jitter(trial: Trial) -> float:
    """The same for a trial in all pictures."""
    number: int = trial["number"]
    return JITTER * (number * GOLDEN % 1 - 0.5)


def _dots(axis: Any, record: Record, trials: Sequence[Trial], across: Array, up: Array) -> None:
    """Hollow: beyond a bound; a star: the best."""
    best = np.isin([trial["number"] for trial in trials], record["best"])
    within = np.array([bool(trial["feasible"]) for trial in trials])
    groups = [
        (within & ~best, WITHIN, "within the bounds" if record["constraints"] else "finished trial"),
        (~within & ~best, BEYOND, "beyond a bound"),
        (best, BEST, _best_words(record["best"])),
    ]
    for own, style, label in groups:
        if own.any():
            axis.scatter(across[own], up[own], label=label, **style)


def _best_words(numbers: Sequence[int]) -> str:
    return f"best: trial {numbers[0]}" if len(numbers) == 1 else f"best: {len(numbers)} trials"


def fronts(record: Record) -> list[Picture | None]:
    """The first objective over the second; of one alone, over what each constraint holds."""
    first, *others = aims(record)
    if others:
        return [front(record, others[0], first)]
    return [front(record, constraint, first) for constraint in constraints(record) if constraint.metric != first.metric]


def front(record: Record, across: Aim, up: Aim) -> Picture | None:
    """All finished trials, and a line through those that none is better than in both."""
    trials = finished(record, across, up)
    if len(trials) < 2:
        return None
    title = f"{up.label} against {across.label}"
    figure, axis = new_axis("Pareto front", f"{across.label}\n{across.better}")
    axis.set_ylabel(f"{wrapped(up.label, LABEL_WIDTH, 2)}\n{up.better}")
    for side, aim in ((axis.xaxis, across), (axis.yaxis, up)):
        _as_measured(side, aim)
    points = np.array([[across.value(trial), up.value(trial)] for trial in trials])
    _front_line(axis, points[undominated_trials(record, trials, across, up)], across)
    _dots(axis, record, trials, *points.T)
    _bounds(axis, record, across, up)
    legend(figure, axis)
    caption = "All finished trials. On the line, neither figure can be had better but at the other's cost."
    return Picture(_name("front", up.metric, across.metric), title, figure, caption)


def undominated_trials(record: Record, trials: Sequence[Trial], *pair: Aim) -> NDArray[np.bool_]:
    """Which trials [n] no other is better than in both, of those that keep the bounds on all other metrics."""
    rules = [rule for rule in constraints(record) if rule.metric not in {aim.metric for aim in pair}]
    allowed = np.array([all(rule.holds(trial) for rule in rules) for trial in trials])
    costs = np.array([[aim.cost(trial) for aim in pair] for trial in trials])
    costs[~allowed] = math.inf
    return np.asarray(undominated(costs) & allowed)


def undominated(costs: Array) -> NDArray[np.bool_]:
    """Rows [n] of ``costs`` [n, k] such that no other is as low in every column and lower in one."""
    no_worse = (costs[:, None] <= costs).all(-1)
    lower = (costs[:, None] < costs).any(-1)
    return np.asarray(~(no_worse & lower).any(0))


def _front_line(axis: Any, points: Array, across: Aim) -> None:
    """Steps along what can be had: from one point to the next it is what the point on the worse side of it has."""
    if len(points) < 2:
        return
    points = points[np.argsort(points[:, 0])]
    where = "pre" if across.higher else "post"
    axis.step(*points.T, where=where, color=TEAL, linewidth=1.4, label="none better in both", zorder=1.5)


def _bounds(axis: Any, record: Record, across: Aim, up: Aim) -> None:
    for rule in constraints(record):
        style: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (1, 2))}
        label = f"bound: {rule.bound_words}"
        if rule.metric == across.metric:
            axis.axvline(rule.bound, label=label, **style)
        elif rule.metric == up.metric:
            axis.axhline(rule.bound, label=label, **style)
