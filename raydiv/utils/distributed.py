"""Collectives. Without a process group each is the identity.

DeepSpeed gathers and reduces inside ``raydiv.training.engine``; ``raydiv.training.zero_state`` gathers weights.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PROBE_BYTES, PROBES = 8 * 2**20, 3
"""Size and number of the all-reduces that ``bandwidth`` times."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over ranks, in place. Exact where every element is zero on all ranks but one."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: float) -> float:
    return max(all_gather_object(value))


def all_gather_object(value: T) -> list[T]:
    """The picklable values of all ranks, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def bandwidth(device: torch.device) -> float:
    """Bytes per second of an all-reduce over all ranks, the best of PROBES tries; 0 with one rank."""
    if world_size() == 1:
        return 0.0
    tensor, seconds = torch.ones(PROBE_BYTES // 4, device=device), []
    for _ in range(PROBES):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    return PROBE_BYTES / min(seconds)


def barrier() -> None:
    if world_size() > 1:
        # without a device NCCL takes that of the rank's number, and makes a context on a GPU of another worker
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
