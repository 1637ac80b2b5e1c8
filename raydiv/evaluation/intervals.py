"""95% intervals of means, of shares and of paired comparisons."""

from __future__ import annotations

import math

Z = 1.959963984540054
"""The normal quantile of a 95% interval."""


def normal_interval(mean: float, stderr: float) -> tuple[float, float]:
    """Normal interval of a mean from its standard error."""
    return mean - Z * stderr, mean + Z * stderr


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of ``count``, or of a mean of ``count`` variables in [0, 1].

    A variable in [0, 1] has at most the variance of a coin with the same mean.
    """
    squared = Z * Z / count
    centre = share + squared / 2
    half = Z * math.sqrt(share * (1 - share) / count + squared / 4 / count)
    return max(0.0, (centre - half) / (1 + squared)), min(1.0, (centre + half) / (1 + squared))


def tango_interval(wins: int, losses: int, pairs: int) -> tuple[float, float]:
    """Tango's score interval of a paired difference, (wins - losses) / pairs, mapped to [0, 1]; Wilson's without ties.

    Tango 1998 (Statistics in Medicine 17:891). Unlike a bootstrap interval it has a width where all verdicts are equal.
    """
    return 1 - _upper_bound(losses, wins, pairs), _upper_bound(wins, losses, pairs)


def _upper_bound(wins: int, losses: int, pairs: int) -> float:
    from scipy.optimize import brentq

    observed = (wins - losses) / pairs
    if observed == 1:
        return 1.0

    def excess(difference: float) -> float:
        """How far the score of an assumed true difference exceeds the limit."""
        b = (2 * pairs - wins + losses) * difference - wins - losses
        c = -losses * difference * (1 - difference)
        # maximum likelihood estimate of the probability of a loss, given the difference
        loss_probability = (math.sqrt(max(0.0, b * b - 8 * pairs * c)) - b) / (4 * pairs)
        variance = max(0.0, pairs * (2 * loss_probability + difference * (1 - difference)))
        return pairs * (difference - observed) - Z * math.sqrt(variance)

    # just above the observed difference, where a variance of 0 would look like a root
    return (1 + float(brentq(excess, observed + 1e-9, 1.0))) / 2
