"""The pictures of a sweep, a function each; None instead of a picture with nothing to compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.config.sweep import Interval, SearchParameter, SweepObjective
from raydiv.experiments.sweep import labels
from raydiv.experiments.sweep.parallel_coordinates import parallel_coordinates
from raydiv.experiments.sweep.record import SweepRecord, TrialRecord, undominated
from raydiv.runs.report.drawing import (
    AMBER,
    BLUE,
    GREY,
    INK,
    TEAL,
    Picture,
    legend,
    new_axis,
    shortened,
    styled,
    wrapped,
)

Array = NDArray[np.float64]

FEASIBLE = {"s": 22, "linewidth": 1, "alpha": 0.8, "color": BLUE}
INFEASIBLE = {"s": 22, "linewidth": 1, "facecolors": "none", "edgecolors": GREY}
BEST = {"s": 120, "linewidth": 0, "marker": "*", "color": AMBER, "zorder": 3}

LABEL_WIDTH = 32
"""Characters of a line of a vertical label."""

TICKS_WIDTH = 54
"""Characters below an axis, of all categories together."""

MOST_HORIZONTAL = 8
"""Categories whose names are written horizontally."""

VERTICAL_LENGTH = 18
VERTICAL_HEIGHT = 0.7
"""Characters of a vertical name, and inches by which the figure grows for it."""

JITTER = 0.5
"""As a share of the distance between two categories."""

GOLDEN_RATIO = 0.618034
"""The fractional parts of its multiples are spread evenly, and successive ones lie far apart."""


def sweep_pictures(record: SweepRecord) -> dict[str, list[Picture]]:
    """The pictures of the page's sections ``trade-off`` and ``parameters``."""
    with styled():
        single = [
            by_parameter(record, objective, parameter)
            for objective in record.objectives
            for parameter in record.parameters
        ]
        pictures = {"trade-off": pareto_fronts(record), "parameters": [*single, parallel_coordinates(record)]}
    return {section: [picture for picture in drawn if picture] for section, drawn in pictures.items()}


def by_parameter(record: SweepRecord, objective: SweepObjective, parameter: SearchParameter) -> Picture | None:
    """The objective of each finished trial against a parameter."""
    metric, key = objective.metric, parameter.key
    trials = [trial for trial in record.finished(metric) if key in trial.values]
    if not labels.varies(parameter, trials):
        return None
    figure, axis = new_axis(labels.label(metric), key)
    axis.set_ylabel(labels.direction(objective))
    _format_ticks(axis.yaxis, metric)
    positions = np.array([labels.position(parameter, trial) for trial in trials])
    values = np.array([trial.value(metric) for trial in trials])
    if isinstance(parameter.values, Interval):
        _scale_axis(axis, parameter.values, positions, values[0])
        caption = "Each finished trial, over the range of the space. If the best lie at an end, try a wider range."
    else:
        _name_categories(figure, axis, labels.categories(parameter))
        positions += [_jitter(trial) for trial in trials]
        caption = (
            "Each finished trial. Choices that differ by less than the trials of one choice are not distinguishable."
        )
    _scatter(axis, record, trials, positions, values)
    legend(figure, axis)
    return Picture(_file_name(metric, "by", key), f"{labels.label(metric)} by {key}", figure, caption)


def _file_name(*words: str) -> str:
    """The name of a picture, for its file and its ids in the page."""
    return "-".join(re.sub(r"[^\w.-]", "-", word) for word in words)


