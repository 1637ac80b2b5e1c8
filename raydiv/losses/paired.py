"""Objectives that need an aligned and an unaligned response to one prompt.

Notation: r+ and r- are beta * log-ratio of a pair's aligned and unaligned example, D = r+ - r-, s the sigmoid. The value
is the mean over the pairs of the global batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from raydiv.losses.numerics import log_sigmoid
from raydiv.losses.objective import Batch, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor


def _pair_mean(x: Tensor, empty: float) -> Tensor:
    """Mean over pairs [p]; ``empty``, the term's value at r = 0, when the step has none."""
    return x.mean() if len(x) else x.sum() + empty


@objective(
    paper="Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; smoothing: Mitchell's cDPO",
    data="paired",
    divergence="JS(D+ x D- || D- x D+), less what label smoothing takes",
    ceiling=lambda parameters: math.log(2) - _binary_entropy(parameters["label_smoothing"]),
)
def dpo(
    batch: Batch,
    state: State,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0,
) -> Value:
    """Direct preference optimisation: -(1 - e) log s(D) - e log s(-D), e = ``label_smoothing``."""
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    difference = aligned - unaligned
    terms = -(1 - label_smoothing) * log_sigmoid(difference) - label_smoothing * log_sigmoid(-difference)
    loss = _pair_mean(terms, empty=math.log(2))
    return Value(loss, divergence=math.log(2) - loss)


def _binary_entropy(p: float) -> float:
    """Entropy of a coin, in nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


@objective(
    paper="Chen et al. 2024 (arXiv 2402.05369), pairwise NCA; Alami et al. 2024 (Safe-NCA)",
    data="paired",
    divergence="2 JS(D+ || (D+ + D-)/2)",
    ceiling=lambda parameters: 1.5 * math.log(4 / 3),
)
def nca(batch: Batch, state: State, *, beta: Annotated[float, Gt(0)] = 0.1) -> Value:
    """Noise-contrastive alignment: -log s(r+) - log s(-r+) / 2 - log s(-r-) / 2."""
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    terms = -log_sigmoid(aligned) - 0.5 * log_sigmoid(-aligned) - 0.5 * log_sigmoid(-unaligned)
    loss = _pair_mean(terms, empty=math.log(4))
    return Value(loss, divergence=math.log(4) - loss)
