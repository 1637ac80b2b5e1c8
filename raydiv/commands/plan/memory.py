"""Bytes of one training worker as a function of the model's sizes and the layout: arithmetic only.

The terms follow the source of DeepSpeed 0.19 at each ZeRO stage and were compared with measurements
(tests/distributed/test_plan.py). Several moments of a step may be its peak; the breakdown is that of the largest one.
Let P be the trainable parameters and N the workers:

- weights: all of them below stage 3; at stage 3, 1/N and the gathered ones.
- optimizer: AdamW's two moments in fp32, and from stage 1 on an fp32 copy of the weights, in any precision: 12 P / N
  bytes.
- gradients: fp32; whole below stage 2, P / N from stage 2 on, and a flat copy for the update if they are not flat. At
  stage 1 in bf16, DeepSpeed keeps those of the last micro-batch in bf16 beside them, and sends a whole copy in bf16.
- buffers: the reduce bucket, the copy that is sent, and the prefetched weights; gloo makes one more copy.

These are allocated bytes. On a CPU the resident size is larger, since glibc keeps freed memory (bench/README.md).
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
"""Bytes of AdamW's two moments per parameter."""

NF4 = 0.5 + FP32 / 64
"""Bytes of a 4-bit weight: half a byte, and 1/64 of its block's fp32 scale (QLoRA, section 3)."""

RUNTIME = 600 * 2**20
"""Python and its libraries in a CPU worker after the first step of a tiny model (measured: 580-590 MiB). On a GPU, the
margin of raydiv.commands.plan.layout covers the CUDA context and NCCL's buffers."""

UNPARTITIONED_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at a time at stage 0, where gradients are not partitioned."""

ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
"""DeepSpeed's defaults in elements, for what neither raydiv nor the recipe sets."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one worker at its peak, which is the ``moment`` of the step.

    ``host`` is what offload and the copy for a checkpoint take of the node's memory; a CPU worker shares that memory.
    ``head`` includes the embedding, the final norm, and the tensors that the backward of a layer creates.
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
        """Bytes that the worker needs: of its GPU, or of its share of the machine."""
        worker = (
            self.weights + self.gradients + self.optimizer + self.activations + self.head + self.buffers + self.runtime
        )
        return round(worker + (self.host if self.on_cpu else 0))

    def rows(self) -> dict[str, int]:
        """The parts by name."""
        return {name: round(number) for name, number in asdict(self).items() if name not in ("moment", "on_cpu")}


def memory_of(
    architecture: Architecture, recipe: Recipe, workers: int, stage: Stage, tokens: int, accumulates: bool = True
) -> Memory:
    """Peak memory of one of ``workers`` with micro-batches of up to ``tokens``; ``accumulates``: a step has several of
    them.
    """
    return max(
        _Worker(architecture, recipe, workers, stage, tokens, accumulates).moments(), key=lambda memory: memory.total
    )


