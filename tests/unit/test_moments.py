"""Statistics that merge: the same as of all points at once, in any order and any parts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from raydiv.evaluation.separation.distances import bhattacharyya_distance, frechet_distance
from raydiv.evaluation.separation.metrics import principal_plane
from raydiv.evaluation.separation.moments import Moments, StreamedMoments

Array = NDArray[np.float64]


def clouds(n: int, d: int, shift: float, seed: int = 0) -> tuple[Array, NDArray[np.bool_]]:
    """Two clouds of unequal covariance and size."""
    generator = np.random.default_rng(seed)
    labels = generator.random(n) < 0.4
    points = generator.normal(size=(n, d)) * np.where(labels[:, None], np.linspace(1, 3, d), np.linspace(2, 1, d)) + 5
    points[labels, 0] += shift
    return points, labels


def streamed(points: Array, labels: NDArray[np.bool_], parts: int) -> StreamedMoments:
    found = StreamedMoments()
    for rows in np.array_split(np.random.default_rng(1).permutation(len(points)), parts):
        found.add(points[rows, None], labels[rows], (rows % 7).tolist())
    return found


@pytest.mark.parametrize("parts", [1, 2, 13, 60])
def test_merged_moments_are_those_of_the_whole(parts: int) -> None:
    points, _ = clouds(60, 5, 1.0)
    pieces = [Moments.of(piece) for piece in np.array_split(points, parts)]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole.merged(piece)
    assert whole.count == 60
    np.testing.assert_allclose(whole.mean, points.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(points, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("parts", [1, 7, 200])
@pytest.mark.parametrize("d", [2, 6])
def test_streamed_figures_are_those_of_all_states_at_once(parts: int, d: int) -> None:
    points, labels = clouds(400, d, 2.0)
    found = streamed(points, labels, parts).statistics(0)
    plane = principal_plane(points)
    assert (found.harmful, found.harmless) == (labels.sum(), (~labels).sum())
    assert found.d_b == pytest.approx(bhattacharyya_distance(plane[labels], plane[~labels]), rel=1e-8)
    assert found.frechet == pytest.approx(frechet_distance(points[labels], points[~labels]), rel=1e-8)


def test_length_auc_is_scikit_learns() -> None:
    from sklearn.metrics import roc_auc_score

    points, labels = clouds(300, 2, 1.0)
    lengths = (np.random.default_rng(5).integers(3, 9, 300) + 2 * labels).tolist()
    found = StreamedMoments()
    for rows in np.array_split(np.arange(300), 11):
        found.add(points[rows, None], labels[rows], [lengths[row] for row in rows])
    assert found.statistics(0).length_auc == pytest.approx(roc_auc_score(labels, lengths))


def test_constant_states_are_no_distance_apart() -> None:
    labels = np.arange(20) % 2 == 0
    found = streamed(np.ones((20, 3)), labels, 2).statistics(0)
    assert (found.d_b, found.mahalanobis, found.frechet) == (0, 0, 0)


def test_memory_does_not_grow_with_the_number_of_states() -> None:
    points, labels = clouds(2000, 8, 1.0)
    found = streamed(points, labels, 100)
    assert {moments.scatter.shape for moments in found.moments.values()} == {(8, 8)}
    assert len(found.moments) == 2
