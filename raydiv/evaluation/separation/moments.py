"""Statistics of more hidden states than memory holds: counts, means and scatters, which merge. O(d^2) a layer. Pure numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raydiv.evaluation.separation.distances import Array, Labels, bhattacharyya_from_moments, frechet_from_moments
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
    """Point estimates over every prompt of a set, as raydiv.evaluation.separation.metrics.SeparationStatistics has them.

    ``d_b_full`` is under the plain pooled covariance, less what chance gives Gaussians (Hotelling); None where there are fewer
    prompts than twice the dimensions, where that covariance is nothing to go by.
    """

    harmful: int
    harmless: int
    d_b: float
    d_b_full: float | None
    frechet: float
    length_auc: float


@dataclass(slots=True)
class StreamedMoments:
    """Both classes' moments in every layer read, and their token lengths; what ``add`` is given is not kept."""

    moments: dict[tuple[bool, int], Moments] = field(default_factory=dict)
    lengths: dict[bool, Counter[int]] = field(default_factory=lambda: {True: Counter(), False: Counter()})

    def add(self, hidden: Array, harmful: Labels, lengths: Sequence[int]) -> None:
        """Take in states [n, layers, d] of prompts with labels [n] and token lengths [n]."""
        for label in (True, False):
            own = np.flatnonzero(harmful == label)
            if not len(own):
                continue
            self.lengths[label].update(lengths[row] for row in own.tolist())
            for layer in range(hidden.shape[1]):
                more, known = Moments.of(hidden[own, layer].astype(np.float64)), self.moments.get((label, layer))
                self.moments[label, layer] = more if known is None else known.merged(more)

    def statistics(self, layer: int) -> StreamedSeparation:
        """Figures of the ``layer``-th of the layers read."""
        one, two = self.moments[True, layer], self.moments[False, layer]
        difference = one.mean - two.mean
        whole = one.merged(two)
        spread = float(np.trace(whole.scatter)) / whole.count / len(difference)
        axes = np.linalg.eigh(whole.scatter)[1][:, -2:]
        first, second = (axes.T @ own.covariance @ axes for own in (one, two))
        in_plane = float(np.trace(axes.T @ whole.scatter @ axes)) / whole.count / axes.shape[1]
        return StreamedSeparation(
            one.count,
            two.count,
            bhattacharyya_from_moments(axes.T @ difference, first, second, in_plane),
            _pooled_distance(one, two) if spread else 0.0,
            frechet_from_moments(difference, one.covariance, two.covariance),
            self._length_auc(),
        )

    def _length_auc(self) -> float:
        harmful, harmless = self.lengths[True], self.lengths[False]
        labels = np.arange(len(harmful) + len(harmless)) < len(harmful)
        return length_auc(labels, np.array([*harmful, *harmless]), [*harmful.values(), *harmless.values()])


def _pooled_distance(one: Moments, two: Moments) -> float | None:
    """D_B under the pooled covariance S, less its mean where both classes have one law.

    D^2 = dm' S^-1 dm has mean f / (f - d - 1) (its value under the laws + d (1/n + 1/m)), with f = n + m - 2 degrees of freedom
    (Hotelling's T^2).
    """
    degrees, d = one.count + two.count - 2, len(one.mean)
    if degrees < 2 * d:
        return None
    pooled, difference = (one.scatter + two.scatter) / degrees, one.mean - two.mean
    squared = float(difference @ np.linalg.lstsq(pooled, difference, rcond=None)[0])
    return (squared * (degrees - d - 1) / degrees - d * (1 / one.count + 1 / two.count)) / 8
