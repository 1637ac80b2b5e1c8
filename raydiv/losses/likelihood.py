"""Objectives of the policy's own log-probs: no reference.

Notation: l is log pi(y|x) of an example, n its response tokens, x = l/n; w and l index a pair's aligned and unaligned
example; s the sigmoid. NLL is the mean negative log-prob per token over all aligned responses of the global batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from raydiv.losses.numerics import log_sigmoid, pair_logistic, pair_mean
from raydiv.losses.objective import Batch, Positive, State, Value, objective
from raydiv.losses.preference import JS_OF_PAIRS

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-12
"""Lower limit of a sum of token weights, against division by 0 where a batch has no aligned response."""

MAX_TOKEN_LOGP = -1e-6
"""Log-probs per token are clamped to this: the odds of a certain response are infinite."""


def _nll(batch: Batch) -> Tensor:
    """Mean negative log-prob per token of the aligned responses; 0 without any."""
    total = -batch.logps.where(batch.aligned, batch.logps.new_zeros(())).sum()
    tokens = batch.tokens.where(batch.aligned, batch.tokens.new_zeros(())).sum()
    return (total / tokens.clamp(min=SMALLEST)).to(batch.logps.dtype)


@objective(
    paper="maximum likelihood of the aligned responses",
    data="unpaired",
    reward_scale=None,
    divergence="none",
    needs_reference=False,
    needs_unaligned=False,
    scope="example",
)
def sft(batch: Batch, state: State) -> Value:
    """Supervised fine-tuning: NLL of the aligned responses, per response token of the global batch."""
    return Value(_nll(batch))


@objective(
    paper="Xu et al. 2024 (arXiv 2401.08417), eq. 3 with its likelihood term",
    data="paired",
    divergence=f"{JS_OF_PAIRS}, by its preference term",
    ceiling=lambda options: math.log(2),
    needs_reference=False,
)
def cpo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    cpo_alpha: Annotated[float, Ge(0)] = 1.0,
) -> Value:
    """Contrastive preference optimisation: -log s(beta (l_w - l_l)) + cpo_alpha NLL."""
    better, worse = batch.paired(batch.logps)
    preference = pair_logistic(beta * (better - worse))
    return Value(preference + cpo_alpha * _nll(batch), divergence=math.log(2) - preference)


@objective(
    paper="Meng et al. 2024 (arXiv 2405.14734), eq. 6",
    data="paired",
    divergence=f"{JS_OF_PAIRS}, from below (tight at gamma 0)",
    ceiling=lambda options: math.log(2),
    needs_reference=False,
)
def simpo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 2.0,
    gamma: Annotated[float, Ge(0)] = 0.5,
) -> Value:
    """Simple preference optimisation: -log s(beta (x_w - x_l) - gamma), x per response token."""
    better, worse = batch.paired(batch.logps / batch.tokens)
    loss = pair_mean(-log_sigmoid(beta * (better - worse) - gamma), empty=gamma + math.log1p(math.exp(-gamma)))
    return Value(loss, divergence=math.log(2) - loss)


@objective(
    paper="Hong et al. 2024 (arXiv 2403.07691), eq. 4 and 7",
    data="paired",
    reward_scale=None,
    divergence=f"{JS_OF_PAIRS}, by its odds term",
    ceiling=lambda options: math.log(2),
    needs_reference=False,
)
def orpo(batch: Batch, state: State, *, odds_weight: Positive = 0.1) -> Value:
    """Odds ratio preference optimisation: NLL - odds_weight log s(log odds_w - log odds_l).

    odds = exp x / (1 - exp x), x per response token (``odds_weight`` is the paper's lambda). The NLL is of responses
    alone; TRL's counts the prompts' tokens too.
    """
    better, worse = batch.paired(_log_odds(batch.logps / batch.tokens))
    preference = pair_logistic(better - worse)
    return Value(_nll(batch) + odds_weight * preference, divergence=math.log(2) - preference)


def _log_odds(x: Tensor) -> Tensor:
    """Log odds x - log(1 - exp x) of log-probs per token x < 0."""
    x = x.clamp(max=MAX_TOKEN_LOGP)
    return x - (-x.expm1()).log()
