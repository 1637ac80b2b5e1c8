"""The Mahalanobis distance of two classes against that of the laws they are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.separation.embed import distinct_prompts
from raydiv.evaluation.separation.mahalanobis import SHRINKAGE, mahalanobis, mahalanobis_interval, spectrum
from raydiv.evaluation.separation.moments import StreamedMoments

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]


@dataclass(frozen=True)
class Law:
    """Two classes of covariance factors' factors + noise^2 I, whose means differ by ``difference`` [d]."""

    factors: Array
    noise: float
    difference: Array

    @classmethod
    def of(cls, d: int, kind: str, distance: float, seed: int = 0) -> Law:
        """A law whose squared distance under the shrunk correlation is ``distance``."""
        generator = np.random.default_rng(seed)
        if kind == "independent":
            factors, noise = np.zeros((1, d)), 1.0
        elif kind == "correlated":
            factors, noise = generator.normal(size=(d, d)) * (np.arange(d)[:, None] + 1) ** -0.5, 0.01
        else:
            factors, noise = generator.normal(size=(10, d)), 0.05
        raw = cls(factors, noise, factors.T @ generator.normal(size=len(factors)) + noise * generator.normal(size=d))
        return cls(factors, noise, raw.difference * np.sqrt(distance / raw.distance()))

    def distance(self) -> float:
        """dm' ((1 - s) R + s I)^-1 dm of the law, in units of standard deviations."""
        covariance = self.factors.T @ self.factors + self.noise**2 * np.eye(len(self.difference))
        deviations = np.sqrt(np.diag(covariance))
        shrunk = (1 - SHRINKAGE) * covariance / np.outer(deviations, deviations)
        shrunk += SHRINKAGE * np.eye(len(deviations))
        difference = self.difference / deviations
        return float(difference @ np.linalg.solve(shrunk, difference))

    def draw(self, n: int, tails: str, generator: np.random.Generator) -> tuple[Array, Labels]:
        """``n`` points of each class."""
        (k, d), labels = self.factors.shape, np.arange(2 * n) < n
        parts = [generator.normal(size=(2 * n, k)), generator.normal(size=(2 * n, d))]
        if tails == "t5":
            parts = [generator.standard_t(5, size=part.shape) / np.sqrt(5 / 3) for part in parts]
        points = parts[0] @ self.factors + self.noise * parts[1]
        if tails == "elliptical":
            points /= np.sqrt(generator.chisquare(5, size=(2 * n, 1)) / 3)
        points[labels] += self.difference
        return points, labels


def estimates(law: Law, n: int, tails: str, draws: int, seed: int = 1) -> Array:
    generator = np.random.default_rng(seed)
    found = [spectrum(*law.draw(n, tails, generator)).distance() for _ in range(draws)]
    assert None not in found
    return np.array(found, dtype=np.float64)


CASES = [
    (16, "independent", 20, "gauss", 4.0, 400),
    (16, "correlated", 25, "t5", 16.0, 300),
    (16, "independent", 25, "elliptical", 16.0, 300),
    (16, "correlated", 2000, "gauss", 4.0, 4),
    (64, "independent", 100, "gauss", 4.0, 60),
    (64, "correlated", 50, "elliptical", 16.0, 100),
    (576, "correlated", 250, "gauss", 4.0, 8),
    (576, "correlated", 100, "elliptical", 16.0, 16),
    (576, "few", 25, "gauss", 16.0, 150),
    (4096, "few", 50, "gauss", 16.0, 50),
    (4096, "few", 250, "t5", 16.0, 8),
    (4096, "independent", 500, "gauss", 16.0, 2),
]


@pytest.mark.parametrize(("d", "kind", "n", "tails", "distance", "draws"), CASES)
def test_the_laws_distance_is_found_within_a_tenth(
    d: int, kind: str, n: int, tails: str, distance: float, draws: int
) -> None:
    found = estimates(Law.of(d, kind, distance), n, tails, draws) / distance
    error = found.std() / np.sqrt(draws)
    assert abs(found.mean() - 1) < 0.1 + 2 * error
    assert error < 0.06, "too few draws to tell a bias of a tenth"


