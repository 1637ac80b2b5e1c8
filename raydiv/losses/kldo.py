"""KL divergence optimisation: Donsker and Varadhan's bound as a loss.

Notation: r = beta * log-ratio; E+ and E- the means over the aligned and the unaligned examples of the global batch,
each class averaged by itself; E the mixture skew E+ + (1 - skew) E-.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt

from raydiv.losses.numerics import bounded_exp, class_log_mean_exp, class_mean
from raydiv.losses.objective import Batch, EmaRate, Options, Positive, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor


def _divergence_name(options: Options) -> str:
    skew = options["skew"]
    return f"KL(D+ || {skew:g} D+ + {1 - skew:g} D-)" if skew else "KL(D+ || D-)"


@objective(
    paper="Haldar et al. 2025 (arXiv 2502.00657); the skewed form is raydiv's",
    data="unpaired",
    divergence=_divergence_name,
    ceiling=lambda options: -math.log(options["skew"]) if options["skew"] else None,
    listed_values={"skew": (0.5,)},
    scope=lambda options: "example" if options["estimator"] == "lagged" else "batch",
    requires={"ema_rate": ("estimator", ("ema", "lagged"))},
    state={"log_mean": 0.0},
)
def kldo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    skew: Annotated[float, Ge(0), Lt(1)] = 0.0,
    estimator: Literal["batch", "ema", "lagged"] = "batch",
    ema_rate: EmaRate = 0.1,
) -> Value:
    """KL divergence optimisation: -E+[r] + log(skew E+[exp r] + (1 - skew) E-[exp r]).

    With ``skew`` 0 this is the paper's loss, unbounded below on any batch of distinct examples; with ``skew`` > 0 it is
    at least -log(1/skew) on every batch. ``estimator`` is the log-mean-exp m by which the gradient divides:

    - ``batch``: the step's own, exactly. Adding a constant to every reward changes nothing.
    - ``ema``: a running mean at ``ema_rate`` that includes the step's (as in MINE). Coefficients exp(r - m)/n sum to at
      most 1/ema_rate; the loss can fall log(1/ema_rate) below its bound, since a running mean lags the step's.
    - ``lagged``: the running mean of the previous steps, in the surrogate -E+[r] + m + E[exp(r - m)] - 1, which keeps
      the bound. Each coefficient depends on its own example alone, so the step takes one pass. Weights exp(r - m) are
      limited to max(1/ema_rate, 2/skew) (the exponential continues as its tangent). Below that limit the surrogate is
      never under the exact objective; without ``skew`` the limit also keeps densities p/q above 1/ema_rate out of
      reach.

    A class absent from the step counts as one example of reward 0, or at the running mean where there is one. The
    divergence is the step's own Donsker-Varadhan estimate under every estimator.
    """
    r = beta * batch.log_ratios
    log_mean = _log_mixture(r, batch.aligned, skew)
    gain = class_mean(r, batch.aligned)
    exact = log_mean - gain
    if estimator == "batch":
        return Value(exact, divergence=-exact, state={"log_mean": float(log_mean.detach())})
    current = _log_mixture(r, batch.aligned, skew, empty=state["log_mean"])
    mean = _running_log_mean(current, state["log_mean"], ema_rate)
    if estimator == "ema":
        loss = mean - gain
    else:
        largest = max(1 / ema_rate, 2 / skew if skew else 0)
        loss = _surrogate(r, batch.aligned, state["log_mean"], skew, largest) - gain
    return Value(loss, divergence=-exact, state={"log_mean": float(mean.detach())})


def _log_mixture(r: Tensor, aligned: Tensor, skew: float, empty: float = 0.0) -> Tensor:
    """log(skew E+[exp r] + (1 - skew) E-[exp r]); ``empty`` is the log-mean-exp of a class absent from the step."""
    unaligned = class_log_mean_exp(r, ~aligned, empty)
    if not skew:
        return unaligned
    return (class_log_mean_exp(r, aligned, empty) + math.log(skew)).logaddexp(unaligned + math.log1p(-skew))


def _running_log_mean(log_mean: Tensor, previous: float, rate: float) -> Tensor:
    """log((1 - rate) exp(previous) + rate exp(log_mean)), with MINE's gradient exp(log_mean - result) d log_mean.

    At the start the policy is the reference, so r = 0 and the running mean's logarithm 0 is exact: it needs no "unset"
    value.
    """
    if rate == 1:
        return log_mean
    new = log_mean.detach() + math.log(rate)
    mean = new.logaddexp(new.new_full((), previous + math.log1p(-rate)))
    weight = (log_mean - mean).exp()
    return mean + weight - weight.detach()


def _surrogate(r: Tensor, aligned: Tensor, log_mean: float, skew: float, largest: float) -> Tensor:
    """The surrogate of log E[exp r] at a given log-mean-exp."""
    weights = bounded_exp(r - log_mean, math.log(largest))
    mixture = (1 - skew) * class_mean(weights, ~aligned, empty=1.0)
    if skew:
        mixture = mixture + skew * class_mean(weights, aligned, empty=1.0)
    return log_mean + mixture - 1
