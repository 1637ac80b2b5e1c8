"""Bytes that a worker sends in a step: what DeepSpeed 0.19 exchanges under each ZeRO stage, as ring algorithms send it.

What is exchanged was counted by DeepSpeed's own logger (tests/distributed/test_traffic.py), of P trained and T
parameters, in the precision of the weights: gradients P once a step at the stages 0 and 1, else P with each
micro-batch; weights P once at the stages 1 and 2, and at stage 3 T with each forward and each backward (less for a
model of which everything is kept between the two).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from raydiv.commands.plan.architecture import Architecture
from raydiv.commands.plan.memory import WEIGHT_BYTES, Stage
from raydiv.config import Recipe


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one of ``workers`` sends in a step of so many ``micro_batches`` each."""

    gradients: float
    weights: float
    micro_batches: int
    workers: int

    @property
    def total(self) -> float:
        return self.gradients + self.weights

    def rows(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def traffic_of(
    architecture: Architecture, recipe: Recipe, stage: Stage, workers: int, micro_batches: int, *, two_passes: bool
) -> Traffic:
    """``two_passes``: each micro-batch is scored before it is pushed."""
    each = WEIGHT_BYTES[recipe.engine.precision]
    part = (workers - 1) / workers
    trained, everything = each * architecture.trainable, each * architecture.parameters
    # an all-reduce, which DeepSpeed makes at stage 2 too, is a reduction and a gathering; stage 3 reduces alone
    gradients = part * trained * {0: 2, 1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]
    forwards = 2 if two_passes else 1
    weights = part * {0: 0, 1: trained, 2: trained, 3: everything * (forwards + 1) * micro_batches}[stage]
    return Traffic(gradients, weights, micro_batches, workers)
