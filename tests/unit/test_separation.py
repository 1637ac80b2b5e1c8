"""Separation: the distance against its closed form, and the controls against data made to fool it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.stats import norm

from raydiv.evaluation.separation import metrics as module
from raydiv.evaluation.separation.distances import bhattacharyya_distance, frechet_distance
from raydiv.evaluation.separation.metrics import (
    SeparationMetrics,
    SeparationStatistics,
    control_notes,
    length_matched,
    metric_values,
    p_of_all_layers,
    principal_plane,
    separation_metrics,
)

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _fewer_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"P_VALUE_PERMUTATIONS": 49, "CONTROL_DRAWS": 2}.items():
        monkeypatch.setattr(module, name, number)


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
    found = separation_metrics(hidden, harmful, np.full(80, 12))
    assert found.figures.d_b > 4
    assert found.shuffled.d_b < 0.1
    assert found.d_b_p == 1 / (49 + 1)
    assert found.d_b_interval is not None
    low, high = found.d_b_interval
    assert 2 < low < found.figures.d_b < high
    assert found.figures.probe_auc == found.figures.difference_auc == 1
    assert found.length_auc == 0.5
    assert found.length_matched == 80
    assert found.matched is not None
    for name in ("d_b", "silhouette", "frechet", "probe_auc", "difference_auc"):
        assert getattr(found.matched, name) == pytest.approx(getattr(found.figures, name), rel=1e-9), name
    assert control_notes(found) == []


@pytest.mark.parametrize(("n", "d"), [(100, 576), (400, 16)])
def test_samples_of_one_law_are_not_apart(n: int, d: int) -> None:
    """With a covariance for each class, 100 points of one law in 576 dimensions are at a distance of 52."""
    p, probes = [], []
    for seed in range(4):
        hidden, harmful = generator(seed).normal(size=(n, d)), np.arange(n) % 2 == 0
        found = separation_metrics(hidden, harmful, np.full(n, 12))
        p.append(found.d_b_p)
        probes += [found.figures.probe_auc, found.figures.difference_auc]
        probes += [found.shuffled.probe_auc, found.shuffled.difference_auc]
    assert max(p) > 0.2
    assert np.mean(probes) == pytest.approx(0.5, abs=0.1)


def test_distance_in_all_dimensions_is_the_closed_form() -> None:
    """The squared Mahalanobis distance, from many points."""
    hidden, harmful = generator(0).normal(size=(2000, 8)), np.arange(2000) % 2 == 0
    hidden[harmful, 3] += 3
    found = separation_metrics(hidden, harmful, np.full(2000, 12))
    assert found.figures.mahalanobis == pytest.approx(9, rel=0.05)
    assert found.figures.difference_auc == pytest.approx(norm.cdf(3 / math.sqrt(2)), abs=0.01)
    assert found.figures.probe_auc == pytest.approx(norm.cdf(3 / math.sqrt(2)), abs=0.01)
    assert found.figures.frechet == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_frechet_distance_is_the_textbooks(d: int) -> None:
    one, two = generator(0).normal(size=(25, d)), 2 * generator(1).normal(size=(33, d)) + 1
    first, second = (np.atleast_2d(np.cov(points, rowvar=False)) for points in (one, two))
    root = np.real(sqrtm(first @ second))
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert math.isfinite(frechet_distance(one[:1], two))


def test_interval_holds_the_distance_of_the_law() -> None:
    """Most of the time: 95% is asymptotic."""
    held, widths = 0, {}
    for n in (60, 240):
        widths[n] = []
        for seed in range(20):
            hidden, harmful = clouds(3, n=n, seed=seed)
            found = module._d_b_interval(module._principal_components(hidden), harmful, generator(seed))
            assert found is not None
            low, high = found
            held += low <= 9 / 8 <= high
            widths[n].append(high - low)
    assert held >= 32
    # half as wide with four times the prompts
    assert np.mean(widths[240]) == pytest.approx(np.mean(widths[60]) / 2, rel=0.3)


@pytest.mark.parametrize(("harmful", "harmless"), [(8, 8), (12, 12), (10, 100), (50, 50), (60, 8), (7, 100), (4, 4)])
def test_interval_of_few_prompts_with_equal_variances(harmful: int, harmless: int) -> None:
    labels = np.arange(harmful + harmless) < harmful
    for seed in range(4):
        components = module._principal_components(generator(seed).normal(size=(len(labels), 64)))
        interval = module._d_b_interval(components, labels, generator(seed))
        assert (interval is None) == (min(harmful, harmless) < 8)
        if interval is not None:
            low, high = interval
            plane = components[:, :2]
            assert 0 <= low <= bhattacharyya_distance(plane[labels], plane[~labels]) <= high < 5


@pytest.mark.parametrize(("first", "ratio"), [(4, 0.95), (4, 1.05), (3, 0.95)])
def test_interval_holds_the_distance_where_the_second_component_is_nearly_the_third(first: float, ratio: float) -> None:
    """The classes differ along one direction, whose variance is ``ratio`` times that of the second widest of others,
    which is ``first`` or as wide as the first.
    """

    def sample(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        hidden, harmful = generator(seed).normal(size=(2 * n, 8)), np.arange(2 * n) < n
        spread = np.sqrt(9 * ratio / 1.25)  # with means one standard deviation apart, 1.25 times its square
        hidden *= np.array([first, 3, spread, 1, 1, 1, 1, 1])
        hidden[:, 2] += np.where(harmful, spread / 2, -spread / 2)
        return module._principal_components(hidden), harmful

    # the law's plane has the direction, or has it not
    expected = 1 / 8 if ratio > 1 else 0.0
    plane, harmful = sample(20_000, 0)
    assert bhattacharyya_distance(plane[harmful, :2], plane[~harmful, :2]) == pytest.approx(expected, abs=0.01)
    held = tied = 0
    for seed in range(1, 41):
        components, harmful = sample(100, seed)
        low, high = module._d_b_interval(components, harmful, generator(seed)) or (1.0, 0.0)
        held += low <= expected + 1e-9 and expected <= high
        tied += len(module._tied_components(components)) == 1
    assert tied >= 28
    assert held >= 33


def test_separation_grows_with_the_shift() -> None:
    found = [separation_metrics(*clouds(shift), np.full(80, 12)).figures for shift in (0, 1, 2, 4, 8)]
    for figure in ("d_b", "silhouette", "mahalanobis", "frechet"):
        values = [getattr(one, figure) for one in found]
        assert values == sorted(values), figure


def test_overlapping_clouds_are_no_further_than_chance() -> None:
    hidden, harmful = clouds(0)
    found = separation_metrics(hidden, harmful, np.full(80, 12))
    assert found.figures.d_b < 0.15
    assert found.figures.d_b < 4 * found.shuffled.d_b
    assert any("chance" in note for note in control_notes(found))


def test_silhouette_is_sklearns_in_the_plane() -> None:
    from sklearn.metrics import silhouette_score

    hidden, harmful = clouds(3)
    found = separation_metrics(hidden, harmful, np.full(80, 12)).figures
    centred = hidden - hidden.mean(0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    assert found.silhouette == pytest.approx(silhouette_score(plane, harmful), abs=1e-9)
    assert found.d_b == pytest.approx(bhattacharyya_distance(plane[harmful], plane[~harmful]), rel=1e-6)


def test_separation_does_not_follow_the_order_or_the_labels_side() -> None:
    hidden, harmful = clouds(2)
    lengths = generator(3).integers(8, 12, 80)
    order = generator(4).permutation(80)
    straight = separation_metrics(hidden, harmful, lengths)
    for other in (
        separation_metrics(hidden[order], harmful[order], lengths[order]),
        separation_metrics(hidden, ~harmful, lengths),
    ):
        assert other.figures.d_b == pytest.approx(straight.figures.d_b)
        assert other.figures.silhouette == pytest.approx(straight.figures.silhouette)
        assert other.figures.frechet == pytest.approx(straight.figures.frechet)
        assert other.length_auc == pytest.approx(straight.length_auc)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 1e4)])
def test_figures_do_not_follow_scale_or_place(scale: float, shift: float) -> None:
    hidden, harmful = clouds(2)
    straight, other = (
        separation_metrics(points, harmful, np.full(80, 12)).figures for points in (hidden, scale * hidden + shift)
    )
    for name in ("d_b", "silhouette", "mahalanobis", "probe_auc", "difference_auc"):
        assert getattr(other, name) == pytest.approx(getattr(straight, name), rel=1e-3), name
    assert other.frechet == pytest.approx(scale**2 * straight.frechet, rel=1e-3)


def test_separation_is_repeatable_and_its_seed_only_resamples() -> None:
    hidden, harmful = clouds(2)
    lengths = np.full(80, 12)
    found, other = separation_metrics(hidden, harmful, lengths), separation_metrics(hidden, harmful, lengths, seed=1)
    assert separation_metrics(hidden, harmful, lengths) == found
    assert other.shuffled != found.shuffled
    assert other.figures == found.figures


@pytest.mark.parametrize("longer", [True, False])
def test_length_auc_says_how_well_length_tells_the_classes(longer: bool) -> None:
    hidden, harmful = clouds(2)
    lengths = np.where(harmful == longer, 30, 10)
    found = separation_metrics(hidden, harmful, lengths)
    assert found.length_auc == 1
    assert found.length_matched == 0
    assert found.matched is None
    assert any("length" in note for note in control_notes(found))


def test_states_that_follow_length_alone_are_found_out() -> None:
    harmful = np.arange(120) % 2 == 0
    lengths = np.where(generator(1).random(120) < 0.2, 20, np.where(harmful, 30, 10))
    hidden = generator(0).normal(size=(120, 8))
    hidden[:, 0] += lengths
    found = separation_metrics(hidden, harmful, lengths)
    assert found.figures.d_b > 1
    assert found.matched is not None
    assert found.matched.d_b < 0.5
    notes = " ".join(control_notes(found))
    assert "AUC" in notes
    assert "length explains" in notes


@pytest.mark.parametrize("shape", ["few", "one of a class", "constant feature", "constant", "in a line"])
def test_poor_samples_are_measured_without_a_warning(shape: str) -> None:
    hidden, harmful = clouds(1, n=4 if shape == "few" else 40)
    if shape == "one of a class":
        harmful = np.arange(40) == 0
    elif shape == "constant feature":
        hidden[:, 3] = 7
    elif shape == "constant":
        hidden[:] = 7
    elif shape == "in a line":
        hidden[:, 1:] = hidden[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = separation_metrics(hidden, harmful, np.full(len(hidden), 9))
    assert all(math.isfinite(value) for value in metric_values(found).values())
    if shape in ("few", "one of a class"):
        assert found.figures.probe_auc is None
        assert "separation/probe_auc" not in metric_values(found)
    if shape in ("few", "constant", "one of a class"):
        assert any("chance" in note for note in control_notes(found))


FIGURES = SeparationStatistics(
    probe_auc=0.9, difference_auc=0.8, mahalanobis=4.0, d_b=2.0, silhouette=0.5, frechet=30.0
)
PLAIN = SeparationMetrics(
    figures=FIGURES,
    length_auc=0.55,
    length_matched=100,
    matched=replace(FIGURES, d_b=1.8),
    subset=replace(FIGURES, d_b=1.9),
    shuffled=replace(FIGURES, d_b=0.05),
    d_b_p=0.005,
    d_b_interval=(1.5, 2.5),
    mahalanobis_interval=(3.0, 5.0),
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length_auc": 0.91}, "0.91"),
        ({"matched": replace(FIGURES, d_b=0.6)}, "length explains"),
        ({"shuffled": replace(FIGURES, d_b=1.2)}, "chance"),
        ({"d_b_p": 0.2}, "20.0% of permutations"),
        ({"figures": replace(FIGURES, mahalanobis=None)}, "Mahalanobis distance cannot be told"),
    ],
)
def test_each_control_speaks_for_itself(changes: dict[str, Any], words: str) -> None:
    assert control_notes(PLAIN) == []
    (note,) = control_notes(replace(PLAIN, **changes))
    assert words in note


def test_all_controls_may_speak_at_once() -> None:
    apart = {"matched": replace(FIGURES, d_b=0.1), "shuffled": replace(FIGURES, d_b=1.5)}
    assert len(control_notes(replace(PLAIN, length_auc=0.9, **apart))) == 3


def test_length_matched_prompts_are_compared_with_as_many_at_random() -> None:
    fewer = replace(FIGURES, d_b=0.9)
    assert control_notes(replace(PLAIN, matched=fewer, subset=fewer)) == []


def test_subsets_have_as_many_of_each_class_as_the_length_matched_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, real = [], module._statistics

    def statistics(cloud: Any, labels: NDArray[np.bool_]) -> SeparationStatistics:
        counted.append((len(labels), int(labels.sum())))
        return real(cloud, labels)

    monkeypatch.setattr(module, "_statistics", statistics)
    hidden, harmful = clouds(2)
    lengths = np.where(np.arange(80) < 30, 9, np.where(harmful, 12, 13))
    found = separation_metrics(hidden, harmful, lengths)
    assert found.length_matched == 30
    assert counted == [(80, 40)] * 3 + [(30, 15)] * 3
    assert found.subset is not None
    assert found.subset != found.matched
    whole = separation_metrics(hidden, harmful, np.full(80, 9))
    assert whole.matched == whole.subset == whole.figures


def test_row_names_the_metrics() -> None:
    row = metric_values(PLAIN)
    assert row["separation/d_b"] == 2.0
    assert row["separation/d_b_length_matched"] == 1.8
    assert row["separation/probe_auc_shuffled"] == 0.9
    figures = ("d_b", "silhouette", "mahalanobis", "frechet", "probe_auc", "difference_auc")
    endings = ("", "_length_matched", "_subset", "_shuffled")
    assert set(row) == {f"separation/{name}{ending}" for name in figures for ending in endings} | {
        "separation/length_auc",
        "separation/d_b_p",
    }
    assert not any("matched" in name for name in metric_values(replace(PLAIN, matched=None, subset=None)))


def layer_of(d_b: float, chance: np.ndarray) -> SeparationMetrics:
    return replace(PLAIN, figures=replace(FIGURES, d_b=d_b), d_b_chance=tuple(chance.tolist()))


def test_the_best_of_many_unrelated_layers_is_significant_in_5_percent() -> None:
    """Twelve layers of correlated distances, as they are under chance; each by itself is significant in 5%."""
    draws_of, any_corrected, any_plain = generator(0), 0, 0
    scales = draws_of.uniform(0.5, 50, size=12)
    for _ in range(400):
        draws = (0.5 * draws_of.exponential(size=(1, 200)) + draws_of.exponential(size=(12, 200))) * scales[:, None]
        layers = [layer_of(draw[0], draw[1:]) for draw in draws]
        any_corrected += min(p_of_all_layers(layers)) <= 0.05
        any_plain += min((1 + (draw[1:] >= draw[0]).sum()) / 200 for draw in draws) <= 0.05
    assert 0.03 <= any_corrected / 400 <= 0.08
    assert any_plain / 400 > 0.25


def test_a_layer_that_separates_stays_significant_among_all() -> None:
    normal = generator(1).normal
    labels = np.arange(60) % 2 == 0
    states = normal(size=(60, 4)) + 4 * labels[:, None]
    noise = normal(size=(60, 4))
    layers = [separation_metrics(hidden, labels, np.full(60, 5), resampled=False) for hidden in (noise, states)]
    unrelated, related = p_of_all_layers(layers)
    assert related == 1 / 50
    assert unrelated >= layers[0].d_b_p
    same = separation_metrics(noise, labels, np.full(60, 5), resampled=False)
    assert same.d_b_chance == layers[0].d_b_chance  # the same permutations in every layer
    assert "d_b_chance" not in layers[1].as_json()
