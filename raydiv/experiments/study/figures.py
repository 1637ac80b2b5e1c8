"""The pictures of a study: attack success against separation, both of them loss by loss, and by depth of a prefill."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from raydiv.experiments.study.cells import NO_DATA, Cell, grouped_cells, trained_cells
from raydiv.experiments.study.measures import ASR, BROKEN, D_B, Measure, is_broken
from raydiv.experiments.study.regression import LOG, ClaimTest, CorrelationEstimate, Scale, SlopeEstimate, scale_of
from raydiv.experiments.study.table_io import slug
from raydiv.runs.report.drawing import AMBER, BLUE, GREY, INK, PAPER, RED, TEAL, Picture, legend, new_axis, styled

COLOURS = (BLUE, RED, AMBER, TEAL, "#8d62c9", GREY)
MARKERS = "os^DvPX*p<>h"
FILLS = ("full", "bottom", "left", "top", "right")
"""What models, losses or data are drawn with, in turn; with more of them than entries the first entry is used again."""

HOLLOW = f"Hollow: more than {BROKEN:.0%} degenerate answers."

DEPTH_METRIC = rf"{ASR.metric}/prefill@(\d+)"

FIT_POINTS = 50

ROW_HEIGHT = 0.19
"""Inches for each loss of a dot plot."""


def claim_pictures(claims: Sequence[ClaimTest]) -> list[Picture]:
    """A scatter plot of each test that has cells."""
    with styled():
        return [scatter(claim, f"claim-{number}") for number, claim in enumerate(claims, start=1) if claim.points]


def cell_pictures(cells: Sequence[Cell]) -> list[Picture]:
    """Dot plots of D_B and of attack success, and each model's attack success by depth, where measured."""
    models = dict.fromkeys(cell.model for cell in cells)
    with styled():
        pictures = [dots(cells, measure) for measure in (D_B, ASR)]
        pictures += [by_depth([cell for cell in cells if cell.model == model]) for model in models]
        return [picture for picture in pictures if picture]


def scatter(claim: ClaimTest, name: str) -> Picture:
    """Attack success against a measure of separation or depth, on a log axis where the regression is on the logarithm.

    Models have colours, losses markers, and kinds of data fills; broken models are hollow. Lines are the fit: one
    slope, an intercept for each model and data.
    """
    scale = scale_of(claim.separation)
    title = f"{claim.asr.label} and {claim.separation.label}"
    figure, axis = new_axis(textwrap.fill(title, 40), claim.separation.label)
    figure.set_figheight(3.9)
    axis.set_ylabel(claim.asr.label)
    if scale is LOG:
        _log(axis)
    _percent(axis.yaxis)
    colours = _assigned(COLOURS, (point.model for point in claim.points))
    markers = _assigned(MARKERS, (point.loss for point in claim.points))
    fills = _assigned(FILLS, (point.data for point in claim.points))
    style = {"linestyle": "none", "markersize": 5.5, "markeredgewidth": 0.8, "markerfacecoloralt": PAPER}
    for point in claim.points:
        fill = "none" if point.broken else fills[point.data]
        style_of_point = {"color": colours[point.model], "marker": markers[point.loss], "fillstyle": fill}
        axis.plot(point.separation, point.asr, **style, **style_of_point)
    if claim.slope is not None:
        for model, data, intercept in claim.slope.intercepts:
            values = [point.separation for point in claim.points if (point.model, point.data) == (model, data)]
            line = np.linspace(min(values), max(values), FIT_POINTS)
            axis.plot(
                line, intercept + claim.slope.value * scale.of(line), color=colours[model], linewidth=1, alpha=0.6
            )
    for model, colour in colours.items():
        axis.plot([], [], color=colour, linewidth=2.5, label=model)
    for loss, marker in markers.items():
        axis.plot([], [], color=INK, marker=marker, label=loss, **style)
    for data, fill in fills.items():
        axis.plot([], [], color=INK, marker="o", fillstyle=fill, label=data, **style)
    legend(figure, axis)
    return Picture(f"{name}-{slug(title)}", title, figure, _claim_caption(claim))


def _claim_caption(claim: ClaimTest) -> str:
    """The number of cells, and the estimates or why there are none."""
    models = len({point.model for point in claim.points})
    cells = f"{len(claim.points)} cells, models: {models}."
    if claim.slope is None or claim.correlation is None:
        return f"{cells} {claim.notes[-1].capitalize()}."
    estimates = _estimates(claim.slope, claim.correlation, scale_of(claim.separation))
    hollow = f" {HOLLOW}" if any(point.broken for point in claim.points) else ""
    return f"{cells} Lines: one slope, an intercept for each model and data. {estimates}{hollow}"


def _estimates(slope: SlopeEstimate, correlation: CorrelationEstimate, scale: Scale) -> str:
    step = "when the measure grows by a factor of e" if scale is LOG else "per standard deviation between the classes"
    ends = " to ".join(f"{100 * end:+.1f}" for end in slope.interval or ())
    r_ends = " to ".join(f"{end:.2f}" for end in correlation.interval or ())
    return (
        f"Change of attack success {step}: {100 * slope.value:+.1f} percentage points"
        + (f" (95% interval {ends})" if ends else "")
        + f", p {slope.p:.2g}; correlation {correlation.value:.2f}"
        + (f" ({r_ends})." if r_ends else ".")
    )


