"""Distances of two Gaussians, from samples or from their moments. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]

RIDGE = 1e-9
"""Added to the diagonal of covariances, relative to the mean variance: keeps distances of flat or tiny samples finite.
"""


def bhattacharyya_distance(first: Array, second: Array) -> float:
    """Distance of two Gaussians fitted to samples [n, d] and [m, d]."""
    spread = float(np.concatenate([first, second]).var(0).mean())
    difference = first.mean(0) - second.mean(0)
    return bhattacharyya_from_moments(difference, _covariance(first), _covariance(second), spread)


def bhattacharyya_from_moments(difference: Array, first: Array, second: Array, spread: float) -> float:
    """Distance of two Gaussians with covariances ``first`` and ``second`` [d, d] (Haldar et al. 2025, who define
    separation by it).

    1/8 dm' S^-1 dm + 1/2 log(det S / sqrt(det S1 det S2)), S = (S1 + S2)/2. Uses log-determinants. Each covariance gets
    a ridge relative to ``spread``, the mean variance of all points.
    """
    if spread == 0:
        return 0.0
    ridge = np.eye(len(difference)) * (RIDGE * spread)
    first, second = first + ridge, second + ridge
    mean = (first + second) / 2
    log_dets = [np.linalg.slogdet(matrix)[1] for matrix in (mean, first, second)]
    mahalanobis = difference @ np.linalg.solve(mean, difference)
    return float(mahalanobis / 8 + (log_dets[0] - (log_dets[1] + log_dets[2]) / 2) / 2)


def _covariance(sample: Array) -> Array:
    """Covariance [d, d]; zero for a single point."""
    if len(sample) < 2:
        return np.zeros((sample.shape[1], sample.shape[1]))
    return np.atleast_2d(np.cov(sample, rowvar=False))


def frechet_distance(first: Array, second: Array) -> float:
    """Squared Frechet distance of two Gaussians fitted to samples [n, d] and [m, d].

    The trace of the root in ``frechet_of`` is the sum of the singular values of X1 X2' / sqrt((n - 1)(m - 1)) of the
    centred samples X1 and X2, which needs no d x d matrix.
    """
    first_centred, second_centred = first - first.mean(0), second - second.mean(0)
    degrees = max(1, len(first) - 1), max(1, len(second) - 1)
    traces = (first_centred**2).sum() / degrees[0] + (second_centred**2).sum() / degrees[1]
    root_trace = np.linalg.svd(first_centred @ second_centred.T, compute_uv=False).sum() / np.sqrt(
        degrees[0] * degrees[1]
    )
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + traces - 2 * root_trace)


def frechet_from_moments(difference: Array, first: Array, second: Array) -> float:
    """Squared Frechet distance of two Gaussians with covariances ``first`` and ``second`` [d, d] (Dowson and Landau
    1982).

    |dm|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).
    """
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    root_trace = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * root_trace)
