"""The papers' test of their claim: a regression of attack success on separation, over all cells of a study.

Let y be the attack success (a share) of a model m trained on data d with a loss l, and x its separation: the logarithm
of D_B, or a signed root for a measure that chance makes negative. Seeds are averaged first, since they share all but
noise. Cells of one model and data share its effect on both, so that each such block has an intercept of its own:

    y = a_(m,d) + b x                                    least squares
    r = corr(x - mean_(m,d)(x), y - mean_(m,d)(y))       partial correlation

p is that of a permutation test: if separation had nothing to do with attack success, the losses of a block could be
exchanged in y and not in x. The interval of b holds the values that this test of y - b x does not reject. A loss that
acts alike in all blocks makes the blocks dependent; the second p exchanges losses as wholes, in all blocks at once. The
interval of r is a bootstrap over losses, with all their cells.

Whether a measure predicts the attack success of a loss that was not seen is the share of variance explained in the
cells of each loss by the regression on all others:

    R2 = 1 - sum (y - prediction)^2 / sum (y - mean of the block's other losses)^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, permutations
from math import factorial
from typing import Any

import numpy as np
import pandas as pd

from raydiv.experiments.study.cells import Cell, Key, grouped_cells, trained_cells
from raydiv.experiments.study.measures import (
    BROKEN,
    D_B,
    D_B_LENGTH_MATCHED,
    DEPTH,
    MAHALANOBIS,
    Measure,
    attack_success,
    is_broken,
)

LEVEL = 0.05
RESAMPLES = 9_999
"""Permutations, and draws of the bootstrap."""

FEWEST_LOSSES = 3
"""Losses of which a bootstrap over losses says something."""

BLOCK = ["model", "data"]


@dataclass(frozen=True, slots=True)
class Point:
    """A model trained on ``data`` with ``loss``: the means of the measure and of its attack success over seeds."""

    model: str
    data: str
    loss: str
    separation: float
    asr: float
    broken: bool


@dataclass(frozen=True, slots=True)
class SlopeEstimate:
    """Change of attack success (1 is 100%) per unit of the scale: 95% interval and p of the permutation test.

    ``interval`` is None where there are too few permutations for one; ``p_losses`` is None where the blocks have
    different losses, or too few. ``intercepts``: model, data and attack success at 0 of the scale.
    """

    value: float
    interval: tuple[float, float] | None
    p: float
    p_losses: float | None
    intercepts: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class CorrelationEstimate:
    """Pearson's correlation with the blocks' means removed, its 95% interval where there is one, and the cells."""

    value: float
    interval: tuple[float, float] | None
    cells: int


@dataclass(frozen=True, slots=True)
class PredictionEstimate:
    """R2 of the predictions for each loss from all others, and its 95% interval where there is one."""

    r2: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Scale:
    """What the regression does with a measure of separation, and the name of the result."""

    name: str
    of: Callable[[Any], Any]


LOG = Scale("log", np.log)
ROOT = Scale("root", lambda squared: np.sign(squared) * np.sqrt(np.abs(squared)))
"""A Mahalanobis distance in standard deviations."""


def scale_of(separation: Measure) -> Scale:
    """An unbiased estimate of a squared distance may be negative, where the logarithm has no value."""
    return ROOT if separation == MAHALANOBIS else LOG


@dataclass(frozen=True, slots=True)
class ClaimTest:
    """The regression of one measure of attack success on one measure of separation, or of depth.

    Estimates are None if the cells allow none; ``notes`` give the reason. ``without_one`` is the range of the
    correlation when each loss and each data set in turn is left out. ``whole`` is the correlation without broken
    models.
    """

    separation: Measure
    asr: Measure
    points: tuple[Point, ...]
    slope: SlopeEstimate | None
    correlation: CorrelationEstimate | None
    prediction: PredictionEstimate | None
    without_one: tuple[float, float] | None
    whole: CorrelationEstimate | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The test in study.json."""
        keys = ("metric", "label", "form", "better", "safety", "averaged")
        separation, asr = ({key: getattr(measure, key) for key in keys} for measure in (self.separation, self.asr))
        return {**asdict(self), "separation": separation, "asr": asr, "scale": scale_of(self.separation).name}


