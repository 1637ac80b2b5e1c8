"""Optimal transport in one dimension: aligned and unaligned are matched rank by rank over the global batch.

Notation: s the sigmoid; e = label_smoothing. Sorting needs the whole step: TRL sorts within a device's micro-batch,
which for a single pair is DPO.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from raydiv.losses.numerics import pair_logistic, smoothed_logistic
from raydiv.losses.objective import Batch, LabelSmoothing, Positive, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor


@objective(paper="Melnyk et al. 2024 (arXiv 2406.05882), paired", data="paired", divergence="none", scope="batch")
def aot(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
) -> Value:
    """Alignment via optimal transport: -log s(beta (u - v)), u and v sorted, smoothed as in cDPO.

    u [p] are the pairs' differences of log-probs under the policy, v [p] the same under the reference.
    """
    better, worse = batch.paired(batch.logps)
    reference_better, reference_worse = batch.paired(batch.reference_logps)
    policy, reference = (better - worse).sort().values, (reference_better - reference_worse).sort().values
    return Value(pair_logistic(beta * (policy - reference), label_smoothing))


@objective(paper="Melnyk et al. 2024 (arXiv 2406.05882), unpaired", data="unpaired", divergence="none", scope="batch")
def aot_unpaired(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
) -> Value:
    """Alignment via optimal transport, unpaired: -log s(beta (a - b)), a and b quantiles of the classes' log-ratios.

    Classes of equal size are matched rank by rank, as in the paper; of unequal size quantile by quantile, the
    integral of the loss over the two step functions. Smoothed as in cDPO.
    """
    ratios = batch.log_ratios
    aligned, unaligned = ratios[batch.aligned].sort().values, ratios[~batch.aligned].sort().values
    zero = ratios.sum()[None] * 0.0  # an empty class counts as one example of reward 0
    a, b, shares = _quantiles(aligned if len(aligned) else zero, unaligned if len(unaligned) else zero)
    return Value((shares * smoothed_logistic(beta * (a - b), label_smoothing)).sum())


def _quantiles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of two sorted samples on the intervals where both quantile functions are constant, and their widths."""
    n, m = len(a), len(b)
    edges = sorted({*range(0, n * m + 1, m), *range(0, n * m + 1, n)})  # in units of 1 / (n m)
    widths = a.new_tensor([(end - start) / (n * m) for start, end in pairwise(edges)])
    return a[[start // m for start in edges[:-1]]], b[[start // n for start in edges[:-1]]], widths
