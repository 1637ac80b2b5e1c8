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

from raydiv.losses.numerics import MAX_EXPONENT, bounded_expm1, class_mean, log_sigmoid
from raydiv.losses.objective import Batch, Options, Positive, State, Value, objective

if TYPE_CHECKING:
    from torch import Tensor

Elementwise = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """``link`` is g(r) = f'(exp r), ``conjugate`` is f*(g(r)); both up to one constant, which cancels in the bound.

    Up to the size ``exact_up_to`` of r neither has an exponential that continues as a tangent.
    """

    link: Elementwise
    conjugate: Elementwise
    ceiling: float | None
    exact_up_to: float = math.inf


def power(alpha: float, scale: float = 1.0, bound: float = MAX_EXPONENT) -> Divergence:
    """``scale`` times Cressie and Read's divergence, f(t) = (t^alpha - alpha t + alpha - 1) / (alpha (alpha - 1)).

    Exponentials continue as tangents above ``bound``.
    """
    return Divergence(
        lambda r: scale * _expm1_over(alpha - 1, r, bound),
        lambda r: scale * _expm1_over(alpha, r, bound),
        scale / (alpha * (1 - alpha)) if 0 < alpha < 1 else None,
        bound / max(abs(alpha - 1), abs(alpha)),
    )


def _expm1_over(k: float, r: Tensor, bound: float) -> Tensor:
    """(exp(k r) - 1) / k, and its limit r near k = 0."""
    return bounded_expm1(k * r, bound) / k if abs(k) > 1e-12 else r


POWERS = {"kl": (1.0, 1.0), "reverse-kl": (0.0, 1.0), "pearson": (2.0, 2.0), "squared-hellinger": (0.5, 0.5)}
"""Alpha and scale of the divergences with a name."""

DIVERGENCES: dict[str, Divergence] = {
    **{name: power(*parameters) for name, parameters in POWERS.items()},
    "jensen-shannon": Divergence(
        lambda r: math.log(2) + log_sigmoid(r), lambda r: -math.log(2) - log_sigmoid(-r), 2 * math.log(2)
    ),
    # the only link that is not canonical: here f' is a step function, without gradient
    "total-variation": Divergence(lambda r: r.sigmoid() - 0.5, lambda r: r.sigmoid() - 0.5, 1.0),
}
"""f-divergences by name. The name ``alpha`` is not here: it is the power divergence of the option ``alpha``."""

LABELS = {"squared-hellinger": "H^2", "jensen-shannon": "2 JS", "total-variation": "TV", "pearson": "chi^2"}


ESTIMATE_EXPONENT = 80.0
"""The largest exponent of the estimate, which has no gradient: e^80 = 6e34 is finite in fp32."""


def _divergence(options: Options, bound: float = MAX_EXPONENT) -> Divergence:
    name = options["divergence"]
    if name == "alpha":
        return power(options["alpha"], bound=bound)
    return power(*POWERS[name], bound) if name in POWERS else DIVERGENCES[name]


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

    Minus the objective is a lower bound of ``divergence`` and reaches it at r = log(p/q), where p and q are the
    densities of D+ and D- (total-variation: as |r| grows). On a batch of distinct examples kl, reverse-kl, pearson and
    alpha outside (0, 1) are unbounded below whatever the laws. alpha 1 is kl, 0 reverse-kl, 1/2 twice
    squared-hellinger, 2 half of pearson, -1 half of Neyman's chi^2. Exponentials above e^30 continue as tangents, by
    which the objective is no bound any more: the estimate is the bound at rewards that are clipped before theirs begin
    (above e^80), and so a lower bound whatever the rewards.
    """
    options = {"divergence": divergence, "alpha": alpha}
    f, exact = _divergence(options), _divergence(options, ESTIMATE_EXPONENT)
    r = beta * batch.log_ratios
    at_zero = r.new_zeros(())

    def objective_of(f: Divergence, rewards: Tensor) -> Tensor:
        return class_mean(f.conjugate(rewards), ~batch.aligned, empty=f.conjugate(at_zero)) - class_mean(
            f.link(rewards), batch.aligned, empty=f.link(at_zero)
        )

    clipped = r.detach().clamp(-exact.exact_up_to, exact.exact_up_to)
    return Value(objective_of(f, r), divergence=-objective_of(exact, clipped))
