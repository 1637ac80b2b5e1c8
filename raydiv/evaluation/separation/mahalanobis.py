"""Squared Mahalanobis distance of two classes in all dimensions, comparable over numbers of prompts and of dimensions.

What is estimated does not depend on the sample: dm' C^-1 dm, where dm is the difference of the classes' means in units
of each dimension's standard deviation within the classes, and C = (1 - s) R + s I is their correlation R within the
classes, shrunk by a fixed s = SHRINKAGE. It does not follow the scale of a dimension.

The estimate inverts the sample correlation R^ with a smaller ridge: a (R^ + r I)^-1 has the expectation
(R + k I)^-1, k = s / (1 - s), for r = k a (Ledoit and Peche 2011; for r = 0 it is Hotelling's correction). a follows
from the leverages of the prompts, so that it holds for elliptical laws with heavy tails as well (El Karoui 2013). What
the noise of the two means adds is subtracted: two samples of one law have 0 on average, and about half of them less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydiv.evaluation.separation.distances import RIDGE, Array, Labels

SHRINKAGE = 0.9
"""Share of the identity in the shrunk correlation: so large that 1,000 prompts suffice in 4,096 dimensions."""

LARGEST_SHARE = 0.5
"""Largest effective dimension, as a share of the degrees of freedom, at which the estimate is trusted."""

MIN_CLASS_SIZE = 10
"""Fewest prompts of a class from which the distance is estimated."""

JACKKNIFE_GROUPS = 20
"""Groups of prompts that are left out in turn for an interval."""

_KAPPA = SHRINKAGE / (1 - SHRINKAGE)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What the estimate needs to know of two classes of ``counts`` prompts.

    ``eigenvalues`` [r] of the correlation within the classes, at least 0; ``projections`` [r] of the difference of
    means in standard deviations on its eigenvectors; ``outside``: squared norm of what lies outside of their span.
    ``squares`` [n, r]: each prompt's squared coordinates in units of the eigenvectors, for its leverage; None where all
    prompts are taken to have the same.
    """

    counts: tuple[int, int]
    eigenvalues: Array
    projections: Array
    outside: float
    squares: Array | None = None

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the correlation."""
        return sum(self.counts) - 2

    def dimension(self, ridge: float) -> float:
        """The effective dimension tr R^ (R^ + ridge I)^-1."""
        return float((self.eigenvalues / (self.eigenvalues + ridge)).sum())

    def scale(self, ridge: float) -> float:
        """The scale a of the module's docstring: mean h / mean(h / (1 - h)) for leverages h."""
        if self.squares is None:
            return 1 - self.dimension(ridge) / self.degrees
        leverages = self.squares @ (self.eigenvalues / (self.eigenvalues + ridge))
        leverages = (leverages * (len(leverages) / self.degrees)).clip(max=1 - 1e-12)
        odds = float((leverages / (1 - leverages)).mean())
        return float(leverages.mean()) / odds if odds else 1.0

    def distance(self) -> float | None:
        """The squared distance; None where there are too few prompts to trust the estimate."""
        ridge = self._ridge()
        if ridge is None or min(self.counts) < MIN_CLASS_SIZE:
            return None
        return self._estimate(ridge) if self.dimension(ridge) <= LARGEST_SHARE * self.degrees else None

    def estimate(self) -> float | None:
        """The estimate, however few prompts there are; None where it has none."""
        ridge = self._ridge()
        return None if ridge is None else self._estimate(ridge)

    def _estimate(self, ridge: float) -> float:
        share = self.dimension(ridge) / self.degrees
        squared = float((self.projections**2 / (self.eigenvalues + ridge)).sum()) + self.outside / ridge
        noise = sum(1 / count for count in self.counts) * self.degrees * share / (1 - share)
        return (ridge / _KAPPA) * (squared - noise) / (1 - SHRINKAGE)

    def _ridge(self) -> float | None:
        """The ridge r = k a(r) of the sample; None where only r = 0 solves it."""
        from scipy.optimize import brentq

        def excess(ridge: float) -> float:
            return ridge - _KAPPA * self.scale(ridge)

        # a is at most 1, up to rounding
        smallest, largest = 1e-6 * _KAPPA, (1 + 1e-9) * _KAPPA
        return float(brentq(excess, smallest, largest)) if excess(smallest) < 0 else None


