"""How far two clouds of hidden states lie apart, and what of it prompt length or chance explains. Pure numpy.

Covariances are those of the space that the points span, of r <= n - 1 dimensions: distances and products there are those of all
d, at a cost that does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.evaluation.separation.distances import RIDGE, Array, Labels, bhattacharyya_distance, frechet_distance

SHUFFLES = 199
"""Label permutations behind the p-value."""

CHANCE = 20
"""Label permutations whose mean is taken off d_b_full."""

CONTROLS = 10
"""Label permutations behind the other figures of the shuffled-label control."""

HALVES = 200
"""Halves of the prompts behind an interval."""

FOLDS = 5
"""Parts of the prompts, each held out once from the probes."""

SMALLEST = 3
"""Prompts of a class below which a subset is not measured."""


@dataclass(frozen=True, slots=True)
class SeparationStatistics:
    """Separation of harmful from harmless prompts in one layer.

    ``d_b``: Bhattacharyya distance in the plane of the first two principal components, the papers' protocol, and ``silhouette``
    in the same plane. In all dimensions: ``d_b_full``, the distance under a pooled covariance (Ledoit and Wolf's) less its mean
    under permuted labels, so that two samples of one law give about 0 however few they are; ``frechet``, the squared Frechet
    distance, in the states' own units; ``probe_auc`` and ``difference_auc``, held-out AUC of a logistic regression and of the
    difference of the classes' means (0.5: chance; None where a class has fewer prompts than there are folds).
    """

    d_b: float
    silhouette: float
    d_b_full: float
    frechet: float
    probe_auc: float | None
    difference_auc: float | None


@dataclass(frozen=True, slots=True)
class SeparationMetrics:
    """Figures of all prompts with their controls, which are the same figures of others.

    ``matched``: of the ``length_matched`` prompts, as many of each class at every token length, None below 3 a class;
    ``shuffled``: means under permuted labels, what chance gives. ``length_auc``: how well token length alone tells the classes
    apart (0.5 not at all). ``d_b_p``: share of permutations whose d_b is no smaller, the true labels counted among them;
    ``d_b_interval``: 95%, by how far halves of the prompts deviate from all (the delete-half jackknife, whose deviations are
    as large as those of n prompts from their law; a bootstrap's repeated points bias covariances where n < d); None below 4
    a class.
    """

    figures: SeparationStatistics
    length_auc: float
    length_matched: int
    matched: SeparationStatistics | None
    shuffled: SeparationStatistics
    d_b_p: float
    d_b_interval: tuple[float, float] | None


def separation_metrics(
    hidden: Array, harmful: Labels, lengths: NDArray[np.int64], *, resampled: bool = True, seed: int = 0
) -> SeparationMetrics:
    """Separation of hidden states [n, d] of prompts with labels ``harmful`` [n] and token ``lengths`` [n].

    Without ``resampled`` there is no interval.
    """
    generator = np.random.default_rng(seed)
    cloud = _Cloud.of(hidden)
    expected = cloud.by_chance(harmful, generator)
    figures = _figures(cloud, harmful, expected)
    chance = np.array([cloud.distance(generator.permutation(harmful)) for _ in range(SHUFFLES)])
    shuffled = [_figures(cloud, generator.permutation(harmful), expected) for _ in range(CONTROLS)]
    rows = length_matched(harmful, lengths)
    matched = None
    if len(rows) >= 2 * SMALLEST:
        part = _Cloud.of(hidden[rows])
        matched = _figures(part, harmful[rows], part.by_chance(harmful[rows], generator))
    return SeparationMetrics(
        figures=figures,
        length_auc=length_auc(harmful, lengths),
        length_matched=len(rows),
        matched=matched,
        shuffled=replace(_mean(shuffled), d_b=float(chance.mean())),
        d_b_p=(1 + int((chance >= figures.d_b).sum())) / (1 + SHUFFLES),
        d_b_interval=_d_b_interval(cloud.points, harmful, figures.d_b, generator) if resampled else None,
    )


@dataclass(frozen=True, slots=True)
class _Cloud:
    """Hidden states [n, d], their coordinates ``points`` [n, r] in the space that they span, and ``plane`` [n, 2] of it."""

    hidden: Array
    points: Array
    plane: Array

    @classmethod
    def of(cls, hidden: Array) -> _Cloud:
        components = _components(hidden)
        sizes = np.linalg.norm(components, axis=0)
        rank = max(1, int((sizes > 1e-10 * sizes[0]).sum()))
        return cls(hidden, components[:, :rank], _plane(components))

    def distance(self, labels: Labels) -> float:
        """D_B in the plane."""
        return bhattacharyya_distance(self.plane[labels], self.plane[~labels])

    def pooled_distance(self, labels: Labels) -> float:
        """D_B in all dimensions, of two Gaussians with the covariance of all points around their classes' means."""
        from sklearn.covariance import LedoitWolf

        spread = float(self.points.var(0).mean())
        if spread == 0:
            return 0.0
        means = [self.points[side].mean(0) for side in (labels, ~labels)]
        within = self.points - np.where(labels[:, None], *means)
        covariance = LedoitWolf(assume_centered=True).fit(within).covariance_ + RIDGE * spread * np.eye(len(means[0]))
        difference = means[0] - means[1]
        return float(difference @ np.linalg.solve(covariance, difference)) / 8

    def by_chance(self, labels: Labels, generator: np.random.Generator) -> float:
        """Mean pooled_distance of permuted labels, the same for all labels with classes of these sizes."""
        return float(np.mean([self.pooled_distance(generator.permutation(labels)) for _ in range(CHANCE)]))


def _figures(cloud: _Cloud, labels: Labels, by_chance: float) -> SeparationStatistics:
    from sklearn.metrics import silhouette_score

    probe_auc, difference_auc = _held_out(cloud.hidden, labels)
    return SeparationStatistics(
        d_b=cloud.distance(labels),
        silhouette=float(silhouette_score(cloud.plane, labels)),
        d_b_full=cloud.pooled_distance(labels) - by_chance,
        frechet=frechet_distance(cloud.points[labels], cloud.points[~labels]),
        probe_auc=probe_auc,
        difference_auc=difference_auc,
    )


def _mean(several: Sequence[SeparationStatistics]) -> SeparationStatistics:
    """Of each figure; of figures of permuted labels, which have all of them or lack the same."""
    columns = zip(*map(astuple, several), strict=True)
    means: list[Any] = [None if None in column else float(np.mean(column)) for column in columns]
    return SeparationStatistics(*means)


def _held_out(hidden: Array, labels: Labels) -> tuple[float | None, float | None]:
    """AUC of a logistic regression and of the difference of means, each mean over the folds that they did not see."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(labels.sum(), (~labels).sum()) < FOLDS:
        return None, None
    found = []
    for seen, unseen in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(hidden, labels):
        own = labels[seen]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(hidden[seen], own)
        difference = hidden[seen][own].mean(0) - hidden[seen][~own].mean(0)
        scores = (probe.decision_function(hidden[unseen]), hidden[unseen] @ difference)
        found.append([roc_auc_score(labels[unseen], score) for score in scores])
    probe_auc, difference_auc = np.mean(found, axis=0)
    return float(probe_auc), float(difference_auc)


def _d_b_interval(
    points: Array, labels: Labels, whole: float, generator: np.random.Generator
) -> tuple[float, float] | None:
    """95% interval of d_b, whose value of all points is ``whole``."""
    classes = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    if min(map(len, classes)) < 4:
        return None
    deviations = []
    for _ in range(HALVES):
        rows = np.concatenate([generator.permutation(own)[: len(own) // 2] for own in classes])
        plane, half = principal_plane(points[rows]), labels[rows]
        deviations.append(bhattacharyya_distance(plane[half], plane[~half]) - whole)
    low, high = np.quantile(deviations, [0.025, 0.975])
    return max(0.0, float(whole - high)), max(0.0, float(whole - low))


def principal_plane(hidden: Array) -> Array:
    """Coordinates [n, 2] along the first two principal components, fitted on both classes together; 0 where there is one."""
    return _plane(_components(hidden))


def _components(hidden: Array) -> Array:
    """Coordinates along all principal components, of which there are as many as points or dimensions."""
    from sklearn.decomposition import PCA

    if not np.ptp(hidden, axis=0).any():
        return np.zeros((len(hidden), 1))
    components: Array = PCA(svd_solver="full").fit_transform(hidden)
    return components


def _plane(components: Array) -> Array:
    return np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1]))))


def length_auc(harmful: Labels, lengths: NDArray[np.int64], counts: Sequence[int] | None = None) -> float:
    """How well token length alone tells the classes apart, 0.5 not at all; ``counts``: how often each row occurs."""
    from sklearn.metrics import roc_auc_score

    auc = float(roc_auc_score(harmful, lengths, sample_weight=counts))
    return max(auc, 1 - auc)


def length_matched(harmful: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the largest subset with equally many prompts of both classes at every token length, earlier rows first."""
    chosen: list[int] = []
    for length in np.unique(lengths):
        classes = [np.flatnonzero((lengths == length) & (harmful == label)) for label in (True, False)]
        count = min(map(len, classes))
        chosen += [int(row) for rows in classes for row in rows[:count]]
    return np.array(sorted(chosen), dtype=np.int64)


def control_notes(result: SeparationMetrics) -> list[str]:
    """What the controls say, in words."""
    words, figures = [], result.figures
    if result.length_auc >= 0.7:
        words.append(
            f"token length alone separates these prompts with AUC {result.length_auc:.2f}: read the matched figures"
        )
    if result.matched is not None and result.matched.d_b < 0.5 * figures.d_b:
        words.append("matching lengths takes away more than half of the separation: length explains most of it")
    if result.shuffled.d_b > 0.5 * figures.d_b or result.d_b_p > 0.05:
        words.append(
            f"in the plane shuffled labels are {result.shuffled.d_b:.2f} apart on average, and as far as the true ones in "
            f"{result.d_b_p:.1%} of permutations: D_B there is hardly more than chance"
        )
    return words


def metric_values(result: SeparationMetrics) -> dict[str, float]:
    """Figures under their metric names, those of the controls too; without what could not be measured."""
    found: dict[str, float | None] = {"separation/length_auc": result.length_auc, "separation/d_b_p": result.d_b_p}
    for ending, figures in (("", result.figures), ("_length_matched", result.matched), ("_shuffled", result.shuffled)):
        if figures is not None:
            found |= {f"separation/{name}{ending}": value for name, value in asdict(figures).items()}
    return {name: value for name, value in found.items() if value is not None}
