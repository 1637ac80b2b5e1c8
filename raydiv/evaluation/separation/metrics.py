"""Separation metrics of two classes of hidden states, with controls for prompt length and chance. Pure numpy.

Covariances are computed in the space that the points span, of r <= n - 1 dimensions: distances and products are the
same as in all d dimensions, at a cost that does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.evaluation.intervals import Z
from raydiv.evaluation.separation.distances import Array, Labels, bhattacharyya_distance, frechet_distance
from raydiv.evaluation.separation.mahalanobis import mahalanobis, mahalanobis_interval

P_VALUE_PERMUTATIONS = 199
"""Label permutations for the p-value."""

CONTROL_DRAWS = 10
"""Label permutations, and random subsets, over which the statistics of a control are averaged."""

INTERVAL_HALVES = 200
"""Random halves of the prompts for an interval."""

FOLDS = 5
"""Cross-validation folds of the probes."""

INTERVAL_CLASS_SIZE = 8
"""Smallest class for an interval of D_B: a half has 4 points for a covariance in the plane."""

TIED_PLANES = 5
"""Most tied components whose planes the interval of D_B covers."""

MIN_CLASS_SIZE = 3
"""Smallest class of a subset that is measured."""


@dataclass(frozen=True, slots=True)
class SeparationStatistics:
    """Separation of harmful from harmless prompts in one layer.

    In all dimensions: ``probe_auc`` and ``difference_auc``, held-out AUC of a logistic regression and of the difference
    of the classes' means (0.5: chance; None where a class has fewer prompts than there are folds); ``mahalanobis``, the
    squared Mahalanobis distance under a shrunk correlation (see raydiv.evaluation.separation.mahalanobis; None where
    the prompts are too few to tell); ``frechet``, the squared Frechet distance, in the units of the states, which falls
    with the number of prompts. ``d_b``: Bhattacharyya distance in the plane of the first two principal components, the
    papers' protocol, and ``silhouette`` in the same plane.
    """

    probe_auc: float | None
    difference_auc: float | None
    mahalanobis: float | None
    d_b: float
    silhouette: float
    frechet: float


@dataclass(frozen=True, slots=True)
class SeparationMetrics:
    """Statistics of all prompts, with controls: the same statistics of other prompts or labels.

    ``matched``: of the ``length_matched`` prompts, as many of each class at every token length, None below 3 a class;
    ``subset``: means of random subsets with as many of each class as ``matched``, which differ from it by their lengths
    alone; ``shuffled``: means under permuted labels, the values by chance. ``length_auc``: how well token length alone
    tells the classes apart (0.5 not at all). ``d_b_p``: share of permutations whose d_b is no smaller, the true labels
    counted among them; ``d_b_interval``: 95%, by how far halves of the prompts deviate from all (the delete-half
    jackknife, whose deviations are as large as those of n prompts from their law; a bootstrap's repeated points bias
    covariances where n < d), and by the planes that may be the law's; None below 8 a class. ``tied_components``: those
    beyond the plane whose variance cannot be told from that of its second. ``mahalanobis_interval``: 95%, by a
    jackknife over groups.
    ``d_b_chance``: d_b under each permutation, the same ones in every layer.
    """

    figures: SeparationStatistics
    length_auc: float
    length_matched: int
    matched: SeparationStatistics | None
    subset: SeparationStatistics | None
    shuffled: SeparationStatistics
    d_b_p: float
    d_b_interval: tuple[float, float] | None
    mahalanobis_interval: tuple[float, float] | None
    tied_components: int = 0
    d_b_chance: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All but what each permutation gives."""
        return {name: value for name, value in asdict(self).items() if name != "d_b_chance"}


