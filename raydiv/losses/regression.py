"""Regressions of log-ratios on fixed targets; both estimate the triangular discrimination.

Notation: a and b are the log-ratios of a pair's aligned and unaligned example; T = integral of (p - q)^2 / (p + q) <= 2
for the densities p of D+ and q of D-. The value is the mean over the pairs of the global batch.
"""

from __future__ import annotations

from raydiv.losses.numerics import pair_mean
from raydiv.losses.objective import Batch, Positive, State, Value, objective

TRIANGULAR = "triangular discrimination of D+ and D-"


@objective(
    paper="Azar et al. 2023 (arXiv 2310.12036), eq. 17; per token as in TRL",
    data="paired",
    divergence=f"{TRIANGULAR}, from below",
    ceiling=lambda options: 2.0,
)
def ipo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    length_normalize: bool = True,
) -> Value:
    """Identity preference optimisation: (a - b - 1/(2 beta))^2; ``length_normalize``: a and b per response token.

    At its optimum 4 beta^2 times the objective is y = (2 - T) / (2 + T), so the estimate is 2 (1 - y) / (1 + y). Over
    several prompts y is the mean of a convex function of the T of each, so that the estimate is at most their mean.
    """
    log_ratios = batch.log_ratios / batch.tokens if length_normalize else batch.log_ratios
    aligned, unaligned = batch.paired(log_ratios)
    target = 1 / (2 * beta)
    loss = pair_mean((aligned - unaligned - target).square(), empty=target**2)
    share = loss / target**2
    return Value(loss, divergence=2 * (1 - share) / (1 + share))


@objective(
    paper="Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with hard labels",
    data="paired",
    divergence=TRIANGULAR,
    ceiling=lambda options: 2.0,
    scope="example",
)
def sppo(batch: Batch, state: State, *, beta: Positive = 0.1) -> Value:
    """Self-play preference optimisation: (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

    At its optimum the objective is (2 - T) / (4 beta^2).
    """
    aligned, unaligned = batch.paired(batch.log_ratios)
    target = 1 / (2 * beta)
    loss = pair_mean((aligned - target).square() + (unaligned + target).square(), empty=2 * target**2)
    return Value(loss, divergence=2 - loss / target**2)
