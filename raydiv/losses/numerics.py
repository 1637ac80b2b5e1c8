"""Means and logarithms that stay finite: rewards up to 1e4 in size, classes that are empty in a step.

An empty class counts as one example of reward 0, which is every example's reward before training: the step then
neither fails nor moves on account of the class that it does not see.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_sigmoid(x: Tensor) -> Tensor:
    """Log s(x), elementwise, without overflow on either side."""
    return -(-x).logaddexp(x.new_zeros(()))


def class_mean(x: Tensor, members: Tensor, empty: Tensor | float = 0.0) -> Tensor:
    """Mean of ``x`` [n] where ``members`` [n] (bool); ``empty``, the term's value at r = 0, when there is none."""
    if not members.any():
        return x.sum() * 0.0 + empty
    return x.where(members, x.new_zeros(())).sum() / int(members.sum())


def class_log_mean_exp(x: Tensor, members: Tensor) -> Tensor:
    """Log of the mean of exp x over ``members``; 0 when there is none."""
    if not members.any():
        return x.sum() * 0.0
    return x.masked_fill(~members, -math.inf).logsumexp(0) - math.log(int(members.sum()))