def p_of_all_layers(layers: Sequence[SeparationMetrics]) -> list[float]:
    """P of each layer's d_b, corrected for the choice among all layers (Westfall and Young 1993, single step).

    The largest of many layers is large by chance. Under each permutation the largest d_b of all layers is taken, each
    in units of its mean under permutations; p is the share of permutations whose largest is no smaller.
    """
    chance = np.array([layer.d_b_chance for layer in layers])
    means = chance.mean(axis=1, keepdims=True)
    means[means == 0] = 1.0  # states that are all equal
    largest = (chance / means).max(axis=0)
    observed = np.array([[layer.figures.d_b] for layer in layers]) / means
    return [float(p) for p in (1 + (largest >= observed).sum(axis=1)) / (1 + len(largest))]


def separation_metrics(
    hidden: Array, harmful: Labels, lengths: NDArray[np.int64], *, resampled: bool = True, seed: int = 0
) -> SeparationMetrics:
    """Separation of hidden states [n, d] of prompts with labels ``harmful`` [n] and token ``lengths`` [n].

    Without ``resampled`` no interval is computed.
    """
    generator = np.random.default_rng(seed)
    cloud = _PointCloud.of(hidden)
    figures = _statistics(cloud, harmful)
    chance = np.array([cloud.plane_distance(generator.permutation(harmful)) for _ in range(P_VALUE_PERMUTATIONS)])
    shuffled = [_statistics(cloud, generator.permutation(harmful)) for _ in range(CONTROL_DRAWS)]
    rows = length_matched(harmful, lengths)
    matched, subset = _matched_control(hidden, harmful, rows, figures, generator)
    return SeparationMetrics(
        figures=figures,
        length_auc=length_auc(harmful, lengths),
        length_matched=len(rows),
        matched=matched,
        subset=subset,
        shuffled=replace(_mean_statistics(shuffled), d_b=float(chance.mean())),
        d_b_p=(1 + int((chance >= figures.d_b).sum())) / (1 + P_VALUE_PERMUTATIONS),
        d_b_interval=_d_b_interval(cloud.points, harmful, generator) if resampled else None,
        mahalanobis_interval=(
            mahalanobis_interval(hidden, harmful, figures.mahalanobis, generator) if resampled else None
        ),
        tied_components=len(_tied_components(cloud.points)),
        d_b_chance=tuple(chance.tolist()),
    )


@dataclass(frozen=True, slots=True)
class _PointCloud:
    """Hidden states [n, d], coordinates ``points`` [n, r] in their span, and ``plane`` [n, 2] of the first two
    components.
    """

    hidden: Array
    points: Array
    plane: Array

    @classmethod
    def of(cls, hidden: Array) -> _PointCloud:
        components = _principal_components(hidden)
        sizes = np.linalg.norm(components, axis=0)
        rank = max(1, int((sizes > 1e-10 * sizes[0]).sum()))
        return cls(hidden, components[:, :rank], _plane(components))

    def plane_distance(self, labels: Labels) -> float:
        """D_B in the plane."""
        return bhattacharyya_distance(self.plane[labels], self.plane[~labels])


