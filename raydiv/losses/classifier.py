"""Binary classifiers of aligned against unaligned responses, with the reward as their logit.

Notation: r = beta * log-ratio, r+ and r- those of an aligned and an unaligned example; s the sigmoid; E+ and E- the means
over the two classes of the global batch, each averaged by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Le

from raydiv.losses.numerics import class_mean, log_sigmoid, pair_mean, running
from raydiv.losses.objective import Batch, Options, Scope, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor

Delta = Literal["running", "batch", "fixed"]


def _shift(delta: Delta, state: State, midpoint: Tensor, rate: float) -> tuple[float, State]:
    """The delta of this step and the next state: running means are those of the steps before."""
    if delta == "fixed":
        return 0.0, {"delta": 0.0}
    if delta == "batch":
        return float(midpoint), {"delta": float(midpoint)}
    return state["delta"], {"delta": running(state["delta"], float(midpoint), rate)}


def _scope(options: Options) -> Scope:
    return "batch" if options["delta"] == "batch" else "example"


@objective(
    paper="Jung et al. 2024 (arXiv 2404.04656); the divergence: Haldar et al. 2025",
    data="unpaired",
    divergence="2 JS(D+ || D-) at lambdas of 1 and a fixed delta",
    ceiling=lambda options: _prior_entropy(options["lambda_aligned"], options["lambda_unaligned"]),
    scope=_scope,
    applies={"delta_rate": ("delta", ("running",))},
    state={"delta": 0.0},
)
def bco(
    batch: Batch,
    state: State,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    lambda_aligned: Annotated[float, Gt(0)] = 1.0,
    lambda_unaligned: Annotated[float, Gt(0)] = 1.0,
    delta: Delta = "running",
    delta_rate: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> Value:
    """Binary classifier optimisation: -lambda_aligned E+[log s(r - delta)] - lambda_unaligned E-[log s(delta - r)].

    ``delta`` is (E+[r] + E-[r]) / 2, without gradient: its running mean at ``delta_rate`` over the steps before, that of the
    batch, or ``fixed`` at 0. A tracking delta has no fixed point in general and can drift with r; it is logged as
    ``state/delta``. With lambdas a and u the estimate is a KL(D+ || M) + u KL(D- || M), M = (a D+ + u D-) / (a + u).
    """
    r = beta * batch.log_ratios
    midpoint = (class_mean(r, batch.aligned) + class_mean(r, ~batch.aligned)).detach() / 2
    shift, after = _shift(delta, state, midpoint, delta_rate)
    at_zero = log_sigmoid(r.new_tensor([-shift, shift]))
    aligned = class_mean(log_sigmoid(r - shift), batch.aligned, empty=at_zero[0])
    unaligned = class_mean(log_sigmoid(shift - r), ~batch.aligned, empty=at_zero[1])
    loss = -lambda_aligned * aligned - lambda_unaligned * unaligned
    return Value(loss, divergence=_prior_entropy(lambda_aligned, lambda_unaligned) - loss, state=after)


def _prior_entropy(aligned: float, unaligned: float) -> float:
    """What a classifier that knows only the classes' weights loses; log 4 at weights of 1."""
    total = aligned + unaligned
    return aligned * math.log(total / aligned) + unaligned * math.log(total / unaligned)


@objective(
    paper="bco_pair of TRL; Jung et al. 2024 (arXiv 2404.04656)",
    data="paired",
    divergence="2 JS(D+ || D-) at a fixed delta",
    ceiling=lambda options: math.log(4),
    scope=_scope,
    applies={"delta_rate": ("delta", ("running",))},
    state={"delta": 0.0},
)
def bco_pair(
    batch: Batch,
    state: State,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    delta: Delta = "running",
    delta_rate: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> Value:
    """Binary classifier optimisation on pairs: -log s(r+ - delta) - log s(delta - r-).

    ``delta`` as in bco, over the pairs: the running mean of the steps before, the batch's, or ``fixed`` at 0.
    """
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    shift, after = _shift(delta, state, pair_mean((aligned + unaligned).detach() / 2, empty=0.0), delta_rate)
    at_zero = -float(log_sigmoid(aligned.new_tensor([-shift, shift])).sum())
    loss = pair_mean(-log_sigmoid(aligned - shift) - log_sigmoid(shift - unaligned), empty=at_zero)
    return Value(loss, divergence=math.log(4) - loss, state=after)


@objective(
    paper="Chen et al. 2024 (arXiv 2402.05369), pairwise NCA; Alami et al. 2024 (Safe-NCA)",
    data="paired",
    divergence="2 JS(D+ || (D+ + D-)/2)",
    ceiling=lambda options: 1.5 * math.log(4 / 3),
    scope="example",
)
def nca(batch: Batch, state: State, *, beta: Annotated[float, Gt(0)] = 0.1) -> Value:
    """Noise-contrastive alignment: -log s(r+) - log s(-r+) / 2 - log s(-r-) / 2.

    A classifier of D+ against the mixture of both classes, so r is at most log 2 at the optimum.
    """
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    terms = -log_sigmoid(aligned) - 0.5 * log_sigmoid(-aligned) - 0.5 * log_sigmoid(-unaligned)
    loss = pair_mean(terms, empty=math.log(4))
    return Value(loss, divergence=math.log(4) - loss)