def claim_tests(cells: Sequence[Cell]) -> list[ClaimTest]:
    """Tests of each measure of attack success on each measure of separation.

    These are D_B, length-matched D_B, and the Mahalanobis distance and the measures of depth where they were measured.
    Base cells are left out.
    """
    trained = trained_cells(cells)
    others = [measure for measure in (MAHALANOBIS, *DEPTH) if measure.mean(trained) is not None]
    return [
        claim_test(trained, separation, asr)
        for asr in attack_success(trained)
        for separation in (D_B, D_B_LENGTH_MATCHED, *others)
    ]


def claim_test(cells: Sequence[Cell], separation: Measure, asr: Measure) -> ClaimTest:
    """The test over the models, data and losses that have both measures, on the scale of the separation."""
    points, notes = _points(cells, separation, asr)
    frame = pd.DataFrame(map(asdict, points), columns=list(Point.__dataclass_fields__))
    frame["x"] = scale_of(separation).of(frame["separation"].astype(float))
    reason = _no_estimate(frame)
    if reason:
        return ClaimTest(separation, asr, points, None, None, None, None, None, (*notes, reason))
    unbroken = frame[~frame["broken"].astype(bool)]
    if len(unbroken) < len(frame):
        count = f"{len(frame) - len(unbroken)} of {len(frame)} cells"
        notes.append(f"broken models (more than {BROKEN:.0%} degenerate answers): {count}")
    return ClaimTest(
        separation,
        asr,
        points,
        slope_of(frame),
        correlation_of(frame),
        prediction_of(frame),
        _correlation_range(frame),
        None if _no_estimate(unbroken) else correlation_of(unbroken),
        tuple(notes),
    )


def _points(cells: Sequence[Cell], separation: Measure, asr: Measure) -> tuple[tuple[Point, ...], list[str]]:
    """A point for each model, data and loss, and notes with the number of those left out."""
    groups: dict[Key, list[Cell]] = grouped_cells(cells)
    points, without_separation, without_asr = [], 0, 0
    for key, group in groups.items():
        separated, success = separation.mean(group), asr.mean(group)
        if separated is None or (scale_of(separation) is LOG and separated <= 0):
            without_separation += 1
        elif success is None:
            without_asr += 1
        else:
            points.append(Point(*key, separated, success, is_broken(group)))
    notes = []
    if without_separation:
        why = "missing or not above 0" if scale_of(separation) is LOG else "missing"
        notes.append(f"left out, {separation.label} {why}: {without_separation} of {len(groups)} cells")
    if without_asr:
        notes.append(f"left out, {asr.label} missing: {without_asr} of {len(groups)} cells")
    return tuple(points), notes


def _no_estimate(points: pd.DataFrame) -> str | None:
    """The reason for no estimate: too few cells, or no variation within the blocks."""
    blocks = points.groupby(BLOCK).ngroups
    if len(points) < blocks + 3:
        needed = max(blocks, 1) + 3
        return (
            f"no estimate: {len(points)} cells; with an intercept for each model and data, at least {needed} are needed"
        )
    for name, values in zip(("separation", "attack success"), _within_blocks(points), strict=True):
        if np.allclose(values, 0, atol=1e-9):
            return f"no estimate: {name} is the same in all cells of each model and data"
    return None


