"""The pictures of a study: attack success against separation, and each of them loss by loss."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from raydiv.experiments.study.cells import NO_DATA, Cell, in_order, trained_cells
from raydiv.experiments.study.measures import ASR, BROKEN, D_B, Measure, is_broken
from raydiv.experiments.study.regression import ClaimTest, CorrelationEstimate, Point, SlopeEstimate
from raydiv.experiments.study.table_io import slug
from raydiv.runs.report.drawing import AMBER, BLUE, GREY, INK, RED, TEAL, Picture, legend, new_axis, styled

COLOURS = (BLUE, RED, AMBER, TEAL, "#8d62c9", GREY)
"""Of models, in turn."""

MARKERS = "os^DvP"
"""Of kinds of data, in turn."""

LABEL_SIZE = 6.5
"""Points, of a loss's name beside its cell."""

HOLLOW = f"Hollow: more than {BROKEN:.0%} degenerate answers."

ROW = 0.19
"""Inches of a loss in a dot plot."""


def claim_pictures(claims: Sequence[ClaimTest]) -> list[Picture]:
    """A scatter for each claim that has cells."""
    with styled():
        return [scatter(claim, f"claim-{number}") for number, claim in enumerate(claims, start=1) if claim.points]


def cell_pictures(cells: Sequence[Cell]) -> list[Picture]:
    """D_B and attack success of every cell, where measured."""
    with styled():
        return [picture for measure in (D_B, ASR) if (picture := dots(cells, measure))]


def scatter(claim: ClaimTest, name: str) -> Picture:
    """Attack success against D_B on a log axis: a colour for each model, a marker for each kind of data, a name for each loss.

    Lines are the fit: one slope, an intercept for each model. Broken models are hollow.
    """
    title = f"{claim.asr.label} and {claim.separation.label}"
    figure, axis = new_axis(textwrap.fill(title, 40), claim.separation.label)
    figure.set_figheight(3.9)
    axis.set_ylabel(claim.asr.label)
    _log(axis)
    _percent(axis.yaxis)
    colours, markers = _colours(one.model for one in claim.points), _markers(one.data for one in claim.points)
    for point in claim.points:
        colour = colours[point.model]
        fill = "none" if point.broken else colour
        axis.plot(
            point.d_b, point.asr, markers[point.data], markersize=4.5, markeredgecolor=colour, markerfacecolor=fill
        )
    for model, colour in colours.items():
        own = [point.d_b for point in claim.points if point.model == model]
        if claim.slope:
            ends = np.array([min(own), max(own)])
            fitted = claim.slope.intercepts[model] + claim.slope.value * np.log(ends)
            axis.plot(ends, fitted, color=colour, linewidth=1, alpha=0.6)
        axis.plot([], [], "-", color=colour, linewidth=2.5, label=model)
    for data, marker in markers.items():
        axis.plot([], [], marker, color=INK, markersize=4.5, label=data)
    legend(figure, axis)
    _name_losses(figure, axis, claim.points)
    return Picture(f"{name}-{slug(title)}", title, figure, _in_words(claim))


def _in_words(claim: ClaimTest) -> str:
    """What the fit says, or that there is none."""
    models = len({point.model for point in claim.points})
    cells = f"{len(claim.points)} cells, models: {models}."
    if claim.slope is None or claim.correlation is None:
        return f"{cells} {claim.notes[-1].capitalize()}."
    hollow = f" {HOLLOW}" if any(one.broken for one in claim.points) else ""
    return (
        f"{cells} Lines: one slope, an intercept for each model. {_estimates(claim.slope, claim.correlation)}{hollow}"
    )


def _estimates(slope: SlopeEstimate, correlation: CorrelationEstimate) -> str:
    points, (low, high) = 100 * slope.value, (100 * end for end in slope.interval)
    r, (least, most) = correlation.value, correlation.interval
    return (
        f"For each factor e of D_B {points:+.1f} percentage points (95% {low:+.1f} to {high:+.1f}); "
        f"correlation {r:.2f} ({least:.2f} to {most:.2f})."
    )


def _name_losses(figure: Any, axis: Any, points: Sequence[Point]) -> None:
    """The loss's name once for each model, data and loss, at its cells' middle, on the side where it covers least."""
    figure.draw_without_rendering()  # the layout is made when it is drawn, and pixels are known only then
    pixel = figure.dpi / 72
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.model, point.data, point.loss), []).append(point)
    dots = axis.transData.transform([(point.d_b, point.asr) for point in points])
    covered = [_Box(x - 3 * pixel, y - 3 * pixel, 6 * pixel, 6 * pixel) for x, y in dots]
    whole = axis.get_window_extent()
    inside = _Box(whole.x0, whole.y0, whole.width, whole.height)
    for (_, _, loss), own in groups.items():
        middle = (math.exp(np.mean([math.log(point.d_b) for point in own])), float(np.mean([p.asr for p in own])))
        x, y = axis.transData.transform(middle)
        width, height = 0.58 * LABEL_SIZE * len(loss) * pixel, LABEL_SIZE * pixel
        box = min(_sides(x, y, width, height, 5 * pixel), key=lambda one: _cost(one, covered, inside))
        covered.append(box)
        at = ((box.x - x) / pixel, (box.y - y) / pixel)
        axis.annotate(loss, middle, xytext=at, textcoords="offset points", fontsize=LABEL_SIZE, alpha=0.85)


