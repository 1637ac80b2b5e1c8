"""Rates with a judge's error in them: the judge's verdicts on all answers, corrected by people's labels of some.

The answers are divided by the judge's verdict v into strata of shares p_v. A sample of each stratum is labelled, of
which a share q_v has the outcome that the rate counts. The rate is sum_v p_v q_v, which is unbiased whatever the
judge's errors are: the post-stratified form of prediction-powered inference (Angelopoulos et al. 2023), or the estimate
of Rogan and Gladen (1978) with the predictive values of the judge in place of its error rates.

Its interval is that of the posterior: of the p_v by a Bayesian bootstrap of the prompts (Rubin 1981), of whose attempts
each has an equal part; of each q_v by a beta distribution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
"""Draws from the posterior."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LabelledShare:
    """Labelled answers of one verdict, of which a ``share`` has the outcome.

    ``effective``: how many labels of different prompts they are worth (Kish 1965): the answers to one prompt are alike.
    """

    share: float
    labelled: int
    effective: float

    @classmethod
    def of(cls, labels: Sequence[tuple[str, float]]) -> LabelledShare:
        """Of pairs of a prompt and whether the answer has the outcome (a fraction where people disagree)."""
        if not labels:
            return cls(0.5, 0, 0.0)
        prompts = Counter(prompt for prompt, _ in labels)
        share = sum(outcome for _, outcome in labels) / len(labels)
        return cls(share, len(labels), len(labels) ** 2 / sum(count**2 for count in prompts.values()))


@dataclass(frozen=True, slots=True)
class CalibratedRate:
    """A rate corrected for the judge's errors, its 95% interval, and from how many labels and prompts.

    ``sensitivity``: the share of answers with the outcome that the judge finds; ``specificity``: of those without it,
    the share that the judge does not call so. None where there are no such answers.
    """

    share: float
    interval: tuple[float, float]
    labelled: int
    of: int
    sensitivity: float | None
    specificity: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class VerdictShares:
    """The part of each prompt's attempts that has each verdict: ``shares`` [prompts, verdicts] by ``names``."""

    prompts: tuple[str, ...]
    names: tuple[str, ...]
    shares: Array

    @classmethod
    def of(cls, verdicts: Sequence[tuple[str, str]]) -> VerdictShares:
        """Of pairs of a prompt and the verdict on an attempt at it."""
        prompts, names = (tuple(dict.fromkeys(column)) for column in zip(*verdicts, strict=True))
        shares = np.zeros((len(prompts), len(names)))
        rows, columns = ({value: n for n, value in enumerate(values)} for values in (prompts, names))
        for prompt, verdict in verdicts:
            shares[rows[prompt], columns[verdict]] += 1
        return cls(prompts, names, shares / shares.sum(1, keepdims=True))

    def among(self, prompts: Sequence[str]) -> VerdictShares:
        """Those of the prompts that are among ``prompts``."""
        wanted = set(prompts)
        rows = [row for row, prompt in enumerate(self.prompts) if prompt in wanted]
        return VerdictShares(tuple(self.prompts[row] for row in rows), self.names, self.shares[rows])


def calibrated_rate(verdicts: VerdictShares, labels: Mapping[str, LabelledShare], outcome: str) -> CalibratedRate:
    """The rate of one side, from the labels of each verdict; of a verdict without labels half are taken to count.

    ``outcome``: the verdict by which the judge says that an answer has what the rate counts.
    """
    generator = np.random.default_rng(0)
    given = _given(verdicts, labels)
    draws = _draws(verdicts.shares, given, generator, _weights(len(verdicts.prompts), generator))
    shares, positive = verdicts.shares.mean(0), np.array([one.share for one in given])
    found = np.array(verdicts.names) == outcome
    rate, negative = float(shares @ positive), float(shares @ (1 - positive))
    return CalibratedRate(
        rate,
        _interval(draws, rate),
        sum(one.labelled for one in given),
        len(verdicts.prompts),
        float((shares * positive)[found].sum()) / rate if rate else None,
        float((shares * (1 - positive))[~found].sum()) / negative if negative else None,
    )


def calibrated_difference(
    first: tuple[VerdictShares, Mapping[str, LabelledShare]], second: tuple[VerdictShares, Mapping[str, LabelledShare]]
) -> tuple[float, tuple[float, float]]:
    """The second side's rate less the first's on the same prompts, and its 95% interval.

    Both sides share the draws of the prompts, so that what prompts have in common cancels. Raises ValueError where the
    prompts differ.
    """
    if first[0].prompts != second[0].prompts:
        raise ValueError("the two sides have other prompts")
    generator = np.random.default_rng(0)
    weights = _weights(len(first[0].prompts), generator)
    draws, values = [], []
    for verdicts, labels in (first, second):
        given = _given(verdicts, labels)
        draws.append(_draws(verdicts.shares, given, generator, weights))
        values.append(float(verdicts.shares.mean(0) @ np.array([one.share for one in given])))
    difference = values[1] - values[0]
    return difference, _interval(draws[1] - draws[0], difference)


def _given(verdicts: VerdictShares, labels: Mapping[str, LabelledShare]) -> list[LabelledShare]:
    """The labels of each verdict, in the order of their names."""
    return [labels.get(name, LabelledShare.of([])) for name in verdicts.names]


def _weights(prompts: int, generator: np.random.Generator) -> Array:
    """Draws [DRAWS, prompts] of the weights of a Bayesian bootstrap, not normalised."""
    return generator.exponential(size=(DRAWS, prompts))


def _draws(shares: Array, labels: Sequence[LabelledShare], generator: np.random.Generator, weights: Array) -> Array:
    """Draws of the rate from its posterior. Verdicts share one prior answer, so that a share of 0 is not certain."""
    verdicts = shares.shape[1]
    mass = weights @ shares + generator.gamma(1 / verdicts, size=(DRAWS, verdicts))
    positive = np.array([one.share * one.effective for one in labels])
    negative = np.array([(1 - one.share) * one.effective for one in labels])
    right = generator.beta(positive + 0.5, negative + 0.5, size=(DRAWS, verdicts))
    draws: Array = (mass * right).sum(1) / mass.sum(1)
    return draws


def _interval(draws: Array, value: float) -> tuple[float, float]:
    """95% interval of ``draws``, with the estimate: the prior draws few labels of many verdicts towards a half."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return min(float(low), value), max(float(high), value)
