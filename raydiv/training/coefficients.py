"""Judge: from the global batch's log-probs to one coefficient per example.

Pure: every rank evaluates it on the same vectors and comes to the same numbers. Where an objective separates over examples or
pairs, ``known_coefficients`` has those of a part before the rest of the step is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raydiv.losses import Batch, State, Term, Value
from raydiv.training.metrics import reward_metrics


class NotFiniteError(FloatingPointError):
    """A step that must not be applied, and was not. ``positions``: its examples that are to blame, as far as that is known."""

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(f"{message}; the step was not applied")
        self.positions = list(positions)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """``loss``: the weighted sum of the terms; ``coefficients`` [n] = d loss / d logps; ``states``: one per term."""

    loss: float
    coefficients: Tensor
    states: list[State]
    metrics: dict[str, float]


def first_states(terms: Sequence[Term]) -> list[State]:
    """The running state of each term before the first step."""
    return [dict(term.objective.state) for term in terms]


def known_coefficients(terms: Sequence[Term], states: Sequence[State], batch: Batch) -> Tensor:
    """Coefficients [n], right for the examples whose scope is whole in ``batch``; other log-probs may be anything finite.

    Nothing is refused here: what is not finite reaches ``judge``, on every rank, before the update.
    """
    return _differentiate(terms, states, batch)[2]


@torch.enable_grad()
def _differentiate(terms: Sequence[Term], states: Sequence[State], batch: Batch) -> tuple[list[Value], Tensor, Tensor]:
    """Value of each term, their weighted sum, and its gradient [n] by the log-probs.

    Has a graph of its own also where autograd is off, as in the middle of the head.
    """
    logps = batch.logps.detach().requires_grad_()
    watched = replace(batch, logps=logps)
    values = [
        term.objective.function(watched, state, **term.options) for term, state in zip(terms, states, strict=True)
    ]
    loss = torch.stack([term.weight * value.loss for term, value in zip(terms, values, strict=True)]).sum()
    (coefficients,) = torch.autograd.grad(loss, logps)
    return values, loss.detach(), coefficients


def evaluate_objective(terms: Sequence[Term], states: Sequence[State], batch: Batch) -> LossOutput:
    """Evaluate the objective on the global batch.

    Raises NotFiniteError when a log-prob, the value or a coefficient is not finite: the step must not be applied (a
    zero coefficient does not keep a NaN activation out of the gradient).
    """
    for name, logps in (("log-probs", batch.logps), ("mismatched log-ratios", batch.mismatched_log_ratios)):
        if not logps.isfinite().all():
            bad = (~logps.isfinite()).nonzero().flatten().tolist()
            raise NotFiniteError(f"{name} of examples {bad[:10]} of the step are not finite", bad)
    values, loss, coefficients = _differentiate(terms, states, batch)
    if not (loss.isfinite() and coefficients.isfinite().all()):
        bad = (~coefficients.isfinite()).nonzero().flatten().tolist()
        raise NotFiniteError(
            f"the objective is {float(loss)} and {len(bad)} of {len(coefficients)} coefficients are not finite", bad
        )
    metrics = {"loss": float(loss)}
    if values[0].divergence is not None:
        metrics["divergence"] = float(values[0].divergence.detach()) + 0.0  # -0.0 becomes 0.0
    metrics |= _objective_shares(terms, [float(value.loss.detach()) for value in values])
    metrics |= reward_metrics(batch, terms[0].reward_scale)
    return LossOutput(metrics["loss"], coefficients, [value.state for value in values], metrics)


def _objective_shares(terms: Sequence[Term], losses: Sequence[float]) -> dict[str, float]:
    """``loss/NAME`` of each term, unweighted, when there are several."""
    return {f"loss/{term.name}": loss for term, loss in zip(terms, losses, strict=True)} if len(terms) > 1 else {}
