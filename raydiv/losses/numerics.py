"""Means, exponentials and logarithms that stay finite: rewards up to 1e4 in size, classes that are empty in a step.

An empty class counts as one example of reward 0, which is every example's reward before training, or of the running
baseline where an objective keeps one: the step neither fails nor moves, in gradient or state, on account of what it does
not see.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 30.0
"""Where exponentials of single rewards turn into their tangents: e^30 = 1e13, and its sums and products stay finite."""


def log_sigmoid(x: Tensor) -> Tensor:
    """Log s(x), elementwise, without overflow on either side."""
    return -(-x).logaddexp(x.new_zeros(()))


def smoothed_logistic(x: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), elementwise, e = ``smoothing``: the logistic loss of labels that flip with e."""
    return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)


def binary_entropy(p: float) -> float:
    """Entropy of a coin, in nats: the least that ``smoothed_logistic`` can be."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def bounded_exp(x: Tensor, bound: float = LARGEST_EXPONENT) -> Tensor:
    """Exp x up to ``bound``, its tangent there beyond: finite, increasing, convex, and never above exp x."""
    # exp(inner) + slope * (x - inner) would be shorter, and lose exp's gradient beside the slope's
    return x.clamp(max=bound).exp().where(x <= bound, math.exp(bound) * (1 + x - bound))


def bounded_expm1(x: Tensor) -> Tensor:
    """Exp x - 1, exact near 0, on a straight line beyond LARGEST_EXPONENT."""
    beyond = math.exp(LARGEST_EXPONENT) * (1 + x - LARGEST_EXPONENT) - 1
    return x.clamp(max=LARGEST_EXPONENT).expm1().where(x <= LARGEST_EXPONENT, beyond)


def class_mean(x: Tensor, members: Tensor, empty: Tensor | float = 0.0) -> Tensor:
    """Mean of ``x`` [n] where ``members`` [n] (bool); ``empty``, the term's value at r = 0, when there is none."""
    if not members.any():
        return x.sum() * 0.0 + empty
    return x.where(members, x.new_zeros(())).sum() / int(members.sum())


def class_log_mean_exp(x: Tensor, members: Tensor, empty: float = 0.0) -> Tensor:
    """Log of the mean of exp x over ``members``; ``empty`` when there is none."""
    if not members.any():
        return x.sum() * 0.0 + empty
    return x.masked_fill(~members, -math.inf).logsumexp(0) - math.log(int(members.sum()))


def pair_mean(x: Tensor, empty: float) -> Tensor:
    """Mean over pairs [p]; ``empty``, the term's value at r = 0, when the step has none."""
    return x.mean() if len(x) else x.sum() + empty


def pair_logistic(x: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over pairs [p] of ``smoothed_logistic``; log 2, its value at x = 0, when the step has none."""
    return pair_mean(smoothed_logistic(x, smoothing), empty=math.log(2))


def ema_update(average: float, value: float, rate: float) -> float:
    """One update of an exponential moving average."""
    return (1 - rate) * average + rate * value
