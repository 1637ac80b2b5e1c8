"""Objectives for which an example needs only its label.

Notation: r = beta * log-ratio; s the sigmoid; E+ and E- the means over the aligned and the unaligned examples of the
global batch, each class averaged by itself. P1 is Haldar et al., arXiv 2502.00657.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from raydiv.losses.numerics import class_log_mean_exp, class_mean, log_sigmoid
from raydiv.losses.objective import Batch, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor


@objective(
    paper="Haldar et al. 2025 (arXiv 2502.00657); the skewed form is raydiv's",
    data="unpaired",
    divergence="KL(D+ || skew D+ + (1 - skew) D-)",
    ceiling=lambda parameters: _kldo_ceiling(**parameters),
    state={"log_mean": 0.0},
)
def kldo(
    batch: Batch,
    state: State,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    skew: Annotated[float, Ge(0), Lt(1)] = 0.0,
    estimator: Literal["batch", "ema"] = "batch",
    ema_rate: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> Value:
    """KL divergence optimisation: -E+[r] + log(skew E+[exp r] + (1 - skew) E-[exp r]).

    Donsker and Varadhan's bound: minus the objective estimates KL(D+ || skew D+ + (1 - skew) D-). With ``skew`` 0 this
    is P1's loss, unbounded below on any batch of distinct examples; with ``skew`` > 0 it is at least -log(1/skew) (under
    ``estimator: ema`` -log(1/skew) - log(1/ema_rate), since a running mean can lag the batch's by that much).

    ``estimator: ema`` replaces the batch's denominator by a running mean (kept in log space, updated before use), as in
    MINE: the gradient is sum_j exp(r_j - m) grad r_j / n, whose weights sum to at most 1/``ema_rate``.
    """
    r = beta * batch.log_ratios
    log_mean = class_log_mean_exp(r, ~batch.aligned)
    if skew:
        log_mean = (class_log_mean_exp(r, batch.aligned) + math.log(skew)).logaddexp(log_mean + math.log1p(-skew))
    if estimator == "ema":
        log_mean = _running_log_mean(log_mean, state["log_mean"], ema_rate)
    loss = log_mean - class_mean(r, batch.aligned)
    return Value(loss, divergence=-loss, state={"log_mean": float(log_mean.detach())})


def _kldo_ceiling(skew: float, estimator: str, ema_rate: float, **_: object) -> float | None:
    if not skew:
        return None
    return -math.log(skew) - (math.log(ema_rate) if estimator == "ema" else 0.0)


def _running_log_mean(log_mean: Tensor, previous: float, rate: float) -> Tensor:
    """log((1 - rate) exp(previous) + rate exp(log_mean)), with MINE's gradient exp(log_mean - result) d log_mean.

    At the start policy = reference, so r = 0 and the running mean's logarithm 0 is exact: no "unset" value is needed.
    """
    if rate == 1:
        return log_mean
    fresh = log_mean.detach() + math.log(rate)
    running = fresh.logaddexp(fresh.new_full((), previous + math.log1p(-rate)))
    weight = (log_mean - running).exp()
    return running + weight - weight.detach()


@objective(
    paper="Jung et al. 2024 (arXiv 2404.04656); the divergence: Haldar et al. 2025",
    data="unpaired",
    divergence="2 JS(D+ || D-), at a fixed delta",
    ceiling=lambda parameters: math.log(4),
    state={"delta": 0.0},
)
def bco(
    batch: Batch,
    state: State,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    delta: Literal["running", "batch", "fixed"] = "running",
    delta_rate: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> Value:
    """Binary classifier optimisation: -E+[log s(r - delta)] - E-[log s(delta - r)].

    ``delta`` is (E+[r] + E-[r]) / 2, without gradient: its running mean at ``delta_rate``, that of the batch, or
    ``fixed`` at 0. A tracking delta has no fixed point in general and can drift with r; it is the state ``delta``.
    """
    r = beta * batch.log_ratios
    shift = state["delta"]
    if delta != "fixed":
        midpoint = float((class_mean(r, batch.aligned) + class_mean(r, ~batch.aligned)).detach()) / 2
        rate = delta_rate if delta == "running" else 1.0
        shift = (1 - rate) * shift + rate * midpoint
    at_zero = log_sigmoid(r.new_tensor([-shift, shift]))
    loss = -class_mean(log_sigmoid(r - shift), batch.aligned, empty=at_zero[0]) - class_mean(
        log_sigmoid(shift - r), ~batch.aligned, empty=at_zero[1]
    )
    return Value(loss, divergence=math.log(4) - loss, state={"delta": shift})


@objective(
    paper="Ethayarajh et al. 2024 (arXiv 2402.01306); the divergence: Haldar et al. 2025",
    data="unpaired",
    divergence="integral of |lambda_aligned p - lambda_unaligned q| / 2 (total variation at lambdas of 1)",
    ceiling=lambda parameters: (parameters["lambda_aligned"] + parameters["lambda_unaligned"]) / 2,
    mismatched=True,
)
def kto(
    batch: Batch,
    state: State,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    lambda_aligned: Annotated[float, Gt(0)] = 1.0,
    lambda_unaligned: Annotated[float, Gt(0)] = 1.0,
) -> Value:
    """Kahneman-Tversky optimisation: lambda_aligned E+[1 - s(r - z0)] + lambda_unaligned E-[1 - s(z0 - r)].

    z0 = max(0, beta * mean of the mismatched examples' log-ratios), without gradient.
    """
    r = beta * batch.log_ratios
    mismatched = batch.mismatched_log_ratios
    z0 = (beta * mismatched.mean()).clamp(min=0) if len(mismatched) else r.new_zeros(())
    aligned = class_mean((z0 - r).sigmoid(), batch.aligned, empty=z0.sigmoid())
    unaligned = class_mean((r - z0).sigmoid(), ~batch.aligned, empty=(-z0).sigmoid())
    loss = lambda_aligned * aligned + lambda_unaligned * unaligned
    return Value(loss, divergence=(lambda_aligned + lambda_unaligned) / 2 - loss)


@objective(
    paper="maximum likelihood of the aligned responses",
    data="unpaired",
    divergence="none",
    reference=False,
)
def sft(batch: Batch, state: State) -> Value:
    """Supervised fine-tuning: -log pi(y|x) of the aligned examples, per response token of the global batch."""
    total = -batch.logps.where(batch.aligned, batch.logps.new_zeros(())).sum()
    return Value(total / batch.tokens.where(batch.aligned, batch.tokens.new_zeros(())).sum().clamp(min=1))
