"""The papers' own test of their claim: attack success regressed on the log of the separation, over losses, data and models.

Let y be a cell's attack success (a share) and x = ln D_B, both less their mean over the cells of the same model, which is to
fit an intercept for each model. Over n cells of k models

    slope    b = Sxy / Sxx,   its standard error  sqrt((Syy - b Sxy) / (n - k - 1) / Sxx)
    partial correlation       r = Sxy / sqrt(Sxx Syy)

with Sxy the sum of products. Under normal errors b over its standard error has Student's t law with n - k - 1 degrees of
freedom; the test that r is nought is the same test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, isclose, log, sqrt, tanh

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from raydiv.experiments.study.cells import Cell, trained_cells
from raydiv.experiments.study.measures import (
    BROKEN,
    D_B,
    D_B_FULL,
    D_B_LENGTH_MATCHED,
    Measure,
    attack_success,
    is_broken,
)
from raydiv.experiments.study.table_io import Table, TableCell, TableRow

COUNT = "{:.0f}"

MEANING = (
    "slope: change of attack success (1 is 100%) for each factor e of D_B, with an intercept for each model; r: their "
    "correlation, models' means removed; low and high: 95% intervals; r least and greatest: as each loss in turn is left out"
)


@dataclass(frozen=True, slots=True)
class Point:
    """A cell as the regression sees it: its separation, above nought, and attack success."""

    model: str
    data: str
    loss: str
    d_b: float
    asr: float
    broken: bool


@dataclass(frozen=True, slots=True)
class SlopeEstimate:
    """Change of attack success (1 is 100%) for each factor e of D_B, its standard error, 95% interval and two-sided p.

    ``intercepts`` are the models': attack success at D_B 1.
    """

    value: float
    error: float
    interval: tuple[float, float]
    p: float
    intercepts: dict[str, float]


@dataclass(frozen=True, slots=True)
class CorrelationEstimate:
    """Pearson's, models' means removed, its 95% interval and two-sided p, over ``cells``."""

    value: float
    interval: tuple[float, float]
    p: float
    cells: int


@dataclass(frozen=True, slots=True)
class ClaimTest:
    """Attack success on separation: the estimates, None where there is none, of which ``notes`` say why.

    ``without_a_loss`` is the range of the correlation as each loss in turn is left out, ``whole`` the correlation without
    broken models.
    """

    separation: Measure
    asr: Measure
    points: tuple[Point, ...]
    slope: SlopeEstimate | None
    correlation: CorrelationEstimate | None
    without_a_loss: tuple[float, float] | None
    whole: CorrelationEstimate | None
    notes: tuple[str, ...]


def claim_tests(cells: Sequence[Cell]) -> list[ClaimTest]:
    """Each measure of attack success on D_B, on its length-matched figure, and on that of all dimensions where measured.

    Base cells are no part of them.
    """
    own = trained_cells(cells)
    full = [D_B_FULL] if D_B_FULL.mean(own) is not None else []
    return [
        claim_test(own, separation, asr)
        for asr in attack_success(own)
        for separation in (D_B, D_B_LENGTH_MATCHED, *full)
    ]


def claim_test(cells: Sequence[Cell], separation: Measure, asr: Measure) -> ClaimTest:
    """Estimates from the cells that have both measures, the separation above nought."""
    points, notes = _points(cells, separation, asr)
    why = _why_not(points)
    if why:
        return ClaimTest(separation, asr, points, None, None, None, None, (*notes, why))
    whole = tuple(point for point in points if not point.broken)
    if len(whole) < len(points):
        broken = f"{len(points) - len(whole)} of {len(points)} cells"
        notes += (f"broken models (more than {BROKEN:.0%} degenerate answers): {broken}",)
    if len({(point.model, point.data, point.loss) for point in points}) < len(points):
        notes += ("cells of several seeds count as independent, and are alike: intervals are too narrow",)
    return ClaimTest(
        separation,
        asr,
        points,
        slope_of(points),
        correlation_of(points),
        _without_a_loss(points),
        None if _why_not(whole) else correlation_of(whole),
        notes,
    )


def _points(cells: Sequence[Cell], separation: Measure, asr: Measure) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """The cells as points, and how many were left out."""
    points, no_log, no_asr = [], 0, 0
    for cell in cells:
        d_b, success = separation.of(cell), asr.of(cell)
        if d_b is None or d_b <= 0:
            no_log += 1
        elif success is None:
            no_asr += 1
        else:
            points.append(Point(cell.model, cell.data, cell.loss, d_b, success, is_broken([cell])))
    notes = []
    if no_log:
        notes.append(f"left out, {separation.label} missing or not above 0: {no_log} of {len(cells)} cells")
    if no_asr:
        notes.append(f"left out, {asr.label} missing: {no_asr} of {len(cells)} cells")
    return tuple(points), tuple(notes)


def _why_not(points: Sequence[Point]) -> str | None:
    """Why there is no estimate: fewer cells than parameters and an interval take, or nothing that varies within a model."""
    models = len({point.model for point in points})
    if len(points) < models + 3:
        return f"no estimate: {len(points)} cells, and for an intercept of each model {max(models, 1) + 3} are needed"
    x, y = _within(points)
    for what, values in (("separation", x), ("attack success", y)):
        if np.allclose(values, 0, atol=1e-9):
            return f"no estimate: {what} is the same in all cells of each model"
    return None


def _within(points: Sequence[Point]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each point ln D_B [n] and attack success [n], less their means over its model's points."""
    _, model = np.unique([point.model for point in points], return_inverse=True)
    counts = np.bincount(model)
    columns = np.array([[log(point.d_b), point.asr] for point in points]).T
    x, y = (column - (np.bincount(model, column) / counts)[model] for column in columns)
    return x, y


