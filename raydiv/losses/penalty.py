"""Penalties: nothing to learn by themselves; mixed into an objective, they hold the policy near its reference."""

from __future__ import annotations

from typing import Literal

from raydiv.losses.numerics import class_mean
from raydiv.losses.objective import Batch, State, Value, objective


@objective(
    paper="raydiv's; a trust region on the log-ratios",
    data="unpaired",
    reward_scale=None,
    divergence="none",
    unaligned=False,
    scope="example",
    penalty=True,
)
def log_ratio_l2(
    batch: Batch,
    state: State,
    *,
    members: Literal["both", "aligned", "unaligned"] = "both",
    length_normalize: bool = False,
) -> Value:
    """Squared log-ratios, in nats^2: E+[a^2] + E-[b^2], or of one class; ``length_normalize``: per response token.

    For ``loss.mix`` only. The gradient of a log-ratio of x nats is 2 x, so a weight of w holds an objective whose coefficient
    is c at about |x| = c / (2 w): kldo's are beta / n, those of the penalty 2 w x / n.
    """
    ratios = batch.log_ratios / batch.tokens if length_normalize else batch.log_ratios
    chosen = {"both": (batch.aligned, ~batch.aligned), "aligned": (batch.aligned,), "unaligned": (~batch.aligned,)}
    squares = ratios.square()
    loss = class_mean(squares, chosen[members][0])
    for other in chosen[members][1:]:
        loss = loss + class_mean(squares, other)
    return Value(loss)