class _Box(NamedTuple):
    """A rectangle in pixels, by its lower left corner."""

    x: float
    y: float
    width: float
    height: float

    def shared(self, other: _Box) -> float:
        """The area that both cover."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, width) * max(0.0, height)


def _sides(x: float, y: float, width: float, height: float, gap: float) -> Iterator[_Box]:
    """Places for a label around a dot: right of it, left, above, below, and aslant."""
    across, along = (x + gap, x - gap - width, x - width / 2), (y - height / 2, y + gap, y - gap - height)
    order = ((0, 0), (1, 0), (2, 1), (2, 2), (0, 1), (0, 2), (1, 1), (1, 2))
    return (_Box(across[one], along[other], width, height) for one, other in order)


def _cost(box: _Box, covered: Sequence[_Box], inside: _Box) -> float:
    """What a label would cover, and how much of it would leave the axis."""
    return sum(map(box.shared, covered)) + box.width * box.height - box.shared(inside)


def dots(cells: Sequence[Cell], measure: Measure) -> Picture | None:
    """A row for each model and loss with its kinds of data side by side, seeds faint and their mean over them."""
    groups = [(key, own) for key, own in in_order(cells).items() if measure.mean(own) is not None]
    if not groups:
        return None
    figure, axis = new_axis(f"{measure.label} by loss", measure.label)
    rows = list(dict.fromkeys((model, loss) for (model, _, loss), _ in groups))
    places = _places(rows)
    colours, markers = _colours(cell.model for cell in cells), _markers(cell.data for cell in trained_cells(cells))
    for (model, data, loss), own in groups:
        marker, aside = (markers[data], _aside(data, list(markers))) if data != NO_DATA else ("x", 0.0)
        height = places[model, loss] + aside
        style = {"color": colours[model], "linestyle": "none", "marker": marker}
        if len(own) > 1:
            values = [value for cell in own if (value := measure.of(cell)) is not None]
            axis.plot(values, [height] * len(values), markersize=3, alpha=0.4, **style)
        hollow = {"markerfacecolor": "none"} if is_broken(own) else {}
        axis.plot(measure.mean(own), height, markersize=5, **style, **hollow)
    for data, marker in markers.items():
        axis.plot([], [], marker, color=INK, markersize=5, label=data)
    if any(cell.is_base for cell in cells):
        axis.plot([], [], "x", color=INK, markersize=5, label="as it comes")
    _name_rows(axis, places)
    if measure is not D_B:
        _percent(axis.xaxis)
    elif all(value > 0 for cell in cells if (value := measure.of(cell)) is not None):
        _log(axis)
    figure.set_figheight(1.2 + ROW * (max(places.values()) + 1))
    legend(figure, axis)
    caption = f"{measure.label} of each loss, model by model; several seeds: each faint, and their mean. {HOLLOW}"
    return Picture(f"{slug(measure.label)}-by-loss", f"{measure.label} by loss", figure, caption)


def _places(rows: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Heights of the rows (model, loss), a line left free above each model for its name."""
    found, height, before = {}, 0.0, None
    for model, loss in rows:
        height += 1 if model == before else 2
        found[model, loss], before = height, model
    return found


def _aside(data: str, kinds: Sequence[str]) -> float:
    """How far a kind of data stands from the middle of its row."""
    return 0.3 * (kinds.index(data) / max(1, len(kinds) - 1) - 0.5)


def _name_rows(axis: Any, places: dict[tuple[str, str], float]) -> None:
    """Losses as ticks, each model's name above its own."""
    axis.set_yticks(list(places.values()), [loss for _, loss in places])
    axis.set_ylim(max(places.values()) + 0.7, 0.3)
    for model in dict.fromkeys(model for model, _ in places):
        first = min(height for (own, _), height in places.items() if own == model)
        axis.text(0, first - 1, model, transform=axis.get_yaxis_transform(), weight="bold", va="center", fontsize=8.5)


def _log(axis: Any) -> None:
    """Along a logarithm, with numbers as they are read: 0.1, 0.2, 0.5, 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _percent(direction: Any) -> None:
    """Shares in percent."""
    from matplotlib.ticker import PercentFormatter

    direction.set_major_formatter(PercentFormatter(1, decimals=None))


def _colours(models: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(models), cycle(COLOURS), strict=False))


def _markers(kinds: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(kinds), cycle(MARKERS), strict=False))