def slope_of(points: Sequence[Point]) -> SlopeEstimate:
    """Least squares with an intercept for each model: the formulas of this file's docstring."""
    x, y = _within(points)
    free = len(points) - len({point.model for point in points}) - 1
    value = float(x @ y / (x @ x))
    residual = y - value * x
    error = sqrt(float(residual @ residual / free / (x @ x)))
    half = float(t.ppf(0.975, free)) * error
    p = float(2 * t.sf(abs(value) / error, free)) if error else 0.0
    return SlopeEstimate(value, error, (value - half, value + half), p, _intercepts(points, value))


def _intercepts(points: Sequence[Point], slope: float) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for point in points:
        found.setdefault(point.model, []).append(point.asr - slope * log(point.d_b))
    return {model: sum(values) / len(values) for model, values in found.items()}


def correlation_of(points: Sequence[Point]) -> CorrelationEstimate:
    """The partial correlation r, Fisher's interval tanh(atanh r +- 1.96 / sqrt(n - k - 2)), and p by the slope's t test.

    Fisher's z of an ordinary correlation has the standard error 1 / sqrt(n - 3), and of one given c other variables
    1 / sqrt(n - 3 - c). Here these are the indicators of all models but one, c = k - 1.
    """
    x, y = _within(points)
    cells, models = len(points), len({point.model for point in points})
    value = min(1.0, max(-1.0, float(x @ y / sqrt((x @ x) * (y @ y)))))
    if isclose(abs(value), 1, rel_tol=1e-12):
        return CorrelationEstimate(value, (value, value), 0.0, cells)
    half = float(norm.ppf(0.975)) / sqrt(cells - models - 2)
    free = cells - models - 1
    p = float(2 * t.sf(abs(value) * sqrt(free / (1 - value**2)), free))
    return CorrelationEstimate(value, (tanh(atanh(value) - half), tanh(atanh(value) + half)), p, cells)


def _without_a_loss(points: Sequence[Point]) -> tuple[float, float] | None:
    """The least and the greatest correlation as each loss is left out; None unless there is one without each."""
    found = []
    for loss in {point.loss for point in points}:
        left = [point for point in points if point.loss != loss]
        if _why_not(left):
            return None
        found.append(correlation_of(left).value)
    return min(found), max(found)


def claim_table(claims: Sequence[ClaimTest]) -> Table:
    """A row for each claim: slope and correlation with their intervals, and the correlation without a loss or broken models."""
    estimates = ("cells", "slope", "SE", "slope low", "slope high", "p", "r", "r low", "r high")
    header = ("attack success", "on the log of", *estimates, "r least", "r greatest", "unbroken r", "unbroken cells")
    rows = tuple(TableRow((one.asr.label, one.separation.label), _figures(one)) for one in claims)
    return Table("Attack success and separation", header, rows, (MEANING, *_notes(claims)) if rows else ())


def _notes(claims: Sequence[ClaimTest]) -> list[str]:
    """Each note once, with the claims that it is of where these are not all."""
    notes: dict[str, list[str]] = {}
    for one in claims:
        for note in one.notes:
            notes.setdefault(note, []).append(f"{one.asr.label} on {one.separation.label}")
    return [note if len(own) == len(claims) else f"{', '.join(own)}: {note}" for note, own in notes.items()]


def _figures(one: ClaimTest) -> tuple[TableCell, ...]:
    """Of a row of ``claim_table``."""
    slope = (None,) * 4 if one.slope is None else (one.slope.value, one.slope.error, *one.slope.interval)
    r = (None,) * 3 if one.correlation is None else (one.correlation.value, *one.correlation.interval)
    unbroken = (None, None) if one.whole is None else (one.whole.value, one.whole.cells)
    return (
        TableCell(len(one.points), COUNT),
        *(TableCell(value, "{:.3f}") for value in slope),
        TableCell(None if one.slope is None else one.slope.p, "{:.2g}"),
        *(TableCell(value) for value in (*r, *(one.without_a_loss or (None, None)), unbroken[0])),
        TableCell(unbroken[1], COUNT),
    )