def _format_ticks(side: Any, metric: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if labels.is_share(metric):
        side.set_major_formatter(PercentFormatter(1))


def _scale_axis(axis: Any, interval: Interval, positions: Array, height: float) -> None:
    """Show the whole interval; an axis of whole numbers has no ticks at fractions."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min([*interval.ends, *positions]), max([*interval.ends, *positions])
    if interval.log:
        steps = (1.0, 2.0, 5.0) if high <= 100 * low else (1.0,)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=steps))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif all(place == round(place) for place in positions):
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.update_datalim([(low, height), (high, height)])


def _name_categories(figure: Any, axis: Any, names: Sequence[str]) -> None:
    """Write the names below the axis, vertically if there are many."""
    horizontal = len(names) <= MOST_HORIZONTAL
    width = TICKS_WIDTH // len(names)
    words = [wrapped(name, width, 2) if horizontal else shortened(name, VERTICAL_LENGTH) for name in names]
    axis.set_xticks(range(len(names)), words, rotation=0 if horizontal else 90)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.grid(visible=False, axis="x")
    if not horizontal:
        figure.set_figheight(figure.get_figheight() + VERTICAL_HEIGHT)


def _jitter(trial: TrialRecord) -> float:
    """The same for a trial in all pictures."""
    return JITTER * (trial.number * GOLDEN_RATIO % 1 - 0.5)


def _scatter(axis: Any, record: SweepRecord, trials: Sequence[TrialRecord], x: Array, y: Array) -> None:
    """Draw infeasible trials hollow and the best as stars."""
    numbers = [trial.number for trial in record.best]
    best = np.isin([trial.number for trial in trials], numbers)
    feasible = np.array([trial.feasible for trial in trials])
    groups = [
        (feasible & ~best, FEASIBLE, "within the bounds" if record.constraints else "finished trial"),
        (~feasible & ~best, INFEASIBLE, "beyond a bound"),
        (best, BEST, f"best: trial {numbers[0]}" if len(numbers) == 1 else f"best: {len(numbers)} trials"),
    ]
    for members, style, name in groups:
        if members.any():
            axis.scatter(x[members], y[members], label=name, **style)


def pareto_fronts(record: SweepRecord) -> list[Picture | None]:
    """The first objective against the second; a single one against the metric of each constraint."""
    first, *others = record.objectives
    across = others[:1] or [labels.as_objective(constraint) for constraint in record.constraints]
    return [pareto_front(record, objective, first) for objective in across if objective.metric != first.metric]


def pareto_front(record: SweepRecord, across: SweepObjective, up: SweepObjective) -> Picture | None:
    """All finished trials, and a line through those that no other is better than in both metrics."""
    metrics = (across.metric, up.metric)
    trials = record.finished(*metrics)
    if len(trials) < 2:
        return None
    figure, axis = new_axis("Pareto front", f"{labels.label(across.metric)}\n{labels.direction(across)}")
    axis.set_ylabel(f"{wrapped(labels.label(up.metric), LABEL_WIDTH, 2)}\n{labels.direction(up)}")
    for side, metric in zip((axis.xaxis, axis.yaxis), metrics, strict=True):
        _format_ticks(side, metric)
    others = [constraint for constraint in record.constraints if constraint.metric not in metrics]
    allowed = [trial for trial in trials if all(map(trial.satisfies, others))]
    _draw_front(axis, undominated(allowed, [across, up]), across, up)
    x, y = (np.array([trial.value(metric) for trial in trials]) for metric in metrics)
    _scatter(axis, record, trials, x, y)
    _draw_bounds(axis, record, *metrics)
    legend(figure, axis)
    return Picture(
        _file_name("front", up.metric, across.metric),
        f"{labels.label(up.metric)} against {labels.label(across.metric)}",
        figure,
        "All finished trials. On the line, one metric improves only at the cost of the other.",
    )


def _draw_front(axis: Any, front: Sequence[TrialRecord], across: SweepObjective, up: SweepObjective) -> None:
    """Draw steps between the points of the front: each step has the value of the point on its worse side."""
    if len(front) < 2:
        return
    points = sorted((trial.value(across.metric), trial.value(up.metric)) for trial in front)
    where = "pre" if across.sign > 0 else "post"
    axis.step(
        *zip(*points, strict=True), where=where, color=TEAL, linewidth=1.4, label="none better in both", zorder=1.5
    )


def _draw_bounds(axis: Any, record: SweepRecord, x_metric: str, y_metric: str) -> None:
    style: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (1, 2))}
    for constraint in record.constraints:
        name = f"bound: {labels.bound(constraint)}"
        if constraint.metric == x_metric:
            axis.axvline(constraint.bound, label=name, **style)
        elif constraint.metric == y_metric:
            axis.axhline(constraint.bound, label=name, **style)