def mahalanobis(hidden: Array, labels: Labels) -> float | None:
    """The squared distance of hidden states [n, d] of two classes with labels [n]; None for too few prompts."""
    return None if min(labels.sum(), (~labels).sum()) < MIN_CLASS_SIZE else spectrum(hidden, labels).distance()


def spectrum(hidden: Array, labels: Labels) -> Spectrum:
    """Of hidden states [n, d] of two classes with labels [n], at least two of each."""
    counts = int(labels.sum()), int((~labels).sum())
    first, second = hidden[labels].mean(0), hidden[~labels].mean(0)
    within = hidden - np.where(labels[:, None], first, second)
    degrees = sum(counts) - 2
    deviations = standard_deviations((within**2).sum(0) / degrees, hidden.var(0))
    within /= deviations
    # 1 / variance is overestimated by (kurtosis - 1) / degrees, to first order
    excess = ((within**4).mean(0) - 1).clip(min=0) / degrees
    difference = (first - second) / deviations / np.sqrt(1 + excess)
    left, singular, projections = _decomposed(within, difference)
    outside = max(0.0, float(difference @ difference - projections @ projections))
    return Spectrum(counts, singular**2 / degrees, projections, outside, left**2)


def _decomposed(within: Array, difference: Array) -> tuple[Array, Array, Array]:
    """Left singular vectors [n, r] and values [r] of ``within`` [n, d], and the projections [r] of ``difference`` [d].

    From the smaller of the two Gram matrices, some ten times as fast as a singular value decomposition.
    """
    wide = within.shape[0] < within.shape[1]
    squared, vectors = np.linalg.eigh(within @ within.T if wide else within.T @ within)
    kept = squared > 1e-12 * max(squared[-1], 1e-300)
    singular, vectors = np.sqrt(squared[kept]), vectors[:, kept]
    if wide:
        return vectors, singular, (vectors.T @ (within @ difference)) / singular
    return (within @ vectors) / singular, singular, vectors.T @ difference


def distance_of_moments(counts: tuple[int, int], difference: Array, within: Array) -> float | None:
    """The squared distance from the classes' difference of means [d] and pooled scatter within them [d, d].

    Without the states neither leverages nor kurtoses are known, so both are taken to be a Gaussian's. That changes
    little where prompts are as many as to be streamed.
    """
    degrees = sum(counts) - 2
    between = difference**2 * (counts[0] * counts[1] / sum(counts) ** 2)
    deviations = standard_deviations(np.diag(within) / degrees, np.diag(within) / sum(counts) + between)
    eigenvalues, vectors = np.linalg.eigh(within / degrees / np.outer(deviations, deviations))
    projections = vectors.T @ (difference / deviations) / np.sqrt(1 + 2 / degrees)
    return Spectrum(counts, eigenvalues.clip(min=0), projections, 0.0).distance()


def standard_deviations(within: Array, total: Array) -> Array:
    """Standard deviations [d] of variances within the classes [d]; a dimension that is constant in both has a floor."""
    variances = within + RIDGE * total
    deviations: Array = np.sqrt(np.where(variances > 0, variances, 1.0))
    return deviations


def mahalanobis_interval(
    hidden: Array, labels: Labels, distance: float | None, generator: np.random.Generator
) -> tuple[float, float] | None:
    """95% interval of ``distance``, that of all prompts, by a jackknife over groups of them; None where it is None."""
    from scipy.stats import t

    if distance is None:
        return None
    groups = np.empty(len(labels), dtype=np.int64)
    rows = np.concatenate([generator.permutation(np.flatnonzero(labels == label)) for label in (True, False)])
    groups[rows] = np.arange(len(rows)) % JACKKNIFE_GROUPS
    values = []
    for group in range(JACKKNIFE_GROUPS):
        kept = groups != group
        value = spectrum(hidden[kept], labels[kept]).estimate()
        if value is None:
            return None
        values.append(value)
    error = float(np.sqrt((JACKKNIFE_GROUPS - 1) * np.var(values)))
    half = float(t.ppf(0.975, JACKKNIFE_GROUPS - 1)) * error
    return distance - half, distance + half
