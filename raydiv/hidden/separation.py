"""How far two clouds of hidden states lie apart, and what of it prompt length alone explains. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHUFFLES = 50
"""Label permutations behind the shuffled-label control."""


@dataclass(frozen=True, slots=True)
class Separation:
    """Separation of harmful from harmless prompts by the papers' protocol, with its controls.

    ``d_b``: Bhattacharyya distance in the plane of the first two principal components; ``bhattacharyya_coefficient`` =
    exp(-d_b); ``silhouette`` in the same plane. ``length_auc``: how well token length alone tells the classes apart (0.5
    not at all); ``d_b_length_matched``: d_b of the ``length_matched`` prompts, as many of each class at every token
    length, None below 3 a class; ``d_b_shuffled``: mean d_b under permuted labels, what chance gives.
    """

    d_b: float
    bhattacharyya_coefficient: float
    silhouette: float
    length_auc: float
    length_matched: int
    d_b_length_matched: float | None
    d_b_shuffled: float


def separation_of(hidden: Array, harmful: NDArray[np.bool_], lengths: NDArray[np.int64], seed: int = 0) -> Separation:
    """Separation of hidden states [n, d] of prompts with labels ``harmful`` [n] and token ``lengths`` [n]."""
    from sklearn.metrics import roc_auc_score, silhouette_score

    plane = principal_plane(hidden)
    distance = _between(plane, harmful)
    matched = length_matched(harmful, lengths)
    enough = min(harmful[matched].sum(), (~harmful[matched]).sum()) >= 3 if len(matched) else False
    generator = np.random.default_rng(seed)
    shuffled = [_between(plane, generator.permutation(harmful)) for _ in range(SHUFFLES)]
    auc = float(roc_auc_score(harmful, lengths))
    return Separation(
        d_b=distance,
        bhattacharyya_coefficient=float(np.exp(-distance)),
        silhouette=float(silhouette_score(plane, harmful)),
        length_auc=max(auc, 1 - auc),
        length_matched=len(matched),
        d_b_length_matched=_between(principal_plane(hidden[matched]), harmful[matched]) if enough else None,
        d_b_shuffled=float(np.mean(shuffled)),
    )


def _between(points: Array, harmful: NDArray[np.bool_]) -> float:
    return bhattacharyya_distance(points[harmful], points[~harmful])


def principal_plane(hidden: Array) -> Array:
    """Coordinates [n, 2] along the first two principal components, fitted on both classes together."""
    from sklearn.decomposition import PCA

    plane: Array = PCA(n_components=2, svd_solver="full").fit_transform(hidden)
    return plane


def bhattacharyya_distance(first: Array, second: Array, ridge: float = 1e-9) -> float:
    """Distance of two Gaussians fitted to samples [n, d] and [m, d] (Haldar et al. 2025, where separation is defined).

    1/8 dm' S^-1 dm + 1/2 log(det S / sqrt(det S1 det S2)), S = (S1 + S2)/2. Determinants are taken as logarithms, and each
    covariance gets a ``ridge`` relative to the mean variance of all points, so that flat or tiny samples stay finite.
    """
    difference = first.mean(0) - second.mean(0)
    spread = float(np.concatenate([first, second]).var(0).mean())
    if spread == 0:
        return 0.0
    one, two = (_covariance(sample) + np.eye(sample.shape[1]) * (ridge * spread) for sample in (first, second))
    middle = (one + two) / 2
    logs = [np.linalg.slogdet(matrix)[1] for matrix in (middle, one, two)]
    mahalanobis = difference @ np.linalg.solve(middle, difference)
    return float(mahalanobis / 8 + (logs[0] - (logs[1] + logs[2]) / 2) / 2)


def _covariance(sample: Array) -> Array:
    """Covariance [d, d]; zero for a single point."""
    if len(sample) < 2:
        return np.zeros((sample.shape[1], sample.shape[1]))
    return np.atleast_2d(np.cov(sample, rowvar=False))


def length_matched(harmful: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the largest subset with equally many prompts of both classes at every token length, earlier rows first."""
    chosen: list[int] = []
    for length in np.unique(lengths):
        classes = [np.flatnonzero((lengths == length) & (harmful == label)) for label in (True, False)]
        count = min(map(len, classes))
        chosen += [int(row) for rows in classes for row in rows[:count]]
    return np.array(sorted(chosen), dtype=np.int64)


def explain(result: Separation) -> list[str]:
    """What the controls say, in words."""
    words = []
    if result.length_auc >= 0.7:
        words.append(
            f"token length alone separates these prompts with AUC {result.length_auc:.2f}: read the matched figure"
        )
    if result.d_b_length_matched is not None and result.d_b_length_matched < 0.5 * result.d_b:
        words.append("matching lengths takes away more than half of the separation: length explains most of it")
    if result.d_b_shuffled > 0.5 * result.d_b:
        words.append("shuffled labels separate more than half as far: this is hardly more than chance")
    return words


def as_row(result: Separation) -> dict[str, Any]:
    """The figures under their metric names."""
    return {
        "separation/d_b": result.d_b,
        "separation/d_b_length_matched": result.d_b_length_matched,
        "separation/d_b_shuffled": result.d_b_shuffled,
        "separation/silhouette": result.silhouette,
        "separation/length_auc": result.length_auc,
    }
