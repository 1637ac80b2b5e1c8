"""Preferences: objectives that depend on a pair only through the difference of its rewards.

Notation: r+ and r- are beta * log-ratio of a pair's aligned and unaligned example, D = r+ - r-, s the sigmoid. The
value is the mean over the pairs of the global batch. D+ x D- || D- x D+ are the laws of (aligned, unaligned) and of the
swapped pair, given their prompt: the divergence is the mean over prompts, since both responses have the same one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from raydiv.losses.numerics import binary_entropy, log_sigmoid, pair_logistic, pair_mean
from raydiv.losses.objective import Batch, LabelSmoothing, Positive, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor

JS_OF_PAIRS = "JS(D+ x D- || D- x D+ given the prompt)"


def _difference(batch: Batch, beta: float) -> Tensor:
    """D of every pair, [p]."""
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    return aligned - unaligned


@objective(
    paper="Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; smoothing: Mitchell's cDPO",
    data="paired",
    divergence=f"{JS_OF_PAIRS}, less what label smoothing takes",
    ceiling=lambda options: math.log(2) - binary_entropy(options["label_smoothing"]),
)
def dpo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
) -> Value:
    """Direct preference optimisation: -(1 - e) log s(D) - e log s(-D), e = ``label_smoothing``."""
    loss = pair_logistic(_difference(batch, beta), label_smoothing)
    return Value(loss, divergence=math.log(2) - loss)


@objective(
    paper="Chowdhury et al. 2024 (arXiv 2403.00409), robust DPO",
    data="paired",
    divergence=f"{JS_OF_PAIRS} of the pairs as they were before labels flipped with probability e",
    ceiling=lambda options: None if options["label_smoothing"] else math.log(2),
)
def rdpo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    label_smoothing: LabelSmoothing = 0.1,
) -> Value:
    """Robust DPO: [-(1 - e) log s(D) + e log s(-D)] / (1 - 2e), e = ``label_smoothing``.

    Its mean over pairs whose labels flip with probability e is dpo's over the clean pairs. Unbounded below in D for e >
    0.
    """
    difference = _difference(batch, beta)
    terms = -(1 - label_smoothing) * log_sigmoid(difference) + label_smoothing * log_sigmoid(-difference)
    loss = pair_mean(terms / (1 - 2 * label_smoothing), empty=math.log(2))
    return Value(loss, divergence=math.log(2) - loss)


@objective(
    paper="Zhao et al. 2023 (arXiv 2305.10425), hinge",
    data="paired",
    divergence="TV(D+ x D- || D- x D+ given the prompt), from below",
    ceiling=lambda options: 1.0,
)
def slic(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Sequence likelihood calibration: max(0, 1 - D)."""
    loss = pair_mean((1 - _difference(batch, beta)).clamp(min=0), empty=1.0)
    return Value(loss, divergence=1 - loss)


@objective(paper="Ji et al. 2024 (arXiv 2402.00856), EXO-pref, eq. 16", data="paired", divergence="none")
def exo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3,
) -> Value:
    """Exact optimisation: KL(s(D) || 1 - e) between Bernoulli laws, e = ``label_smoothing``.

    That is s(D) [log s(D) - log(1 - e)] + s(-D) [log s(-D) - log e]; its best D is log((1 - e) / e), finite.
    """
    difference = _difference(batch, beta)
    better = difference.sigmoid() * (log_sigmoid(difference) - math.log1p(-label_smoothing))
    worse = (-difference).sigmoid() * (log_sigmoid(-difference) - math.log(label_smoothing))
    at_zero = -math.log(2) - (math.log1p(-label_smoothing) + math.log(label_smoothing)) / 2
    return Value(pair_mean(better + worse, empty=at_zero))


@objective(paper="Lu et al. 2024 (arXiv 2406.08414), DiscoPOP, eq. 5", data="paired", divergence="none")
def discopop(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    tau: Annotated[float, Gt(0), Lt(1)] = 0.05,
) -> Value:
    """Discovered preference optimisation: -(1 - m) log s(D) + m exp(-D), m = s(D / tau).

    It is not monotone: at D = 0 it lowers D for small ``tau``, as its authors' search found it. Computed as
    -log s(D) s(-D/tau) + exp(log s(D/tau) - D), which is finite where the textbook form is 0 times infinity.
    """
    difference = _difference(batch, beta)
    logistic = -log_sigmoid(difference) * (-difference / tau).sigmoid()
    exponential = (log_sigmoid(difference / tau) - difference).exp()
    return Value(pair_mean(logistic + exponential, empty=(math.log(2) + 1) / 2))


@objective(
    paper="length-normalised DPO, as sigmoid_norm of TRL",
    data="paired",
    divergence=JS_OF_PAIRS,
    ceiling=lambda options: math.log(2),
)
def sigmoid_norm(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """DPO per token: -log s(D) with each reward divided by its response's tokens."""
    aligned, unaligned = batch.paired(beta * batch.log_ratios / batch.tokens)
    loss = pair_logistic(aligned - unaligned)
    return Value(loss, divergence=math.log(2) - loss)
