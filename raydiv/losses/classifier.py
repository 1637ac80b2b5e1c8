"""Binary classifiers of aligned against unaligned responses, with the reward as their logit.

Notation: r = beta * log-ratio, r+ and r- those of an aligned and an unaligned example; s the sigmoid; E+ and E- the
means over the two classes of the global batch, each averaged by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from raydiv.losses.numerics import class_mean, ema_update, log_sigmoid, pair_mean
from raydiv.losses.objective import Batch, EmaRate, Options, Positive, Scope, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor

Delta = Literal["running", "batch", "fixed"]


def _update_delta(delta: Delta, state: State, midpoint: Tensor | None, rate: float) -> tuple[float, State]:
    """The delta of this step, and the next state. A running mean is that of the previous steps.

    ``midpoint`` is None where a class is absent from the step; then delta stays.
    """
    if delta == "fixed":
        return 0.0, {"delta": 0.0}
    if midpoint is None:
        return state["delta"], state
    if delta == "batch":
        return float(midpoint), {"delta": float(midpoint)}
    return state["delta"], {"delta": ema_update(state["delta"], float(midpoint), rate)}


def _delta_note(options: Options) -> str:
    """The condition of the estimate, after the divergence's name."""
    return "" if options["delta"] == "fixed" else f", at its {options['delta']} delta"


def _scope(options: Options) -> Scope:
    return "batch" if options["delta"] == "batch" else "example"


@objective(
    paper="Jung et al. 2024 (arXiv 2404.04656); the divergence: Haldar et al. 2025",
    data="unpaired",
    divergence=lambda options: _weighted_js(options) + _delta_note(options),
    ceiling=lambda options: _prior_entropy(options["lambda_aligned"], options["lambda_unaligned"]),
    scope=_scope,
    requires={"delta_rate": ("delta", ("running",))},
    state={"delta": 0.0},
)
def bco(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    lambda_aligned: Positive = 1.0,
    lambda_unaligned: Positive = 1.0,
    delta: Delta = "running",
    delta_rate: EmaRate = 0.1,
) -> Value:
    """Binary classifier optimisation: -lambda_aligned E+[log s(r - delta)] - lambda_unaligned E-[log s(delta - r)].

    ``delta`` is (E+[r] + E-[r]) / 2, without gradient: its running mean at ``delta_rate`` over the previous steps, that
    of the batch, or ``fixed`` at 0. A delta that follows r has no fixed point in general and can drift with it; it is
    logged as ``state/bco/delta``. With lambdas a and u the estimate is a KL(D+ || M) + u KL(D- || M), M = (a D+ + u D-)
    / (a + u).
    """
    r = beta * batch.log_ratios
    both = bool(batch.aligned.any()) and not bool(batch.aligned.all())
    midpoint = (class_mean(r, batch.aligned) + class_mean(r, ~batch.aligned)).detach() / 2 if both else None
    shift, next_state = _update_delta(delta, state, midpoint, delta_rate)
    aligned = class_mean(log_sigmoid(r - shift), batch.aligned, empty=-math.log(2))
    unaligned = class_mean(log_sigmoid(shift - r), ~batch.aligned, empty=-math.log(2))
    loss = -lambda_aligned * aligned - lambda_unaligned * unaligned
    return Value(loss, divergence=_prior_entropy(lambda_aligned, lambda_unaligned) - loss, state=next_state)


def _weighted_js(options: Options) -> str:
    aligned, unaligned = options["lambda_aligned"], options["lambda_unaligned"]
    if aligned == unaligned == 1:
        return "2 JS(D+ || D-)"
    return f"{aligned:g} KL(D+ || M) + {unaligned:g} KL(D- || M), M their weighted mean"


def _prior_entropy(aligned: float, unaligned: float) -> float:
    """The loss of a classifier that knows only the classes' weights; log 4 at weights of 1."""
    total = aligned + unaligned
    return aligned * math.log(total / aligned) + unaligned * math.log(total / unaligned)


@objective(
    paper="bco_pair of TRL; Jung et al. 2024 (arXiv 2404.04656)",
    data="paired",
    divergence=lambda options: "2 JS(D+ || D-)" + _delta_note(options),
    ceiling=lambda options: math.log(4),
    scope=_scope,
    requires={"delta_rate": ("delta", ("running",))},
    state={"delta": 0.0},
)
def bco_pair(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    delta: Delta = "running",
    delta_rate: EmaRate = 0.1,
) -> Value:
    """Binary classifier optimisation on pairs: -log s(r+ - delta) - log s(delta - r-).

    ``delta`` as in bco, over the pairs: the running mean of the previous steps, the batch's, or ``fixed`` at 0.
    """
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    midpoint = (aligned + unaligned).detach().mean() / 2 if len(batch.pairs) else None
    shift, next_state = _update_delta(delta, state, midpoint, delta_rate)
    loss = pair_mean(-log_sigmoid(aligned - shift) - log_sigmoid(shift - unaligned), empty=math.log(4))
    return Value(loss, divergence=math.log(4) - loss, state=next_state)


@objective(
    paper="Chen et al. 2024 (arXiv 2402.05369), pairwise NCA; Alami et al. 2024 (arXiv 2409.07772), Safe-NCA",
    data="paired",
    divergence="2 JS(D+ || (D+ + D-)/2)",
    ceiling=lambda options: 1.5 * math.log(4 / 3),
    scope="example",
)
def nca(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Noise-contrastive alignment: -log s(r+) - log s(-r+) / 2 - log s(-r-) / 2.

    A classifier of D+ against the mixture of both classes, so r is at most log 2 at the optimum.
    """
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    terms = -log_sigmoid(aligned) - 0.5 * log_sigmoid(-aligned) - 0.5 * log_sigmoid(-unaligned)
    loss = pair_mean(terms, empty=math.log(4))
    return Value(loss, divergence=math.log(4) - loss)
