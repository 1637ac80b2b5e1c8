"""Saturating utilities: an example whose reward is far enough on the correct side gets no more gradient.

Notation: r = beta * log-ratio, r+ and r- those of an aligned and an unaligned example; s the sigmoid; E+ and E- the
means over the two classes of the global batch, each averaged by itself. The paired objectives average over pairs.
"""

from __future__ import annotations

import math

from raydiv.losses.numerics import class_mean, log_sigmoid, pair_mean
from raydiv.losses.objective import Batch, Options, Positive, State, Value, objective


def _weighted_tv(options: Options) -> str:
    aligned, unaligned = options["lambda_aligned"], options["lambda_unaligned"]
    if aligned == unaligned == 1:
        return "TV(D+ || D-)"
    return f"integral of |{aligned:g} p - {unaligned:g} q| / 2 over the densities p of D+ and q of D-"


@objective(
    paper="Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7; the divergence: Haldar et al. 2025",
    data="unpaired",
    divergence=_weighted_tv,
    ceiling=lambda options: (options["lambda_aligned"] + options["lambda_unaligned"]) / 2,
    scope="example",
    needs_mismatched=True,
)
def kto(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    lambda_aligned: Positive = 1.0,
    lambda_unaligned: Positive = 1.0,
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
    paper="D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, unpaired as in TRL",
    data="unpaired",
    divergence="TV(D+ || D-)",
    ceiling=lambda options: 1.0,
    scope="example",
)
def apo_zero_unpaired(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Anchored preference optimisation, unpaired: E+[1 - s(r)] + E-[s(r)]; kto with z0 = 0."""
    r = beta * batch.log_ratios
    loss = class_mean((-r).sigmoid(), batch.aligned, empty=0.5) + class_mean(r.sigmoid(), ~batch.aligned, empty=0.5)
    return Value(loss, divergence=1 - loss)


@objective(
    paper="D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7",
    data="paired",
    divergence="TV(D+ || D-)",
    ceiling=lambda options: 1.0,
    scope="example",
)
def apo_zero(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Anchored preference optimisation, zero: 1 - s(r+) + s(r-). Raises aligned and lowers unaligned responses."""
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    loss = pair_mean((-aligned).sigmoid() + unaligned.sigmoid(), empty=1.0)
    return Value(loss, divergence=1 - loss)


@objective(paper="D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8", data="paired", divergence="none")
def apo_down(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Anchored preference optimisation, down: s(r+) + 1 - s(D), D = r+ - r-. Lowers both, unaligned ones more.

    At r = 0 its pull on the aligned response cancels: no aligned reward rises.
    """
    aligned, unaligned = batch.paired(beta * batch.log_ratios)
    return Value(pair_mean(aligned.sigmoid() + (unaligned - aligned).sigmoid(), empty=1.0))


@objective(
    paper="Zhang et al. 2024 (arXiv 2404.05868), eq. 3",
    data="unpaired",
    divergence="none",
    needs_aligned=False,
    scope="example",
)
def npo(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Negative preference optimisation: -(2 / beta) E-[log s(-r)]: it unlearns, and fades as the reward falls.

    Aligned examples have no effect. With ``mix: {sft: {weight: 1}}``, on data with answers that have begun wrongly
    (``raydiv data build --recovery``), it has the two objectives of DOOR (Zhao et al. 2025, arXiv 2503.03710); there
    the likelihood is a sum over a response's tokens, sft's is a mean.
    """
    r = beta * batch.log_ratios
    return Value(2 / beta * class_mean(-log_sigmoid(-r), ~batch.aligned, empty=math.log(2)))