@pytest.mark.parametrize(("d", "kind"), [(64, "correlated"), (576, "few")])
def test_two_samples_of_one_law_have_none_on_average(d: int, kind: str) -> None:
    law = Law.of(d, kind, 1.0)
    found = estimates(Law(law.factors, law.noise, np.zeros(d)), 60, "gauss", 60)
    assert abs(found.mean()) < 4 * found.std() / 60**0.5
    assert found.std() < 2
    assert 0 < (found < 0).mean() < 1


def test_it_does_not_grow_with_the_number_of_prompts() -> None:
    law = Law.of(576, "few", 16.0)
    means = [estimates(law, n, "gauss", draws).mean() for n, draws in ((25, 200), (50, 100), (100, 60), (250, 40))]
    assert means == pytest.approx([16.0] * 4, rel=0.12)


def test_a_giant_dimension_and_the_scale_change_nothing() -> None:
    points, labels = Law.of(64, "correlated", 4.0).draw(100, "gauss", np.random.default_rng(3))
    plain = spectrum(points, labels).distance()
    scales = np.random.default_rng(4).lognormal(0, 3, 64)
    scales[7] = 1e5
    assert plain is not None
    assert spectrum(points * scales + 100 * scales, labels).distance() == pytest.approx(plain, rel=1e-5)
    assert spectrum(points, ~labels).distance() == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(("n", "d", "kind"), [(50, 576, "independent"), (12, 128, "independent"), (9, 16, "few")])
def test_too_few_prompts_cannot_tell(n: int, d: int, kind: str) -> None:
    points, labels = Law.of(d, kind, 4.0).draw(n, "gauss", np.random.default_rng(5))
    assert spectrum(points, labels).distance() is None
    assert mahalanobis(points, labels) is None
    assert mahalanobis_interval(points, labels, None, np.random.default_rng(0)) is None


@pytest.mark.parametrize("shape", ["constant", "constant feature", "in a line", "apart in a constant feature"])
def test_flat_states_have_a_finite_distance(shape: str) -> None:
    points, labels = Law.of(16, "few", 4.0).draw(30, "gauss", np.random.default_rng(6))
    plain = spectrum(points, labels).distance()
    assert plain is not None
    if shape == "constant":
        points[:] = 3
    elif shape == "in a line":
        points[:, 1:] = points[:, :1]
    else:
        points[:, 3] = labels if shape.startswith("apart") else 3
    found = spectrum(points, labels).distance()
    assert found is not None
    assert np.isfinite(found)
    assert (found == 0) == (shape == "constant")
    assert (found > 1e6) == shape.startswith("apart")


@pytest.mark.parametrize(("distance", "tails"), [(1.0, "gauss"), (4.0, "elliptical"), (16.0, "t5")])
def test_the_interval_holds_the_laws_distance(distance: float, tails: str) -> None:
    law, generator, held, widths = Law.of(16, "correlated", distance), np.random.default_rng(7), 0, []
    for _ in range(60):
        points, labels = law.draw(40, tails, generator)
        interval = mahalanobis_interval(points, labels, mahalanobis(points, labels), generator)
        assert interval is not None
        held += interval[0] <= distance <= interval[1]
        widths.append(interval[1] - interval[0])
    assert held >= 53, "95% of 60 are 57"
    spread = estimates(law, 40, tails, 100).std()
    assert np.mean(widths) == pytest.approx(2 * 2.09 * spread, rel=0.35)


@pytest.mark.parametrize(("n", "d", "kind"), [(600, 64, "correlated"), (600, 576, "few")])
def test_streamed_states_have_the_same_distance(n: int, d: int, kind: str) -> None:
    law = Law.of(d, kind, 4.0)
    points, labels = law.draw(n, "gauss", np.random.default_rng(8))
    stream = StreamedMoments()
    for rows in np.array_split(np.random.default_rng(9).permutation(2 * n), 7):
        stream.add(points[rows, None], labels[rows], [1] * len(rows))
    found, whole = stream.statistics(0).mahalanobis, spectrum(points, labels).distance()
    assert found == pytest.approx(whole, rel=0.02)
    assert found == pytest.approx(4.0, rel=0.2)


def test_repeated_prompts_are_left_out() -> None:
    prompts = [Prompt(text, harmful, "k", str(n)) for n, (text, harmful) in enumerate([("a", True), ("b", False)] * 2)]
    prompts += [Prompt("a", False, "k", "4"), Prompt("c", True, "k", "5")]
    assert [prompt.id for prompt in distinct_prompts(prompts)] == ["0", "1", "4", "5"]
