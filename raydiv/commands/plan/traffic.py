"""Bytes that a worker sends per step: DeepSpeed 0.19's collectives at each ZeRO stage, as ring algorithms send them.

DeepSpeed's communication logger counted the elements (tests/distributed/test_traffic.py). Let P be the trainable and T
all parameters, in the precision of the weights. Gradients: P once per step at stages 0 and 1, P per micro-batch at
stages 2 and 3. Weights: P once per step at stages 1 and 2; at stage 3, T per forward and T per backward (less if the
gathered weights stay between the two).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from raydiv.commands.plan.architecture import Architecture
from raydiv.commands.plan.memory import WEIGHT_BYTES, Stage
from raydiv.config import Recipe

NETWORK, ARITHMETIC = 12.5e9, 2e14
"""Bytes a second that a worker sends over a network of 100 Gbit/s, and operations a second of a GPU in bf16: orders of
magnitude, to tell whether a network between nodes would rule the step. GPUs of one node exchange ten times as much.
"""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one of ``workers`` sends in a step of ``micro_batches`` micro-batches per worker."""

    gradients: float
    weights: float
    micro_batches: int
    workers: int

    @property
    def total(self) -> float:
        return self.gradients + self.weights

    def network_note(self, operations: float) -> str | None:
        """Where sending over a network would take longer than a worker's ``operations`` of a step: both times."""
        sending, arithmetic = self.total / NETWORK, operations / ARITHMETIC
        if sending <= arithmetic:
            return None
        helps = ["faster links"]
        several = self.micro_batches > 1
        helps.append("larger micro-batches" if several else "more examples a step")
        if several and self.weights > self.gradients:
            helps.append("a ZeRO stage below 3")
        if self.gradients > self.total / 10:
            helps.append("LoRA")
        return (
            f"with workers on several nodes the network would rule the step: sending takes {sending:.2g} s at 100 "
            f"Gbit/s a worker, and the arithmetic {arithmetic:.2g} s at {ARITHMETIC / 1e12:.0f} TFLOP/s; what helps: "
            f"{', '.join(helps)}"
        )

    def rows(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def step_traffic(
    architecture: Architecture, recipe: Recipe, stage: Stage, workers: int, micro_batches: int, *, two_passes: bool
) -> Traffic:
    """Traffic of one worker per step. ``two_passes``: each micro-batch is scored before it is pushed."""
    each = WEIGHT_BYTES[recipe.engine.precision]
    part = (workers - 1) / workers
    trained, everything = each * architecture.trainable, each * architecture.parameters
    # an all-reduce (stages 0 to 2 in DeepSpeed) sends twice what a reduce-scatter (stage 3) sends
    gradients = part * trained * {0: 2, 1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]
    forwards = 2 if two_passes else 1
    weights = part * {0: 0, 1: trained, 2: trained, 3: everything * (forwards + 1) * micro_batches}[stage]
    return Traffic(gradients, weights, micro_batches, workers)
