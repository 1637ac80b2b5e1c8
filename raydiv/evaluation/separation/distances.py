"""Distances of two Gaussians, fitted to samples or given by their moments. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]

RIDGE = 1e-9
"""Of the mean variance, what covariances get on their diagonal, so that flat or tiny samples stay finite."""


def bhattacharyya_distance(first: Array, second: Array) -> float:
    """Distance of two Gaussians fitted to samples [n, d] and [m, d]."""
    spread = float(np.concatenate([first, second]).var(0).mean())
    difference = first.mean(0) - second.mean(0)
    return bhattacharyya_from_moments(difference, _covariance(first), _covariance(second), spread)


def bhattacharyya_from_moments(difference: Array, one: Array, two: Array, spread: float) -> float:
    """Distance of two Gaussians with covariances ``one`` and ``two`` [d, d] (Haldar et al. 2025, where separation is defined).

    1/8 dm' S^-1 dm + 1/2 log(det S / sqrt(det S1 det S2)), S = (S1 + S2)/2. Determinants are taken as logarithms, and each
    covariance gets a ridge relative to ``spread``, the mean variance of all points.
    """
    if spread == 0:
        return 0.0
    ridge = np.eye(len(difference)) * (RIDGE * spread)
    one, two = one + ridge, two + ridge
    middle = (one + two) / 2
    logs = [np.linalg.slogdet(matrix)[1] for matrix in (middle, one, two)]
    mahalanobis = difference @ np.linalg.solve(middle, difference)
    return float(mahalanobis / 8 + (logs[0] - (logs[1] + logs[2]) / 2) / 2)


def _covariance(sample: Array) -> Array:
    """Covariance [d, d]; zero for a single point."""
    if len(sample) < 2:
        return np.zeros((sample.shape[1], sample.shape[1]))
    return np.atleast_2d(np.cov(sample, rowvar=False))


def frechet_distance(first: Array, second: Array) -> float:
    """Squared Frechet distance of two Gaussians fitted to samples [n, d] and [m, d].

    The trace of the root in ``frechet_of`` is the sum of the singular values of X1 X2' / sqrt((n - 1)(m - 1)) for centred
    samples X1 and X2, which needs no matrix of d x d.
    """
    one, two = first - first.mean(0), second - second.mean(0)
    degrees = max(1, len(one) - 1), max(1, len(two) - 1)
    spreads = (one**2).sum() / degrees[0] + (two**2).sum() / degrees[1]
    shared = np.linalg.svd(one @ two.T, compute_uv=False).sum() / np.sqrt(degrees[0] * degrees[1])
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + spreads - 2 * shared)


def frechet_from_moments(difference: Array, one: Array, two: Array) -> float:
    """Squared Frechet distance of two Gaussians with covariances ``one`` and ``two`` [d, d] (Dowson and Landau 1982).

    |dm|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).
    """
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(min=0)).sum()
    return float(difference @ difference + np.trace(one) + np.trace(two) - 2 * shared)
