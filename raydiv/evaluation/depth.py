"""How deep an alignment reaches: log-ratios of a model to its reference by the position of the token.

The log-ratio of a response is the sum of those of its tokens. So its mean over responses is, exactly, a sum over
positions: KL(model || reference) of the model's own answers (the chain rule), and the difference between the mean
log-ratios of aligned and unaligned responses, of which the reward margin is a multiple. Estimates that are not linear
in the log-ratio (kldo's logarithm of a mean, skewed and f-divergences) are no such sums: no share of them belongs to a
position, and what is decomposed here is the log-ratio that they estimate by. Qi et al. 2024 (arXiv 2406.05946,
section 2.3) draw the same curve of KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.evaluation.intervals import Z

RESAMPLES = 500
"""Bootstrap resamples of the responses, for the interval of the half."""

CLASS_EXAMPLES = 256
"""Maximum held-out examples of a class, drawn at random."""


@dataclass(frozen=True, slots=True)
class DepthCurve:
    """Mean log-ratio of responses up to each position, ``values`` [t], in nats.

    ``half_widths`` [t]: of their 95% intervals; ``responses`` [t]: how many have a token there. ``half``: the position,
    from 1, by which half of the last value is reached for the first time, with its 95% interval by bootstrap over the
    responses; None where the last value is not positive.
    """

    values: list[float]
    half_widths: list[float]
    responses: list[int]
    half: int | None
    half_interval: tuple[int, int] | None

    @classmethod
    def of(cls, log_ratios: Sequence[np.ndarray]) -> DepthCurve:
        """From the log-ratios of the tokens of each response; at least one response."""
        return cls._of([_cumulative(log_ratios, max(map(len, log_ratios)))], [1.0], _reached(log_ratios))

    @classmethod
    def of_classes(cls, aligned: Sequence[np.ndarray], unaligned: Sequence[np.ndarray]) -> DepthCurve:
        """The mean of aligned responses less that of unaligned ones; a response that has ended keeps its sum."""
        length = max(map(len, [*aligned, *unaligned]))
        sums = [_cumulative(aligned, length), _cumulative(unaligned, length)]
        return cls._of(sums, [1.0, -1.0], _reached([*aligned, *unaligned]))

    @classmethod
    def _of(cls, sums: Sequence[np.ndarray], signs: Sequence[float], responses: list[int]) -> DepthCurve:
        """From sums [n, t] up to each position, of one class or two."""
        values = np.sum([sign * part.mean(0) for part, sign in zip(sums, signs, strict=True)], axis=0)
        variance = np.sum([part.var(0, ddof=1) / len(part) if len(part) > 1 else 0 * part[0] for part in sums], axis=0)
        half = _half(values[None])[0]
        interval = None
        if half and min(map(len, sums)) > 1:
            generator = np.random.default_rng(0)
            resampled = np.sum(
                [sign * _resampled_means(part, generator) for part, sign in zip(sums, signs, strict=True)], axis=0
            )
            halves = _half(resampled)
            if (halves > 0).mean() > 0.5:
                low, high = np.percentile(halves[halves > 0], [2.5, 97.5], method="nearest")
                interval = (int(low), int(high))
        return cls(
            values.round(4).tolist(), (Z * np.sqrt(variance)).round(4).tolist(), responses, int(half) or None, interval
        )


def _cumulative(log_ratios: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Sums [n, length] up to each position; after its end a response keeps its sum."""
    padded = np.zeros((len(log_ratios), length))
    for row, values in zip(padded, log_ratios, strict=True):
        row[: len(values)] = values
    return padded.cumsum(1)


def _reached(log_ratios: Sequence[np.ndarray]) -> list[int]:
    lengths = np.array([len(values) for values in log_ratios])
    return [int((lengths >= position).sum()) for position in range(1, int(lengths.max()) + 1)]


def _half(values: np.ndarray) -> np.ndarray:
    """The first position [b], from 1, at which curves [b, t] reach half of their last value; 0 where that is not
    positive.
    """
    last = values[:, -1]
    return np.where(last > 0, (values >= last[:, None] / 2).argmax(1) + 1, 0)


def _resampled_means(sums: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means [RESAMPLES, t] of rows that are drawn with replacement."""
    counts = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)
    means: np.ndarray = counts @ sums / len(sums)
    return means


@dataclass(frozen=True, slots=True)
class HeldOutDepth:
    """Curves of the held-out examples of each class, and of the difference between the two; in nats, beta left out."""

    aligned: DepthCurve
    unaligned: DepthCurve
    margin: DepthCurve

    @classmethod
    def of(cls, log_ratios: Sequence[np.ndarray], aligned: np.ndarray) -> HeldOutDepth:
        """From the log-ratios of the tokens of each example; both classes have one."""
        positive, negative = (
            [values for values, label in zip(log_ratios, aligned.tolist(), strict=True) if label is wanted]
            for wanted in (True, False)
        )
        return cls(DepthCurve.of(positive), DepthCurve.of(negative), DepthCurve.of_classes(positive, negative))


def chosen_examples(aligned: np.ndarray) -> np.ndarray:
    """Rows of at most CLASS_EXAMPLES examples of each class."""
    generator = np.random.default_rng(0)
    chosen = [generator.permutation(np.flatnonzero(aligned == label))[:CLASS_EXAMPLES] for label in (True, False)]
    return np.sort(np.concatenate(chosen))
