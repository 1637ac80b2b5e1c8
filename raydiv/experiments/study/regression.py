"""The papers' test of their claim: a regression of attack success on the logarithm of the separation, over all cells.

Let y be a cell's attack success (a share) and x = ln D_B. Over n cells of k models

    y = a_model + b x                          ordinary least squares, an intercept for each model
    r = corr(x - mean_model(x), y - mean_model(y))    partial correlation

Under normal errors, b over its standard error has Student's t distribution with n - k - 1 degrees of freedom. The test
of r = 0 is the same test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import atanh, isclose, sqrt, tanh
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm, t
from statsmodels.regression.linear_model import OLS

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

LEGEND = (
    "slope: change of attack success (1 is 100%) when D_B grows by a factor of e, with an intercept for each model; "
    "r: partial correlation, the models' means removed; low and high: 95% intervals; "
    "r least and greatest: without each loss in turn"
)


@dataclass(frozen=True, slots=True)
class Point:
    """A cell in the regression: its separation, which is above 0, and its attack success."""

    model: str
    data: str
    loss: str
    d_b: float
    asr: float
    broken: bool


@dataclass(frozen=True, slots=True)
class SlopeEstimate:
    """Change of attack success (1 is 100%) when D_B grows by a factor of e: standard error, 95% interval, two-sided p.

    ``intercepts`` are by model: attack success at D_B = 1.
    """

    value: float
    error: float
    interval: tuple[float, float]
    p: float
    intercepts: dict[str, float]


@dataclass(frozen=True, slots=True)
class CorrelationEstimate:
    """Pearson's correlation with the models' means removed: 95% interval, two-sided p, number of cells."""

    value: float
    interval: tuple[float, float]
    p: float
    cells: int


@dataclass(frozen=True, slots=True)
class ClaimTest:
    """The regression of one measure of attack success on one measure of separation.

    Estimates are None if the cells allow none; ``notes`` give the reason. ``without_a_loss`` is the range of the
    correlation when each loss in turn is left out. ``whole`` is the correlation without broken models.
    """

    separation: Measure
    asr: Measure
    points: tuple[Point, ...]
    slope: SlopeEstimate | None
    correlation: CorrelationEstimate | None
    without_a_loss: tuple[float, float] | None
    whole: CorrelationEstimate | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The test in study.json."""
        keys = ("metric", "label", "form", "better", "safety", "averaged")
        separation, asr = ({key: getattr(measure, key) for key in keys} for measure in (self.separation, self.asr))
        return {**asdict(self), "separation": separation, "asr": asr}


def claim_tests(cells: Sequence[Cell]) -> list[ClaimTest]:
    """Tests of each measure of attack success on D_B, on length-matched D_B, and on D_B of all dimensions if measured.

    Base cells are left out.
    """
    trained = trained_cells(cells)
    full = [D_B_FULL] if D_B_FULL.mean(trained) is not None else []
    return [
        claim_test(trained, separation, asr)
        for asr in attack_success(trained)
        for separation in (D_B, D_B_LENGTH_MATCHED, *full)
    ]


def claim_test(cells: Sequence[Cell], separation: Measure, asr: Measure) -> ClaimTest:
    """The test over the cells that have both measures and a separation above 0."""
    points, notes = _points(cells, separation, asr)
    frame = pd.DataFrame(map(asdict, points), columns=list(Point.__dataclass_fields__))
    frame["log_d_b"] = np.log(frame["d_b"].astype(float))
    reason = _no_estimate(frame)
    if reason:
        return ClaimTest(separation, asr, points, None, None, None, None, (*notes, reason))
    unbroken = frame[~frame["broken"].astype(bool)]
    if len(unbroken) < len(frame):
        count = f"{len(frame) - len(unbroken)} of {len(frame)} cells"
        notes.append(f"broken models (more than {BROKEN:.0%} degenerate answers): {count}")
    if frame.duplicated(["model", "data", "loss"]).any():
        notes.append("intervals are too narrow: cells that differ only in their seed count as independent")
    return ClaimTest(
        separation,
        asr,
        points,
        slope_of(frame),
        correlation_of(frame),
        _correlation_range(frame),
        None if _no_estimate(unbroken) else correlation_of(unbroken),
        tuple(notes),
    )


def _points(cells: Sequence[Cell], separation: Measure, asr: Measure) -> tuple[tuple[Point, ...], list[str]]:
    """The cells as points, and notes with the number of cells left out."""
    points, without_log, without_asr = [], 0, 0
    for cell in cells:
        d_b, success = separation.value_in(cell), asr.value_in(cell)
        if d_b is None or d_b <= 0:
            without_log += 1
        elif success is None:
            without_asr += 1
        else:
            points.append(Point(*cell.key, d_b, success, is_broken([cell])))
    notes = []
    if without_log:
        notes.append(f"left out, {separation.label} missing or not above 0: {without_log} of {len(cells)} cells")
    if without_asr:
        notes.append(f"left out, {asr.label} missing: {without_asr} of {len(cells)} cells")
    return tuple(points), notes


