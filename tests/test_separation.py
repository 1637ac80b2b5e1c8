"""Separation: the distance against its closed form, and the controls against data made to fool it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raydiv.hidden.separation import (
    Separation,
    as_row,
    bhattacharyya_distance,
    explain,
    length_matched,
    principal_plane,
    separation_of,
)

Array = NDArray[np.float64]

generator = np.random.default_rng


def sample(mean: list[float], covariance: list[list[float]], n: int, seed: int = 0) -> Array:
    """Points whose sample mean and sample covariance are exactly those given."""
    raw = generator(seed).normal(size=(n, len(mean)))
    centred = raw - raw.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred, rowvar=False).reshape(len(mean), -1))).T
    points: Array = white @ np.linalg.cholesky(np.array(covariance)).T + np.array(mean)
    return points


UNIT = [[1.0, 0.0], [0.0, 1.0]]
SKEWED = [[2.0, 0.6], [0.6, 0.5]]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # equal covariances: an eighth of the squared Mahalanobis distance
        (([0, 0], UNIT), ([2, 0], UNIT), 4 / 8),
        (([1, 1], UNIT), ([4, 5], UNIT), 25 / 8),
        (([0, 0], SKEWED), ([1, 0], SKEWED), 0.5 / 0.64 / 8),
        # equal means: ln(det S / sqrt(det S1 det S2)) / 2
        (([0, 0], UNIT), ([0, 0], [[4, 0], [0, 4]]), math.log(2.5**2 / 4) / 2),
        (([0, 0], UNIT), ([0, 0], [[9, 0], [0, 1]]), math.log(5 / 3) / 2),
        # both: S = diag(2.5, 1)
        (([0, 0], UNIT), ([3, 1], [[4, 0], [0, 1]]), (9 / 2.5 + 1) / 8 + math.log(2.5 / 2) / 2),
        # one dimension: (m1 - m2)^2 / (4 (v1 + v2)) + ln((v1 + v2) / (2 s1 s2)) / 2
        (([0], [[1]]), ([3], [[4]]), 9 / 20 + math.log(5 / 4) / 2),
    ],
)
@pytest.mark.parametrize("sizes", [(50, 50), (5, 200)])
def test_distance_is_the_closed_form(
    first: tuple[list[float], list[list[float]]],
    second: tuple[list[float], list[list[float]]],
    expected: float,
    sizes: tuple[int, int],
) -> None:
    one, two = sample(*first, sizes[0], seed=1), sample(*second, sizes[1], seed=2)
    assert bhattacharyya_distance(one, two) == pytest.approx(expected, rel=1e-6)


def test_distance_is_symmetric_and_zero_with_itself() -> None:
    one, two = generator(0).normal(size=(20, 2)), 3 * generator(1).normal(size=(30, 2)) + 1
    assert bhattacharyya_distance(one, two) == pytest.approx(bhattacharyya_distance(two, one))
    assert bhattacharyya_distance(one, two) > 0
    assert bhattacharyya_distance(one, one) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_distance_does_not_follow_scale_or_place(scale: float) -> None:
    one, two = sample([0, 0], UNIT, 30), sample([2, 0], SKEWED, 30, seed=1)
    moved = bhattacharyya_distance(scale * one + 10 * scale, scale * two + 10 * scale)
    assert moved == pytest.approx(bhattacharyya_distance(one, two), rel=1e-5)


TWO = generator(0).normal(size=(30, 2))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.column_stack([TWO[:, 0], np.zeros(30)]), np.column_stack([TWO[:, 1], np.zeros(30)])),
        (np.column_stack([TWO[:, 0], np.zeros(30)]), TWO),
        (np.ones((5, 2)), np.ones((7, 2))),
        (np.zeros((5, 2)), np.full((5, 2), 10.0)),
        (TWO[:2], TWO[2:]),
        (TWO[:2], TWO[2:4]),
        (TWO[:3], TWO[3:6] + 100),
        (TWO[:1], TWO[1:]),
    ],
    ids=[
        "constant feature",
        "constant in one class",
        "all the same",
        "each class a point",
        "two points",
        "two and two points",
        "three points, far apart",
        "one point",
    ],
)
def test_distance_of_flat_and_tiny_samples_is_finite(first: Array, second: Array) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = bhattacharyya_distance(first, second)
    assert math.isfinite(distance)
    assert distance >= -1e-9


def test_principal_plane_keeps_the_widest_directions() -> None:
    raw = generator(0).normal(size=(200, 6)) * np.array([0.1, 5, 0.2, 3, 0.3, 0.1])
    plane = principal_plane(raw)
    assert plane.shape == (200, 2)
    centred = raw - raw.mean(0)
    for component, column in ((0, 1), (1, 3)):
        assert abs(np.corrcoef(plane[:, component], centred[:, column])[0, 1]) > 0.98


@pytest.mark.parametrize(
    ("harmful", "lengths", "rows"),
    [
        ([1, 1, 0, 0], [5, 5, 5, 5], [0, 1, 2, 3]),
        ([1, 1, 1, 0], [5, 5, 5, 5], [0, 3]),
        ([0, 1, 1, 0, 0], [3, 3, 4, 3, 4], [0, 1, 2, 4]),
        ([1, 1, 0, 0], [1, 2, 3, 4], []),
        ([1, 0, 0, 0], [7, 7, 7, 8], [0, 1]),
        ([], [], []),
    ],
)
def test_length_matched_rows(harmful: list[int], lengths: list[int], rows: list[int]) -> None:
    assert length_matched(np.array(harmful, bool), np.array(lengths, np.int64)).tolist() == rows


def test_length_matched_is_balanced_at_every_length_and_largest() -> None:
    harmful, lengths = generator(0).random(300) < 0.3, generator(1).integers(5, 20, 300)
    rows = length_matched(harmful, lengths)
    assert len(set(rows.tolist())) == len(rows)
    expected = 0
    for length in range(5, 20):
        at = lengths[rows] == length
        assert (harmful[rows] & at).sum() == (~harmful[rows] & at).sum()
        expected += 2 * min((harmful & (lengths == length)).sum(), (~harmful & (lengths == length)).sum())
    assert len(rows) == expected


def clouds(shift: float, n: int = 80, seed: int = 0) -> tuple[Array, NDArray[np.bool_]]:
    """Two Gaussian clouds in 16 dimensions, ``shift`` standard deviations apart along one."""
    harmful = np.arange(n) % 2 == 0
    hidden = generator(seed).normal(size=(n, 16)) * np.array([1.0, 1.0, *[0.05] * 14])
    hidden[harmful, 0] += shift
    return hidden, harmful


def test_well_separated_clouds_are_far_apart_and_chance_is_not() -> None:
    hidden, harmful = clouds(8)
    lengths = np.full(80, 12)
    found = separation_of(hidden, harmful, lengths)
    assert found.d_b > 4
    assert found.d_b_shuffled < 0.1
    assert found.bhattacharyya_coefficient == pytest.approx(math.exp(-found.d_b))
    assert found.length_auc == 0.5
    assert found.length_matched == 80
    assert found.d_b_length_matched == pytest.approx(found.d_b, rel=1e-9)
    assert explain(found) == []


def test_overlapping_clouds_are_no_further_than_chance() -> None:
    hidden, harmful = clouds(0)
    found = separation_of(hidden, harmful, np.full(80, 12))
    assert found.d_b < 0.15
    assert found.d_b < 4 * found.d_b_shuffled


def test_separation_grows_with_the_shift() -> None:
    found = [separation_of(*clouds(shift), np.full(80, 12)) for shift in (0, 1, 2, 4, 8)]
    for figure in ("d_b", "silhouette"):
        values = [getattr(one, figure) for one in found]
        assert values == sorted(values)


def test_silhouette_is_sklearns_in_the_plane() -> None:
    from sklearn.metrics import silhouette_score

    hidden, harmful = clouds(3)
    found = separation_of(hidden, harmful, np.full(80, 12))
    centred = hidden - hidden.mean(0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    assert found.silhouette == pytest.approx(silhouette_score(plane, harmful), abs=1e-9)
    assert found.d_b == pytest.approx(bhattacharyya_distance(plane[harmful], plane[~harmful]), rel=1e-6)


def test_separation_does_not_follow_the_order_or_the_labels_side() -> None:
    hidden, harmful = clouds(2)
    lengths = generator(3).integers(8, 12, 80)
    order = generator(4).permutation(80)
    straight = separation_of(hidden, harmful, lengths)
    for other in (
        separation_of(hidden[order], harmful[order], lengths[order]),
        separation_of(hidden, ~harmful, lengths),
    ):
        assert other.d_b == pytest.approx(straight.d_b)
        assert other.silhouette == pytest.approx(straight.silhouette)
        assert other.length_auc == pytest.approx(straight.length_auc)


def test_separation_is_repeatable_and_its_seed_only_shuffles() -> None:
    hidden, harmful = clouds(2)
    lengths = np.full(80, 12)
    assert separation_of(hidden, harmful, lengths) == separation_of(hidden, harmful, lengths)
    other = separation_of(hidden, harmful, lengths, seed=1)
    assert other.d_b_shuffled != separation_of(hidden, harmful, lengths).d_b_shuffled
    assert replace(other, d_b_shuffled=0) == replace(separation_of(hidden, harmful, lengths), d_b_shuffled=0)


@pytest.mark.parametrize("longer", [True, False])
def test_length_auc_says_how_well_length_tells_the_classes(longer: bool) -> None:
    hidden, harmful = clouds(2)
    lengths = np.where(harmful == longer, 30, 10)
    found = separation_of(hidden, harmful, lengths)
    assert found.length_auc == 1
    assert found.length_matched == 0
    assert found.d_b_length_matched is None
    assert any("length" in note for note in explain(found))


def test_states_that_follow_length_alone_are_found_out() -> None:
    harmful = np.arange(120) % 2 == 0
    lengths = np.where(generator(1).random(120) < 0.2, 20, np.where(harmful, 30, 10))
    hidden = generator(0).normal(size=(120, 8))
    hidden[:, 0] += lengths
    found = separation_of(hidden, harmful, lengths)
    assert found.d_b > 1
    assert found.d_b_length_matched is not None
    assert found.d_b_length_matched < 0.5
    notes = " ".join(explain(found))
    assert "AUC" in notes
    assert "length explains" in notes


def test_few_prompts_are_measured_and_doubted() -> None:
    hidden, harmful = clouds(1, n=6)
    found = separation_of(hidden, harmful, np.full(6, 9))
    figures = [value for value in as_row(found).values() if value is not None]
    assert all(math.isfinite(value) for value in figures)
    assert any("chance" in note for note in explain(found))


PLAIN = Separation(2.0, math.exp(-2), 0.5, 0.55, 100, 1.8, 0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length_auc": 0.91}, "0.91"),
        ({"d_b_length_matched": 0.6}, "length explains"),
        ({"d_b_shuffled": 1.2}, "chance"),
    ],
)
def test_each_control_speaks_for_itself(changes: dict[str, Any], words: str) -> None:
    assert explain(PLAIN) == []
    (note,) = explain(replace(PLAIN, **changes))
    assert words in note


def test_all_controls_may_speak_at_once() -> None:
    assert len(explain(replace(PLAIN, length_auc=0.9, d_b_length_matched=0.1, d_b_shuffled=1.5))) == 3


def test_row_names_the_metrics() -> None:
    row = as_row(PLAIN)
    assert row["separation/d_b"] == 2.0
    assert row["separation/d_b_length_matched"] == 1.8
    assert set(row) == {
        f"separation/{name}" for name in ("d_b", "d_b_length_matched", "d_b_shuffled", "silhouette", "length_auc")
    }
