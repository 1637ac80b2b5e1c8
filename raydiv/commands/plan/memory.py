"""Bytes of one training worker, from a model's sizes and a layout: pure arithmetic.

What DeepSpeed 0.19 holds at each ZeRO stage was read in its source and compared with measurements
(tests/distributed/test_plan.py). A step has several moments that may be its peak; the breakdown is that of the largest.
P are trainable parameters, N workers:

- weights: all of them below stage 3, there 1/N and what is gathered at a time.
- optimizer: two moments in fp32, and an fp32 copy of what they update, under any precision, from stage 1 on: 12 P / N.
- gradients: fp32; whole below stage 2, then P / N, and a flat copy of those for the update where they were not flat.
- buffers: the bucket that gradients are reduced in, the copy that is sent, and what is gathered ahead; gloo copies once more.

This is what is held. On a CPU more shows as resident, since glibc keeps some of what is freed (bench/README.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from raydiv.commands.plan.architecture import Architecture
from raydiv.config import Recipe
from raydiv.losses import widest_scope
from raydiv.model.head import buffer_bytes
from raydiv.training.engine import deepspeed_config

Stage = Literal[0, 1, 2, 3]

FP32 = 4
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
MOMENTS = 2 * FP32
"""Bytes of AdamW's two moments, a parameter."""

NF4 = 0.5 + FP32 / 64
"""Bytes of a 4-bit weight: half a byte, and its part of the scale in fp32 that a block of 64 has (QLoRA, section 3)."""

RUNTIME = 600 * 2**20
"""Python and its libraries in a worker on a CPU, after a first step of a model of no size (measured: 580-590 MiB). On a GPU the
context and NCCL's buffers are the margin's (see raydiv.commands.plan.layout)."""

UNSENT = 500_000_000
"""Elements that DeepSpeed reduces at a time where it does not partition gradients."""

DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
"""DeepSpeed's own, where neither raydiv nor the recipe says otherwise; all in elements."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one worker at the ``moment`` of a step when it has most; ``host``: what offload puts into the node's memory,
    and a checkpoint while it is written.

    ``head`` includes embedding, final norm, and what the backward of a layer makes. A worker on a CPU shares the node's memory.
    """

    moment: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    head: float = 0
    buffers: float = 0
    runtime: float = 0
    host: float = 0
    on_cpu: bool = True

    @property
    def total(self) -> int:
        """Bytes that the worker's memory must hold: the GPU's, or the machine's share."""
        own = (
            self.weights + self.gradients + self.optimizer + self.activations + self.head + self.buffers + self.runtime
        )
        return round(own + (self.host if self.on_cpu else 0))

    def rows(self) -> dict[str, int]:
        """The parts by name."""
        parts = {name: round(number) for name, number in asdict(self).items() if name not in ("moment", "on_cpu")}
        return parts


def memory_of(
    architecture: Architecture, recipe: Recipe, workers: int, stage: Stage, tokens: int, accumulates: bool = True
) -> Memory:
    """Memory of one of ``workers`` whose micro-batches have up to ``tokens``; ``accumulates``: several of them in a step."""
    return max(_Worker(architecture, recipe, workers, stage, tokens, accumulates).moments(), key=lambda one: one.total)


