"""Means, exponentials and logarithms that stay finite for rewards up to 1e4 in size and for classes absent from a step.

An absent class counts as one example of reward 0, which is every example's reward before training, or of the running
baseline where an objective has one. So it changes neither gradient nor state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_EXPONENT = 30.0
"""Above this, exponentials of single rewards continue as tangents: e^30 = 1e13, whose sums and products stay finite."""


def log_sigmoid(x: Tensor) -> Tensor:
    """Log s(x), elementwise, without overflow on either side."""
    return -(-x).logaddexp(x.new_zeros(()))


def smoothed_logistic(x: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), elementwise, e = ``smoothing``: logistic loss under flipped labels."""
    return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)


def binary_entropy(p: float) -> float:
    """Entropy of a Bernoulli variable, in nats: the minimum of ``smoothed_logistic``."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def bounded_exp(x: Tensor, bound: float = MAX_EXPONENT) -> Tensor:
    """Exp x up to ``bound``, and its tangent at ``bound`` beyond: finite, increasing, convex, never above exp x."""
    # exp(inner) + slope * (x - inner) would be shorter, but loses exp's gradient next to the slope's
    return x.clamp(max=bound).exp().where(x <= bound, math.exp(bound) * (1 + x - bound))


def bounded_expm1(x: Tensor, bound: float = MAX_EXPONENT) -> Tensor:
    """Exp x - 1, exact near 0, and a straight line beyond ``bound``."""
    beyond = math.exp(bound) * (1 + x - bound) - 1
    return x.clamp(max=bound).expm1().where(x <= bound, beyond)


def class_mean(x: Tensor, mask: Tensor, empty: Tensor | float = 0.0) -> Tensor:
    """Mean of ``x`` [n] where ``mask`` [n] (bool) is true; ``empty``, the term's value at r = 0, where it never is."""
    if not mask.any():
        return x.sum() * 0.0 + empty
    return x.where(mask, x.new_zeros(())).sum() / int(mask.sum())


def class_log_mean_exp(x: Tensor, mask: Tensor, empty: float = 0.0) -> Tensor:
    """Log of the mean of exp x where ``mask`` is true; ``empty`` where it never is."""
    if not mask.any():
        return x.sum() * 0.0 + empty
    return x.masked_fill(~mask, -math.inf).logsumexp(0) - math.log(int(mask.sum()))


def pair_mean(x: Tensor, empty: float) -> Tensor:
    """Mean over pairs [p]; ``empty``, the term's value at r = 0, when the step has none."""
    return x.mean() if len(x) else x.sum() + empty


def pair_logistic(x: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over pairs [p] of ``smoothed_logistic``; log 2, its value at x = 0, when the step has none."""
    return pair_mean(smoothed_logistic(x, smoothing), empty=math.log(2))


def ema_update(average: float, value: float, rate: float) -> float:
    """One update of an exponential moving average."""
    return (1 - rate) * average + rate * value
