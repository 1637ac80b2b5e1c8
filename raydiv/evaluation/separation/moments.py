"""Streaming statistics of hidden states that do not fit memory: mergeable moments, O(d^2) a layer. Pure numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raydiv.evaluation.separation.distances import Array, Labels, bhattacharyya_from_moments, frechet_from_moments
from raydiv.evaluation.separation.mahalanobis import distance_of_moments
from raydiv.evaluation.separation.metrics import length_auc


@dataclass(frozen=True, slots=True)
class Moments:
    """``count`` points of mean ``mean`` [d]; ``scatter`` [d, d] sums the outer products of their deviations from it."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, points: Array) -> Moments:
        """Moments of points [n, d], n at least 1."""
        mean = points.mean(0)
        centred = points - mean
        return cls(len(points), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of points together (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Array:
        return self.scatter / max(1, self.count - 1)


@dataclass(frozen=True, slots=True)
class StreamedSeparation:
    """Statistics of all prompts of a set; see raydiv.evaluation.separation.metrics.SeparationStatistics.

    ``mahalanobis`` estimates the same distance, by the formulas of Gaussians.
    """

    harmful: int
    harmless: int
    d_b: float
    mahalanobis: float | None
    frechet: float
    length_auc: float


@dataclass(slots=True)
class StreamedMoments:
    """Moments of both classes in each layer, and their token lengths; states are not kept."""

    moments: dict[tuple[bool, int], Moments] = field(default_factory=dict)
    lengths: dict[bool, Counter[int]] = field(default_factory=lambda: {True: Counter(), False: Counter()})

    def add(self, hidden: Array, harmful: Labels, lengths: Sequence[int]) -> None:
        """Add states [n, layers, d] of prompts with labels [n] and token lengths [n]."""
        for label in (True, False):
            rows = np.flatnonzero(harmful == label)
            if not len(rows):
                continue
            self.lengths[label].update(lengths[row] for row in rows.tolist())
            for layer in range(hidden.shape[1]):
                added, known = Moments.of(hidden[rows, layer].astype(np.float64)), self.moments.get((label, layer))
                self.moments[label, layer] = added if known is None else known.merged(added)

    def statistics(self, layer: int) -> StreamedSeparation:
        """Statistics of the layer at index ``layer``."""
        harmful, harmless = self.moments[True, layer], self.moments[False, layer]
        difference = harmful.mean - harmless.mean
        both = harmful.merged(harmless)
        axes = np.linalg.eigh(both.scatter)[1][:, -2:]
        first, second = (axes.T @ moments.covariance @ axes for moments in (harmful, harmless))
        in_plane = float(np.trace(axes.T @ both.scatter @ axes)) / both.count / axes.shape[1]
        return StreamedSeparation(
            harmful.count,
            harmless.count,
            bhattacharyya_from_moments(axes.T @ difference, first, second, in_plane),
            distance_of_moments((harmful.count, harmless.count), difference, harmful.scatter + harmless.scatter),
            frechet_from_moments(difference, harmful.covariance, harmless.covariance),
            self._length_auc(),
        )

    def _length_auc(self) -> float:
        harmful, harmless = self.lengths[True], self.lengths[False]
        labels = np.arange(len(harmful) + len(harmless)) < len(harmful)
        return length_auc(labels, np.array([*harmful, *harmless]), [*harmful.values(), *harmless.values()])