def _no_estimate(points: pd.DataFrame) -> str | None:
    """The reason for no estimate: too few cells for parameters and interval, or no variation within the models."""
    models = points["model"].nunique()
    if len(points) < models + 3:
        needed = max(models, 1) + 3
        return f"no estimate: {len(points)} cells; with an intercept for each model, at least {needed} are needed"
    for name, values in _within_models(points).items():
        if np.allclose(values, 0, atol=1e-9):
            label = "separation" if name == "log_d_b" else "attack success"
            return f"no estimate: {label} is the same in all cells of each model"
    return None


def _within_models(points: pd.DataFrame) -> pd.DataFrame:
    """The log of D_B and the attack success of each point, less their means over the points of its model."""
    values = points[["log_d_b", "asr"]]
    return values - values.groupby(points["model"]).transform("mean")


def slope_of(points: pd.DataFrame) -> SlopeEstimate:
    """Ordinary least squares with an intercept for each model."""
    models = pd.get_dummies(points[["model"]], prefix="", prefix_sep="", dtype=float)
    design = np.column_stack([points["log_d_b"], models])
    fit = OLS(points["asr"].to_numpy(), design).fit()
    low, high = fit.conf_int()[0]
    intercepts = dict(zip(models.columns, fit.params[1:].tolist(), strict=True))
    return SlopeEstimate(
        float(fit.params[0]), float(fit.bse[0]), (float(low), float(high)), float(fit.pvalues[0]), intercepts
    )


def correlation_of(points: pd.DataFrame) -> CorrelationEstimate:
    """The partial correlation r, Fisher's interval tanh(atanh r +- 1.96 / sqrt(n - k - 2)), and p of the t test.

    Fisher's z of an ordinary correlation has the standard error 1 / sqrt(n - 3), and of one given c other variables
    1 / sqrt(n - 3 - c). Here these are the indicators of all models but one: c = k - 1.
    """
    within = _within_models(points)
    value = float(within["log_d_b"].corr(within["asr"]))
    cells, models = len(points), points["model"].nunique()
    if isclose(abs(value), 1, rel_tol=1e-12):
        return CorrelationEstimate(value, (value, value), 0.0, cells)
    half = float(norm.ppf(0.975)) / sqrt(cells - models - 2)
    free = cells - models - 1
    p = float(2 * t.sf(abs(value) * sqrt(free / (1 - value**2)), free))
    return CorrelationEstimate(value, (tanh(atanh(value) - half), tanh(atanh(value) + half)), p, cells)


def _correlation_range(points: pd.DataFrame) -> tuple[float, float] | None:
    """The lowest and the highest correlation without each loss in turn; None if one of them has no estimate."""
    others = [points[points["loss"] != loss] for loss in points["loss"].unique()]
    if any(map(_no_estimate, others)):
        return None
    values = [correlation_of(other).value for other in others]
    return min(values), max(values)


def claim_table(claims: Sequence[ClaimTest]) -> Table:
    """A row for each test: slope, correlation, their intervals, and the correlation without a loss or broken models."""
    estimates = ("cells", "slope", "SE", "slope low", "slope high", "p", "r", "r low", "r high")
    header = ("attack success", "on the log of", *estimates, "r least", "r greatest", "unbroken r", "unbroken cells")
    rows = tuple(TableRow((claim.asr.label, claim.separation.label), _figures(claim)) for claim in claims)
    return Table("Attack success and separation", header, rows, (LEGEND, *_notes(claims)) if rows else ())


def _notes(claims: Sequence[ClaimTest]) -> list[str]:
    """Each distinct note once, after the names of its tests unless all tests have it."""
    tests: dict[str, list[str]] = {}
    for claim in claims:
        for note in claim.notes:
            tests.setdefault(note, []).append(f"{claim.asr.label} on {claim.separation.label}")
    return [note if len(names) == len(claims) else f"{', '.join(names)}: {note}" for note, names in tests.items()]


def _figures(claim: ClaimTest) -> tuple[TableCell, ...]:
    """The figures of a row of ``claim_table``."""
    slope = (None,) * 4 if claim.slope is None else (claim.slope.value, claim.slope.error, *claim.slope.interval)
    r = (None,) * 3 if claim.correlation is None else (claim.correlation.value, *claim.correlation.interval)
    unbroken = (None, None) if claim.whole is None else (claim.whole.value, claim.whole.cells)
    return (
        TableCell(len(claim.points), COUNT),
        *(TableCell(value, "{:.3f}") for value in slope),
        TableCell(None if claim.slope is None else claim.slope.p, "{:.2g}"),
        *(TableCell(value) for value in (*r, *(claim.without_a_loss or (None, None)), unbroken[0])),
        TableCell(unbroken[1], COUNT),
    )
