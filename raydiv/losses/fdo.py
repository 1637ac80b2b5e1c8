"""F-divergence optimisation: the variational bound of any f-divergence as a loss.

Notation: r = beta * log-ratio; E+ and E- the means over the aligned and the unaligned examples of the global batch,
each class averaged by itself; s the sigmoid; D_f = E-[f(p/q)] for the densities p of D+ and q of D-.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from raydiv.losses.numerics import bounded_expm1, class_mean, log_sigmoid
from raydiv.losses.objective import Batch, Options, Positive, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor

Elementwise = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """``link`` is g(r) = f'(exp r), ``conjugate`` is f*(g(r)); both up to one constant, which cancels in the bound."""

    link: Elementwise
    conjugate: Elementwise
    ceiling: float | None


def power(alpha: float, scale: float = 1.0) -> Divergence:
    """``scale`` times Cressie and Read's divergence, f(t) = (t^alpha - alpha t + alpha - 1) / (alpha (alpha - 1))."""
    return Divergence(
        lambda r: scale * _expm1_over(alpha - 1, r),
        lambda r: scale * _expm1_over(alpha, r),
        scale / (alpha * (1 - alpha)) if 0 < alpha < 1 else None,
    )


def _expm1_over(k: float, r: Tensor) -> Tensor:
    """(exp(k r) - 1) / k, and its limit r near k = 0."""
    return bounded_expm1(k * r) / k if abs(k) > 1e-12 else r


DIVERGENCES: dict[str, Divergence] = {
    "kl": power(1.0),
    "reverse-kl": power(0.0),
    "pearson": power(2.0, scale=2.0),
    "squared-hellinger": power(0.5, scale=0.5),
    "jensen-shannon": Divergence(
        lambda r: math.log(2) + log_sigmoid(r), lambda r: -math.log(2) - log_sigmoid(-r), 2 * math.log(2)
    ),
    # the only link that is not canonical: here f' is a step function, without gradient
    "total-variation": Divergence(lambda r: r.sigmoid() - 0.5, lambda r: r.sigmoid() - 0.5, 1.0),
}
"""f-divergences by name. The name ``alpha`` is not here: it is the power divergence of the option ``alpha``."""

LABELS = {"squared-hellinger": "H^2", "jensen-shannon": "2 JS", "total-variation": "TV", "pearson": "chi^2"}


def _divergence(options: Options) -> Divergence:
    name = options["divergence"]
    return power(options["alpha"]) if name == "alpha" else DIVERGENCES[name]


def _divergence_name(options: Options) -> str:
    name = options["divergence"]
    if name == "alpha":
        return f"alpha-divergence(D+ || D-), alpha {options['alpha']:g}"
    return f"{LABELS.get(name, name.replace('kl', 'KL'))}(D+ || D-)"


@objective(
    paper="Haldar et al. (arXiv 2502.00657, 2602.05946); Nguyen et al. 2010 (arXiv 0809.0853)",
    data="unpaired",
    divergence=_divergence_name,
    ceiling=lambda options: _divergence(options).ceiling,
    scope="example",
    requires={"alpha": ("divergence", ("alpha",))},
)
def fdo(
    batch: Batch,
    state: State,
    *,
    beta: Positive = 0.1,
    divergence: Literal[
        "kl", "reverse-kl", "pearson", "squared-hellinger", "jensen-shannon", "total-variation", "alpha"
    ] = "jensen-shannon",
    alpha: Annotated[float, Ge(-10), Le(10)] = 0.5,
) -> Value:
    """F-divergence optimisation: -E+[g(r)] + E-[f*(g(r))], g(r) = f'(exp r).

    Minus the objective is a lower bound of ``divergence`` for every reward and reaches it at r = log(p/q), where p and
    q are the densities of D+ and D- (total-variation: as |r| grows). On a batch of distinct examples kl, reverse-kl,
    pearson and alpha outside (0, 1) are unbounded below whatever the laws. alpha 1 is kl, 0 reverse-kl, 1/2 twice
    squared-hellinger, 2 half of pearson, -1 half of Neyman's chi^2. Exponentials above e^30 continue as tangents.
    """
    f = _divergence({"divergence": divergence, "alpha": alpha})
    r = beta * batch.log_ratios
    at_zero = r.new_zeros(())
    loss = class_mean(f.conjugate(r), ~batch.aligned, empty=f.conjugate(at_zero)) - class_mean(
        f.link(r), batch.aligned, empty=f.link(at_zero)
    )
    return Value(loss, divergence=-loss)