def _within_blocks(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Separation and attack success of each point, less their means over its block; both [n]."""
    values = points[["x", "asr"]].astype(float)
    within = values - values.groupby([points[name] for name in BLOCK]).transform("mean")
    return within["x"].to_numpy(), within["asr"].to_numpy()


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least squares of what ``_within_blocks`` returns."""
    return float(x @ y / (x @ x))


def slope_of(points: pd.DataFrame) -> SlopeEstimate:
    """Least squares with an intercept for each block, and the permutation tests."""
    x, y = _within_blocks(points)
    value = _slope(x, y)
    exchanged = _Exchanged.within_blocks(points)
    at_0 = points.assign(at_0=points["asr"].astype(float) - value * points["x"])
    means = at_0.groupby(BLOCK, sort=False, as_index=False)["at_0"].mean()
    intercepts = tuple(
        (str(model), str(data), float(mean))
        for model, data, mean in zip(means["model"], means["data"], means["at_0"], strict=True)
    )
    losses = _Exchanged.of_losses(points)
    return SlopeEstimate(
        value,
        exchanged.interval(value),
        exchanged.p(0.0),
        None if losses is None else losses.p(0.0),
        intercepts,
    )


@dataclass(frozen=True, slots=True)
class _Exchanged:
    """Products of x with y and with x themselves, within blocks, and after each permutation [b] of y and x.

    ``includes_identity``: the permutations are all that there are, and not a sample.
    """

    xy: float
    xx: float
    permuted_xy: np.ndarray
    permuted_xx: np.ndarray
    includes_identity: bool

    @classmethod
    def within_blocks(cls, points: pd.DataFrame) -> _Exchanged:
        """Random permutations of the losses of each block by itself."""
        generator = np.random.default_rng(0)
        order = np.tile(np.arange(len(points)), (RESAMPLES, 1))
        for rows in points.reset_index(drop=True).groupby(BLOCK).indices.values():
            order[:, rows] = generator.permuted(order[:, rows], axis=1)
        return cls._of(points, order, includes_identity=False)

    @classmethod
    def of_losses(cls, points: pd.DataFrame) -> _Exchanged | None:
        """Permutations of the losses, the same in each block; None where these cannot reach LEVEL, or the blocks have
        different losses.
        """
        rows = points.reset_index(drop=True)
        losses = sorted(rows["loss"].unique())
        places = rows.assign(row=rows.index).pivot_table(index=BLOCK, columns="loss", values="row")
        if places.isna().any(axis=None) or 1 / factorial(len(losses)) > LEVEL:
            return None
        table = places[losses].to_numpy().astype(int)
        count = factorial(len(losses))
        order = np.empty((min(count, RESAMPLES), len(rows)), dtype=int)
        for number, permutation in enumerate(_permutations(len(losses))):
            order[number, table] = table[:, permutation]
        return cls._of(points, order, includes_identity=count <= RESAMPLES)

    @classmethod
    def _of(cls, points: pd.DataFrame, order: np.ndarray, includes_identity: bool) -> _Exchanged:
        x, y = _within_blocks(points)
        return cls(float(x @ y), float(x @ x), y[order] @ x, x[order] @ x, includes_identity)

    def p(self, slope: float) -> float:
        """P of the hypothesis that the slope is ``slope``: the share of permutations of y - slope x at least as
        correlated with x, the identity among them.
        """
        observed = abs(self.xy - slope * self.xx)
        permuted = np.abs(self.permuted_xy - slope * self.permuted_xx)
        extreme = int((permuted >= observed - 1e-12 * max(1.0, observed)).sum())
        counted = 0 if self.includes_identity else 1
        return (extreme + counted) / (len(permuted) + counted)

    def interval(self, estimate: float) -> tuple[float, float] | None:
        """The slopes that a test at LEVEL does not reject; None where it rejects none far away from ``estimate``."""
        ends = []
        for sign in (-1, 1):
            step = max(abs(estimate), 1e-3)
            outside = next((s for s in (step * 2.0**k for k in range(30)) if self.p(estimate + sign * s) < LEVEL), None)
            if outside is None:
                return None
            inside = 0.0
            for _ in range(50):
                middle = (inside + outside) / 2
                inside, outside = (inside, middle) if self.p(estimate + sign * middle) < LEVEL else (middle, outside)
            ends.append(estimate + sign * outside)
        return ends[0], ends[1]


def _permutations(count: int) -> Iterator[Sequence[int]]:
    """All orders of ``count`` losses, or RESAMPLES random ones where there are more."""
    if factorial(count) <= RESAMPLES:
        return iter(permutations(range(count)))
    generator = np.random.default_rng(0)
    return islice(iter(lambda: generator.permutation(count).tolist(), None), RESAMPLES)


def _partial_correlation(points: pd.DataFrame) -> float:
    x, y = _within_blocks(points)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def correlation_of(points: pd.DataFrame) -> CorrelationEstimate:
    """The partial correlation r, with an interval by a bootstrap over losses."""
    value = _partial_correlation(points)
    losses, codes = np.unique(points["loss"].astype(str), return_inverse=True)
    if len(losses) < FEWEST_LOSSES:
        return CorrelationEstimate(value, None, len(points))
    drawn = _weighted_correlations(points, _drawn_losses(len(losses))[:, codes].astype(float))
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < 0.9 * len(drawn):
        return CorrelationEstimate(value, None, len(points))
    return CorrelationEstimate(value, _interval(defined), len(points))


def _drawn_losses(count: int) -> np.ndarray:
    """How often each of ``count`` losses is drawn, [b, count], for a bootstrap over losses."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The ends between which all but LEVEL of a bootstrap's values [b] lie."""
    low, high = np.quantile(values, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _weighted_correlations(points: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """The partial correlation [b] of points with weights [b, n]; NaN without variation within the blocks."""
    x, y = _within_blocks(points)  # near zero, which keeps the sums of squares exact
    blocks = pd.get_dummies(points.groupby(BLOCK).ngroup()).to_numpy(dtype=float)
    sizes = weights @ blocks

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(sizes > 0, ((weights * a) @ blocks) * ((weights * b) @ blocks) / sizes, 0.0)
        return np.asarray((weights * a) @ b - means.sum(axis=1))

    xx, yy = product(x, x), product(y, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        defined = (xx > 1e-12 * (x @ x)) & (yy > 1e-12 * (y @ y))
        return np.where(defined, product(x, y) / np.sqrt(xx * yy), np.nan)


def prediction_of(points: pd.DataFrame) -> PredictionEstimate | None:
    """R2 of the predictions for each loss from all others, with an interval by a bootstrap over losses.

    None where the cells without a loss allow no estimate.
    """
    errors, variations = [], []
    for loss in points["loss"].unique():
        seen, held_out = points[points["loss"] != loss], points[points["loss"] == loss]
        if _no_estimate(seen):
            return None
        x, y = _within_blocks(seen)
        means = seen.astype({"x": float, "asr": float}).groupby(BLOCK)[["x", "asr"]].mean()
        left = held_out.merge(means, on=BLOCK, suffixes=("", "_mean"))
        varied = (left["asr"] - left["asr_mean"]).to_numpy(dtype=float)
        predicted = _slope(x, y) * (left["x"] - left["x_mean"]).to_numpy(dtype=float)
        errors.append(float(np.square(varied - predicted).sum()))
        variations.append(float(np.square(varied).sum()))
    if sum(variations) == 0:
        return None
    return PredictionEstimate(1 - sum(errors) / sum(variations), _r2_interval(np.array(errors), np.array(variations)))


def _r2_interval(errors: np.ndarray, variations: np.ndarray) -> tuple[float, float] | None:
    """By a bootstrap over losses, of the sums of squares [loss]; None for fewer than FEWEST_LOSSES."""
    if len(errors) < FEWEST_LOSSES:
        return None
    drawn = _drawn_losses(len(errors))
    varied = drawn @ variations
    return _interval(1 - (drawn @ errors)[varied > 0] / varied[varied > 0])


def _correlation_range(points: pd.DataFrame) -> tuple[float, float] | None:
    """The lowest and the highest correlation without each loss and each data set in turn; None if one has no estimate.

    A study of one data set has none to leave out.
    """
    others = [
        points[points[axis] != name]
        for axis in ("loss", "data")
        for name in points[axis].unique()
        if points[axis].nunique() > 1
    ]
    if not others or any(map(_no_estimate, others)):
        return None
    values = [_partial_correlation(other) for other in others]
    return min(values), max(values)