def _matched_control(
    hidden: Array,
    labels: Labels,
    rows: NDArray[np.int64],
    figures: SeparationStatistics,
    generator: np.random.Generator,
) -> tuple[SeparationStatistics | None, SeparationStatistics | None]:
    """Statistics of the length-matched ``rows``, and means of random subsets with as many of each class."""
    if len(rows) < 2 * MIN_CLASS_SIZE:
        return None, None
    if len(rows) == len(labels):
        return figures, figures
    subsets = []
    for _ in range(CONTROL_DRAWS):
        chosen = [generator.choice(np.flatnonzero(labels == label), len(rows) // 2, replace=False) for label in (1, 0)]
        subsets.append(np.concatenate(chosen))
    matched, *others = (_statistics(_PointCloud.of(hidden[part]), labels[part]) for part in (rows, *subsets))
    return matched, _mean_statistics(others)


def _statistics(cloud: _PointCloud, labels: Labels) -> SeparationStatistics:
    from sklearn.metrics import silhouette_score

    probe_auc, difference_auc = _held_out_auc(cloud.hidden, labels)
    return SeparationStatistics(
        probe_auc=probe_auc,
        difference_auc=difference_auc,
        mahalanobis=mahalanobis(cloud.hidden, labels),
        d_b=cloud.plane_distance(labels),
        silhouette=float(silhouette_score(cloud.plane, labels)),
        frechet=frechet_distance(cloud.points[labels], cloud.points[~labels]),
    )


def _mean_statistics(statistics: Sequence[SeparationStatistics]) -> SeparationStatistics:
    """Mean of each statistic; None where it could not be measured in all."""
    columns = zip(*map(astuple, statistics), strict=True)
    means: list[Any] = [None if None in column else float(np.mean(column)) for column in columns]
    return SeparationStatistics(*means)


def _held_out_auc(hidden: Array, labels: Labels) -> tuple[float | None, float | None]:
    """AUC of a logistic regression and of the difference of means, each the mean over held-out folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(labels.sum(), (~labels).sum()) < FOLDS:
        return None, None
    aucs = []
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(hidden, labels):
        train_labels = labels[train]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(hidden[train], train_labels)
        difference = hidden[train][train_labels].mean(0) - hidden[train][~train_labels].mean(0)
        scores = (probe.decision_function(hidden[test]), hidden[test] @ difference)
        aucs.append([roc_auc_score(labels[test], score) for score in scores])
    probe_auc, difference_auc = np.mean(aucs, axis=0)
    return float(probe_auc), float(difference_auc)


def _d_b_interval(components: Array, labels: Labels, generator: np.random.Generator) -> tuple[float, float] | None:
    """95% interval of D_B in the plane of the first two ``components`` [n, r]; None below 8 points a class.

    By the delete-half jackknife, each half in its own plane. It holds the distance itself, and the intervals of the
    other planes that may be the law's.
    """
    classes = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    smallest = min(map(len, classes))
    if smallest < INTERVAL_CLASS_SIZE:
        return None
    halves = [
        np.concatenate([generator.permutation(rows)[: len(rows) // 2] for rows in classes])
        for _ in range(INTERVAL_HALVES)
    ]
    plane = _plane(components)
    whole = bhattacharyya_distance(plane[labels], plane[~labels])
    intervals = [
        (whole, whole),
        _jackknife(plane, [principal_plane(components[rows]) for rows in halves], labels, halves),
    ]
    for columns in _possible_planes(components, smallest // 2):
        points = components[:, columns]
        intervals.append(_jackknife(points, [points[rows] for rows in halves], labels, halves))
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _possible_planes(components: Array, half: int) -> list[list[int]]:
    """Columns of the components that may be the law's plane, where the second is tied with others: pairs of them.

    With the first, unless it is tied too. Also several of them together, since no plane in their space has a larger
    distance: at most a tenth of ``half``, the points of a class from which each covariance is estimated.
    """
    tied = _tied_components(components)[:TIED_PLANES]
    if not tied:
        return []
    variances = components.var(0, ddof=1)
    first_too = bool(_is_tied(variances[0], variances[1], len(components)))
    chosen = [0, 1, *tied]
    pairs = [list(pair) for pair in combinations(chosen, 2) if first_too or 0 in pair]
    together = chosen[: half // 10]
    return pairs + ([together] if len(together) > 2 else [])


def _jackknife(
    points: Array, of_halves: Sequence[Array], labels: Labels, halves: Sequence[NDArray[np.int64]]
) -> tuple[float, float]:
    """95% interval of the distance of all ``points``, by how far that of each half deviates."""
    whole = bhattacharyya_distance(points[labels], points[~labels])
    distances = [
        bhattacharyya_distance(part[labels[rows]], part[~labels[rows]])
        for part, rows in zip(of_halves, halves, strict=True)
    ]
    low, high = np.quantile(distances, [0.025, 0.975])
    return max(0.0, float(2 * whole - high)), max(0.0, float(2 * whole - low))


def _tied_components(components: Array) -> list[int]:
    """Components beyond the second whose variance is not significantly below the second's."""
    if components.shape[1] < 3:
        return []
    variances = components.var(0, ddof=1)
    tied = _is_tied(variances[1], variances[2:], len(components)) & (variances[2:] > 0)
    return [int(number) for number in 2 + np.flatnonzero(tied)]


def _is_tied(larger: Any, smaller: Any, n: int) -> Any:
    """Whether variances of n points do not differ significantly (5%): the standard error of v is v sqrt(2 / n), by
    normal theory.
    """
    return larger - smaller <= Z * np.sqrt(2 / n) * np.hypot(larger, smaller)


def principal_plane(hidden: Array) -> Array:
    """Coordinates [n, 2] on the first two principal components of both classes; zeros for a missing second."""
    return _plane(_principal_components(hidden))


def _principal_components(hidden: Array) -> Array:
    """Coordinates [n, min(n, d)] along all principal components."""
    from sklearn.decomposition import PCA

    if not np.ptp(hidden, axis=0).any():
        return np.zeros((len(hidden), 1))
    components: Array = PCA(svd_solver="full").fit_transform(hidden)
    return components


def _plane(components: Array) -> Array:
    return np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1]))))