def dots(cells: Sequence[Cell], measure: Measure) -> Picture | None:
    """A row for each model and loss: a marker for each kind of data, seeds faint and their mean over them.

    Returns None if no cell has a value.
    """
    groups = {key: group for key, group in grouped_cells(cells).items() if measure.mean(group) is not None}
    if not groups:
        return None
    figure, axis = new_axis(f"{measure.label} by loss", measure.label)
    heights = _row_heights([(model, loss) for model, _, loss in groups])
    colours = _assigned(COLOURS, (cell.model for cell in cells))
    markers = _assigned(MARKERS, (cell.data for cell in trained_cells(cells)))
    offsets = dict(zip(markers, np.linspace(-0.15, 0.15, max(2, len(markers))).tolist(), strict=False))
    for (model, data, loss), group in groups.items():
        height = heights[model, loss] + offsets.get(data, 0.0)
        style = {"color": colours[model], "linestyle": "none", "marker": markers.get(data, "x")}
        if len(group) > 1:
            values = [value for cell in group if (value := measure.value_in(cell)) is not None]
            axis.plot(values, [height] * len(values), markersize=3, alpha=0.4, **style)
        fill = "none" if is_broken(group) else "full"
        axis.plot(measure.mean(group), height, markersize=5, fillstyle=fill, **style)
    for data, marker in {**markers, **({NO_DATA: "x"} if any(cell.is_base for cell in cells) else {})}.items():
        label = "untrained" if data == NO_DATA else data
        axis.plot([], [], color=INK, linestyle="none", marker=marker, markersize=5, label=label)
    _label_rows(axis, heights)
    if measure is not D_B:
        _percent(axis.xaxis)
    elif all(value > 0 for cell in cells if (value := measure.value_in(cell)) is not None):
        _log(axis)
    figure.set_figheight(1.2 + ROW_HEIGHT * (max(heights.values()) + 1))
    legend(figure, axis)
    caption = f"{measure.label} of each loss, model by model. Several seeds: each faint, and their mean. {HOLLOW}"
    return Picture(f"{slug(measure.label)}-by-loss", f"{measure.label} by loss", figure, caption)


def by_depth(cells: Sequence[Cell]) -> Picture | None:
    """Attack success of one model's cells, means over seeds, by how many tokens of an unsafe answer are given.

    Returns None where fewer than two depths were measured.
    """
    names = {name for cell in cells for name in cell.metrics}
    depths = sorted(int(found[1]) for name in names if (found := re.fullmatch(DEPTH_METRIC, name)))
    if len(depths) < 2:
        return None
    columns = [ASR, *(Measure.of_metric(f"{ASR.metric}/prefill@{depth}") for depth in depths)]
    model = cells[0].model
    title = f"attack success by depth, {model}"
    figure, axis = new_axis(title, "tokens of an unsafe answer that are given")
    colours = _assigned(COLOURS, (cell.data for cell in trained_cells(cells)))
    markers = _assigned(MARKERS, (cell.loss for cell in trained_cells(cells)))
    for (_, data, loss), group in grouped_cells(cells).items():
        values = [measure.mean(group) for measure in columns]
        points = [(place, value) for place, value in enumerate(values) if value is not None]
        label = "untrained" if data == NO_DATA else f"{data}, {loss}"
        style = {"color": colours.get(data, INK), "marker": markers.get(loss, "x"), "linewidth": 1.2, "markersize": 5}
        axis.plot(*zip(*points, strict=True), label=label, fillstyle="none" if is_broken(group) else "full", **style)
    axis.set_xticks(range(len(columns)), ["none", *map(str, depths)])
    axis.set_ylim(-0.03, 1.03)
    _percent(axis.yaxis)
    legend(figure, axis)
    caption = (
        "Share of harmful prompts with an unsafe answer: asked directly, and after the first tokens of an answer of "
        f"the untrained model that the judge called unsafe (of the prompts that have one). {HOLLOW}"
    )
    return Picture(slug(title), title, figure, caption)


def _row_heights(rows: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The height of each row (model, loss); the row above a model's first is free for its name."""
    heights: dict[tuple[str, str], float] = {}
    height, previous = 0.0, None
    for model, loss in dict.fromkeys(rows):
        height += 1 if model == previous else 2
        heights[model, loss], previous = height, model
    return heights


def _label_rows(axis: Any, heights: dict[tuple[str, str], float]) -> None:
    """Losses as ticks, and each model's name above its rows."""
    axis.set_yticks(list(heights.values()), [loss for _, loss in heights])
    axis.set_ylim(max(heights.values()) + 0.7, 0.3)
    first_rows: dict[str, float] = {}
    for (model, _), height in heights.items():
        first_rows.setdefault(model, height)
    for model, height in first_rows.items():
        axis.text(0, height - 1, model, transform=axis.get_yaxis_transform(), weight="bold", va="center", fontsize=8.5)


def _log(axis: Any) -> None:
    """A logarithmic horizontal axis with plain numbers: 0.1, 0.2, 0.5, 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _percent(direction: Any) -> None:
    """Shares in percent."""
    from matplotlib.ticker import PercentFormatter

    direction.set_major_formatter(PercentFormatter(1, decimals=None))


def _assigned(styles: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """One of the styles for each distinct name."""
    return dict(zip(dict.fromkeys(names), cycle(styles), strict=False))
