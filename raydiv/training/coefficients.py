"""The loss on the global batch: its value, and one coefficient per example.

Pure: every rank evaluates it on the same vectors and gets the same numbers. Where an objective separates over examples
or pairs, ``known_coefficients`` gives those of a part before the rest of the step has been scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raydiv.losses import Batch, State, Term, Value
from raydiv.training.metrics import finite, reward_metrics


class NotFiniteError(FloatingPointError):
    """Log-probs, loss or gradient are not finite. ``positions``: the examples that caused it, where known."""

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.positions = list(positions)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """``loss``: weighted sum of the terms; ``coefficients`` [n]: d loss / d logps; ``states``: next, one per term."""

    loss: float
    coefficients: Tensor
    states: list[State]
    metrics: dict[str, float]


def initial_states(terms: Sequence[Term]) -> list[State]:
    """The running state of each term before the first step."""
    return [dict(term.objective.state) for term in terms]


def known_coefficients(terms: Sequence[Term], states: Sequence[State], batch: Batch) -> Tensor:
    """Coefficients [n], correct for examples whose scope is complete in ``batch``. Other log-probs may be any finite
    ones.

    Nothing is checked here: what is not finite reaches ``evaluate_objective``, on every rank, before the update.
    """
    return _differentiate(terms, states, batch)[2]


@torch.enable_grad()
def _differentiate(terms: Sequence[Term], states: Sequence[State], batch: Batch) -> tuple[list[Value], Tensor, Tensor]:
    """Value of each term, their weighted sum, and its gradient [n] by the log-probs.

    The decorator gives it a graph of its own also where autograd is off, as inside the head's forward.
    """
    logps = batch.logps.detach().requires_grad_()
    differentiable = replace(batch, logps=logps)
    values = [
        term.objective.function(differentiable, state, **term.options)
        for term, state in zip(terms, states, strict=True)
    ]
    loss = torch.stack([term.weight * value.loss for term, value in zip(terms, values, strict=True)]).sum()
    (coefficients,) = torch.autograd.grad(loss, logps)
    return values, loss.detach(), coefficients


def evaluate_objective(terms: Sequence[Term], states: Sequence[State], batch: Batch) -> LossOutput:
    """Evaluate the loss on the global batch. A metric that is not finite is left out.

    Raises NotFiniteError where a log-prob, the loss or a coefficient is not finite: then the step must not be applied
    (a zero coefficient does not keep a NaN activation out of the gradient).
    """
    for name, logps in (("log-probs", batch.logps), ("mismatched log-ratios", batch.mismatched_log_ratios)):
        if not logps.isfinite().all():
            positions = (~logps.isfinite()).nonzero().flatten().tolist()
            raise NotFiniteError(f"{name} of examples {positions[:10]} of the batch are not finite", positions)
    values, loss, coefficients = _differentiate(terms, states, batch)
    if not (loss.isfinite() and coefficients.isfinite().all()):
        positions = (~coefficients.isfinite()).nonzero().flatten().tolist()
        raise NotFiniteError(
            f"the objective is {float(loss)} and {len(positions)} of {len(coefficients)} coefficients are not finite",
            positions,
        )
    metrics = {"loss": float(loss)}
    if values[0].divergence is not None:
        metrics["divergence"] = float(values[0].divergence.detach()) + 0.0  # -0.0 becomes 0.0
    metrics |= _term_losses(terms, values)
    metrics |= reward_metrics(batch, terms[0].reward_scale)
    return LossOutput(metrics["loss"], coefficients, [value.state for value in values], finite(metrics))


def _term_losses(terms: Sequence[Term], values: Sequence[Value]) -> dict[str, float]:
    """``loss/NAME`` of each term, unweighted, where there are several."""
    if len(terms) == 1:
        return {}
    return {f"loss/{term.name}": float(value.loss.detach()) for term, value in zip(terms, values, strict=True)}