class _Worker:
    """One worker's sizes in bytes."""

    def __init__(
        self, architecture: Architecture, recipe: Recipe, workers: int, stage: Stage, tokens: int, accumulates: bool
    ) -> None:
        engine = recipe.engine
        zero: dict[str, Any] = DEFAULTS | deepspeed_config(recipe)["zero_optimization"]
        self.of, self.stage, self.tokens, self.accumulates = architecture, stage, tokens, accumulates
        self.on_gpu, self.workers = recipe.cluster.use_gpu, workers
        self.offloads, self.offloads_weights = engine.offload_optimizer != "none", engine.offload_parameters != "none"
        self.saves = recipe.checkpoint.every is not None
        self.nvme = "nvme" in (engine.offload_optimizer, engine.offload_parameters)
        self.size = WEIGHT_BYTES[engine.precision]
        self.half = engine.precision == "bf16"
        told_later = widest_scope(recipe.loss.terms) == "batch" and not accumulates and recipe.model.lora is None
        self.logits = buffer_bytes(architecture.vocabulary, tokens, told_later)
        self.trainable, self.part = architecture.trainable, architecture.trainable / workers
        self.bucket_elements = int(zero["reduce_bucket_size"])
        self.gathered_ahead = int(zero["stage3_prefetch_bucket_size"])
        self.live = int(zero["stage3_max_live_parameters"])
        self.sub_group = int(zero["sub_group_size"])
        self.persistent = int(zero["stage3_param_persistence_threshold"])
        quantized = architecture.linear if recipe.model.quantization else 0
        self.frozen = NF4 * quantized + self.size * (architecture.frozen - quantized)

    def moments(self) -> list[Memory]:
        """The moments of a step that may be its peak."""
        standing = Memory(
            "",
            weights=self._weights(),
            optimizer=self._optimizer(),
            head=self.logits,
            runtime=0 if self.on_gpu else RUNTIME,
            host=self._host(),
            on_cpu=not self.on_gpu,
        )
        whole = replace(standing, weights=standing.weights + self._gathered())
        reduced = whole if self.accumulates else standing
        gradients = self._gradients_kept()
        found = [
            replace(
                whole,
                moment="backward",
                gradients=gradients,
                activations=self.of.activations.at(self.tokens),
                head=self.logits + self.of.beside.at(self.tokens),
                buffers=self._on_the_way(),
            ),
            replace(
                reduced,
                moment="reduction",
                gradients=self._gradients_reduced(),
                buffers=self._bucket() + self._sent(),
            ),
            replace(standing, moment="update", gradients=self._gradients_flat(), buffers=self._kept_bucket()),
            replace(whole, moment="gathering", gradients=gradients, buffers=self._kept_bucket() + self._arriving()),
        ]
        if self.stage in (1, 2) and not self.on_gpu:
            building = self.size * self.trainable
            found.append(replace(standing, moment="building", optimizer=FP32 * self.part, buffers=building))
        return found

    def _weights(self) -> float:
        """Weights that stand between steps: under ZeRO-3 a part, and small parameters whole."""
        whole = self.size * self.trainable + self.frozen
        if self.stage < 3:
            return whole
        part = 0 if self.offloads_weights else whole / self.workers
        return part + (self.size * self.of.up_to(self.persistent) if self.workers > 1 else 0)

    def _gathered(self) -> float:
        """Weights beside those that are whole while ZeRO-3 computes; one worker has them all."""
        if self.stage < 3 or (self.workers == 1 and not self.offloads_weights):
            return 0
        live = min(self.of.parameters, self.live + max(self.of.tensors))
        return self.size * max(0, live - self.of.up_to(self.persistent))

    def _optimizer(self) -> float:
        if self.offloads:
            return 0
        return MOMENTS * self.trainable if self.stage == 0 else (FP32 + MOMENTS) * self.part

    def _gradients_kept(self) -> float:
        """Gradients beside a micro-batch's activations: of those before it, and its own where they are reduced on the way."""
        if self.stage == 3:
            return 0 if self.offloads else FP32 * self.part
        if self.stage == 1 and self.half:
            return FP32 * self.trainable
        before = FP32 * (self.part if self.stage == 2 else self.trainable) if self.accumulates else 0
        own = FP32 * self.part if self.stage == 2 and not self._at_once() and (before == 0 or not self.half) else 0
        return before + own

    def _gradients_reduced(self) -> float:
        """Gradients once the last micro-batch's are summed."""
        if self.stage == 3:
            return 0 if self.offloads else FP32 * self.part
        if self.stage == 0 or (self.stage == 1 and self.half):
            return FP32 * self.trainable
        if self.stage == 1:
            return FP32 * (self.trainable + self.part)
        return FP32 * self.part * (2 if self.accumulates and not self.half else 1)

    def _gradients_flat(self) -> float:
        """Gradients as the optimizer takes them."""
        if self.stage == 0 or (self.stage == 1 and self.half):
            return FP32 * self.trainable
        if self.offloads:
            return 0
        if self.stage == 3:
            return FP32 * (self.part + min(self.part, self.sub_group))
        return FP32 * self.part * (1 if self.half else 2)

    def _bucket(self) -> float:
        """Where gradients wait to be reduced; a GPU holds all of it, a CPU what is used."""
        if self.stage == 0 or (self.stage == 1 and self.half):
            return 0
        if self.stage == 1:
            return 0 if self.trainable <= self.bucket_elements else self.size * self.bucket_elements
        return self.size * (self.bucket_elements if self.on_gpu else min(self.trainable, self.bucket_elements))

    def _kept_bucket(self) -> float:
        """The bucket, where it stays from step to step."""
        return self._bucket() if self.stage == 3 else 0

    def _on_the_way(self) -> float:
        """What gradients and weights are sent and received in while activations wait.

        On a CPU a bucket that all gradients fit into fills as activations go.
        """
        again = self.stage == 3 and self.of.parameters > self.live
        bucket = self._bucket() if self.on_gpu or not self._at_once() else self._kept_bucket()
        return bucket + (0 if self._at_once() else self._sent()) + (self._arriving() if again else 0)

    def _at_once(self) -> bool:
        """Whether gradients are reduced when the backward is done, not on its way."""
        return self.stage < 2 or self.trainable <= self.bucket_elements

    def _sent(self) -> float:
        """Copies of gradients that are summed over workers."""
        if self.stage == 0 and self.workers == 1:
            return 0
        if self.stage == 0 or (self.stage == 1 and self.half):
            return FP32 * min(self.trainable, UNSENT)
        elements = max(min(self.trainable, self.bucket_elements), self.of.largest)
        widened = FP32 * min(self.of.largest, self.part) if self.half and self.stage == 2 else 0
        # gloo scatters a copy of what it is given
        return self.size * elements * (2 if self.stage == 3 and not self.on_gpu else 1) + widened

    def _arriving(self) -> float:
        """Copies of weights that come from the other workers: for the next layers, or after an update."""
        if self.workers == 1 or self.stage == 0:
            return 0
        if self.stage == 3:
            return self.size * min(self.of.parameters, self.gathered_ahead)
        return 0 if self.on_gpu else self.size * self.trainable

    def _host(self) -> float:
        """What offload puts into the node's memory, and the copy of the trained state that a checkpoint is written from."""
        host = (FP32 + MOMENTS) * self.part if self.saves else 0.0
        if self.offloads:
            host += (FP32 + MOMENTS + FP32) * self.part
            host += FP32 * self.part if self.stage == 3 else self.size * (self.part + 2 * self.of.largest)
            if self.stage < 3 and self.accumulates and not self.half:
                host += self.size * self.trainable
        if self.offloads_weights:
            host += (self.size * self.trainable + self.frozen) / self.workers
        return host


def sizes_on_disk(architecture: Architecture, recipe: Recipe) -> dict[str, int]:
    """Bytes of a checkpoint (trained weights in fp32 and both moments) and of the exported model, adapters alone under LoRA."""
    exported = architecture.trainable if recipe.model.lora is not None else architecture.parameters
    return {
        "checkpoint": (FP32 + MOMENTS) * architecture.trainable,
        "model": WEIGHT_BYTES[recipe.engine.precision] * exported,
    }
