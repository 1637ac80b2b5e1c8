"""Penalties: they only keep the policy near its reference, and are mixed into an objective."""

from __future__ import annotations

from typing import Literal

from raydiv.losses.numerics import class_mean
from raydiv.losses.objective import Batch, State, Value, objective


@objective(
    paper="raydiv's; a trust region on the log-ratios",
    data="unpaired",
    reward_scale=None,
    divergence="none",
    needs_unaligned=False,
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

    For ``loss.mix`` only. The gradient of the penalty at a log-ratio of x nats is 2 x. So a weight of w holds an
    objective with coefficient c at about |x| = c / (2 w): kldo's coefficients are beta / n, those of the penalty 2 w x
    / n.
    """
    ratios = batch.log_ratios / batch.tokens if length_normalize else batch.log_ratios
    masks = {"both": (batch.aligned, ~batch.aligned), "aligned": (batch.aligned,), "unaligned": (~batch.aligned,)}
    squares = ratios.square()
    loss = class_mean(squares, masks[members][0])
    for mask in masks[members][1:]:
        loss = loss + class_mean(squares, mask)
    return Value(loss)