def length_auc(harmful: Labels, lengths: NDArray[np.int64], counts: Sequence[int] | None = None) -> float:
    """AUC of the classes by token length alone, at least 0.5; ``counts``: how often each row occurs."""
    from sklearn.metrics import roc_auc_score

    auc = float(roc_auc_score(harmful, lengths, sample_weight=counts))
    return max(auc, 1 - auc)


def length_matched(harmful: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the largest subset with as many prompts of one class as of the other at each token length; earlier rows
    first.
    """
    chosen: list[int] = []
    for length in np.unique(lengths):
        classes = [np.flatnonzero((lengths == length) & (harmful == label)) for label in (True, False)]
        count = min(map(len, classes))
        chosen += [int(row) for rows in classes for row in rows[:count]]
    return np.array(sorted(chosen), dtype=np.int64)


def control_notes(result: SeparationMetrics) -> list[str]:
    """Warnings of the controls, as sentences."""
    notes, figures = [], result.figures
    if result.length_auc >= 0.7:
        notes.append(
            f"token length alone separates these prompts with AUC {result.length_auc:.2f}: use the length-matched ones"
        )
    if result.matched is not None and result.subset is not None and result.matched.d_b < 0.5 * result.subset.d_b:
        notes.append(
            "the length-matched prompts have less than half of the D_B of as many prompts at random: length explains "
            "most of it"
        )
    if figures.mahalanobis is None:
        notes.append("the Mahalanobis distance cannot be told: these prompts are too few for the dimensions they need")
    if result.tied_components and result.d_b_interval is not None:
        notes.append(
            f"other prompts may have another plane for D_B: {result.tied_components} more components have about as much"
            f" variance as its second; the interval covers planes of up to {TIED_PLANES} of them"
        )
    if result.shuffled.d_b > 0.5 * figures.d_b or result.d_b_p > 0.05:
        notes.append(
            f"D_B in the plane is hardly above chance: shuffled labels have {result.shuffled.d_b:.2f} on average, and "
            f"no less than the true labels in {result.d_b_p:.1%} of permutations"
        )
    return notes


def metric_values(result: SeparationMetrics) -> dict[str, float]:
    """Values by metric name, controls included; without values that could not be computed."""
    values: dict[str, float | None] = {"separation/length_auc": result.length_auc, "separation/d_b_p": result.d_b_p}
    for ending, figures in (
        ("", result.figures),
        ("_length_matched", result.matched),
        ("_subset", result.subset),
        ("_shuffled", result.shuffled),
    ):
        if figures is not None:
            values |= {f"separation/{name}{ending}": value for name, value in asdict(figures).items()}
    return {name: value for name, value in values.items() if value is not None}