class _Worker:
    """One worker's sizes in bytes."""

    def __init__(
        self, architecture: Architecture, recipe: Recipe, workers: int, stage: Stage, tokens: int, accumulates: bool
    ) -> None:
        engine = recipe.engine
        zero: dict[str, Any] = ZERO_DEFAULTS | deepspeed_config(recipe)["zero_optimization"]
        self.architecture, self.stage, self.tokens, self.accumulates = architecture, stage, tokens, accumulates
        self.on_gpu, self.workers = recipe.cluster.use_gpu, workers
        self.offloads_optimizer, self.offloads_weights = (
            engine.offload_optimizer != "none",
            engine.offload_parameters != "none",
        )
        self.writes_checkpoints = recipe.checkpoint.every is not None
        self.nvme = "nvme" in (engine.offload_optimizer, engine.offload_parameters)
        self.weight_bytes = WEIGHT_BYTES[engine.precision]
        self.half = engine.precision == "bf16"
        # DeepSpeed's optimizer of bf16 under stage 1 sums the gradients of all weights on every worker
        self.sums_whole = self.half and stage == 1
        two_step_head = widest_scope(recipe.loss.terms) == "batch" and not accumulates and recipe.model.lora is None
        device = "cuda" if recipe.cluster.use_gpu else "cpu"
        self.logits = buffer_bytes(architecture.vocabulary, tokens, two_step_head, device)
        self.trainable, self.part = architecture.trainable, architecture.trainable / workers
        self.overlaps = bool(zero.get("overlap_comm", stage == 3))
        self.bucket_elements = int(zero["reduce_bucket_size"])
        self.prefetched = int(zero["stage3_prefetch_bucket_size"])
        self.live_parameters = int(zero["stage3_max_live_parameters"])
        self.sub_group = int(zero["sub_group_size"])
        self.persistent = int(zero["stage3_param_persistence_threshold"])
        quantized = architecture.linear if recipe.model.quantization else 0
        self.frozen = NF4 * quantized + self.weight_bytes * (architecture.frozen - quantized)

    def moments(self) -> list[Memory]:
        """The memory at each moment of a step that may be its peak."""
        resident = Memory(
            "",
            weights=self._weights(),
            optimizer=self._optimizer(),
            head=self.logits,
            runtime=0 if self.on_gpu else RUNTIME,
            host=self._host_memory(),
            on_cpu=not self.on_gpu,
        )
        computing = replace(resident, weights=resident.weights + self._gathered_weights())
        reduced = computing if self.accumulates else resident
        gradients = self._accumulated_gradients()
        candidates = [
            replace(
                computing,
                moment="backward",
                gradients=gradients,
                activations=self.architecture.activations.at(self.tokens),
                head=self.logits + self.architecture.beside.at(self.tokens),
                buffers=self._backward_buffers(),
            ),
            replace(
                reduced,
                moment="reduction",
                gradients=self._reduced_gradients(),
                buffers=self._reduce_bucket() + self._send_copies(),
            ),
            replace(resident, moment="update", gradients=self._flat_gradients(), buffers=self._persistent_bucket()),
            replace(
                computing,
                moment="gathering",
                gradients=gradients,
                buffers=self._persistent_bucket() + self._receive_copies(),
            ),
        ]
        if self.stage in (1, 2) and not self.on_gpu:
            building = self.weight_bytes * self.trainable
            candidates.append(replace(resident, moment="building", optimizer=FP32 * self.part, buffers=building))
        return candidates

    def _weights(self) -> float:
        """Weights between steps: at ZeRO-3 the worker's partition, and small parameters whole."""
        whole = self.weight_bytes * self.trainable + self.frozen
        if self.stage < 3:
            return whole
        part = 0 if self.offloads_weights else whole / self.workers
        return part + (self.weight_bytes * self.architecture.elements_up_to(self.persistent) if self.workers > 1 else 0)

    def _gathered_weights(self) -> float:
        """Weights that ZeRO-3 gathers during a forward or backward; a single worker has them already."""
        if self.stage < 3 or (self.workers == 1 and not self.offloads_weights):
            return 0
        live = min(self.architecture.parameters, self.live_parameters + max(self.architecture.tensors))
        return self.weight_bytes * max(0, live - self.architecture.elements_up_to(self.persistent))

    def _optimizer(self) -> float:
        if self.offloads_optimizer:
            return 0
        return MOMENTS * self.trainable if self.stage == 0 else (FP32 + MOMENTS) * self.part

    def _accumulated_gradients(self) -> float:
        """Gradients that are alive with a micro-batch's activations: the accumulated ones, and its own if reduced
        during backward.
        """
        if self.stage == 3:
            return 0 if self.offloads_optimizer else FP32 * self.part
        if self.sums_whole:
            return (FP32 + (self.weight_bytes if self.accumulates else 0)) * self.trainable
        before = FP32 * (self.part if self.stage == 2 else self.trainable) if self.accumulates else 0
        current = (
            FP32 * self.part
            if self.stage == 2 and not self._reduces_after_backward() and (before == 0 or not self.half)
            else 0
        )
        return before + current

    def _reduced_gradients(self) -> float:
        """Gradients after those of the last micro-batch are summed."""
        if self.stage == 3:
            return 0 if self.offloads_optimizer else FP32 * self.part
        if self.stage == 0:
            return FP32 * self.trainable
        if self.sums_whole:
            return (FP32 + self.weight_bytes) * self.trainable
        if self.stage == 1:
            return FP32 * (self.trainable + self.part)
        return FP32 * self.part * (2 if self.accumulates and not self.half else 1)

    def _flat_gradients(self) -> float:
        """Gradients in the optimizer's flat layout."""
        if self.stage == 0:
            return FP32 * self.trainable
        if self.sums_whole:
            return (FP32 + self.weight_bytes) * self.trainable
        if self.offloads_optimizer:
            return 0
        if self.stage == 3:
            return FP32 * (self.part + min(self.part, self.sub_group))
        return FP32 * self.part * (1 if self.half else 2)

    def _reduce_bucket(self) -> float:
        """The reduce bucket: a GPU allocates all of it, a CPU touches what is used."""
        if self.stage == 0 or self.sums_whole:
            return 0
        if self.stage == 1:
            return 0 if self.trainable <= self.bucket_elements else self.weight_bytes * self.bucket_elements
        if self.on_gpu:  # one fills while another is reduced
            return self.weight_bytes * self.bucket_elements * (2 if self.overlaps else 1)
        return self.weight_bytes * min(self.trainable, self.bucket_elements)

    def _persistent_bucket(self) -> float:
        """The reduce bucket, if it stays allocated between steps."""
        return self._reduce_bucket() if self.stage == 3 else 0

    def _backward_buffers(self) -> float:
        """Communication buffers that are alive with the activations.

        On a CPU, a bucket that holds all gradients fills while activations are freed.
        """
        regathers = self.stage == 3 and self.architecture.parameters > self.live_parameters
        bucket = (
            self._reduce_bucket() if self.on_gpu or not self._reduces_after_backward() else self._persistent_bucket()
        )
        return (
            bucket
            + (0 if self._reduces_after_backward() else self._send_copies())
            + (self._receive_copies() if regathers else 0)
        )

    def _reduces_after_backward(self) -> bool:
        """Whether gradients are reduced after the backward instead of during it."""
        return self.stage < 2 or self.trainable <= self.bucket_elements

    def _send_copies(self) -> float:
        """Copies of gradients that the reduction sends."""
        if self.workers == 1 and (self.stage == 0 or self.sums_whole):
            return 0
        if self.stage == 0:
            return FP32 * min(self.trainable, UNPARTITIONED_BUCKET)
        if self.sums_whole:
            return self.weight_bytes * self.trainable
        elements = max(min(self.trainable, self.bucket_elements), self.architecture.largest)
        widened = FP32 * min(self.architecture.largest, self.part) if self.half and self.stage == 2 else 0
        # gloo scatters a copy of its input
        return self.weight_bytes * elements * (2 if self.stage == 3 and not self.on_gpu else 1) + widened

    def _receive_copies(self) -> float:
        """Buffers for weights from other workers: prefetched layers, or the all-gather after an update."""
        if self.workers == 1 or self.stage == 0:
            return 0
        if self.stage == 3:
            return self.weight_bytes * min(self.architecture.parameters, self.prefetched)
        return 0 if self.on_gpu else self.weight_bytes * self.trainable

    def _host_memory(self) -> float:
        """Node memory of offload, and of the copy of the trained state that a checkpoint is written from."""
        host = (FP32 + MOMENTS) * self.part if self.writes_checkpoints else 0.0
        if self.offloads_optimizer:
            host += (FP32 + MOMENTS + FP32) * self.part
            host += (
                FP32 * self.part if self.stage == 3 else self.weight_bytes * (self.part + 2 * self.architecture.largest)
            )
            if self.stage < 3 and self.accumulates and not self.half:
                host += self.weight_bytes * self.trainable
        if self.offloads_weights:
            host += (self.weight_bytes * self.trainable + self.frozen) / self.workers
        return host


def sizes_on_disk(architecture: Architecture, recipe: Recipe) -> dict[str, int]:
    """Bytes of a checkpoint (trained weights in fp32 and both moments) and of the exported model, adapters alone under
    LoRA.
    """
    exported = architecture.trainable if recipe.model.lora is not None else architecture.parameters
    return {
        "checkpoint": (FP32 + MOMENTS) * architecture.trainable,
        "model": WEIGHT_BYTES[recipe.engine.precision] * exported,
    }
