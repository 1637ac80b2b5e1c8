"""The training state as a rank holds it: fragments of named parameters, which fit together under any other layout.

Under every ZeRO stage a rank's share of a parameter is one run of its flattened elements. A checkpoint of such runs
therefore loads on any number of workers and under any stage. Each has its weights in fp32, and AdamW's two moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydiv.utils.compat import require_zero_state

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What a checkpoint holds of every trained parameter."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start`` to ``start + length`` of a trained parameter of ``size`` elements, flattened."""

    name: str
    start: int
    length: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.length


ReadFragment = Callable[[Fragment, str], Tensor]
"""Reads the elements [length] of a fragment, of one of the KINDS."""

Snapshot = dict[tuple[Fragment, str], Tensor]
"""The elements [length] by fragment and kind."""


class Partitions(ABC):
    """A rank's part of the training state of a DeepSpeed ``engine``, by trained parameters ``named``."""

    def __init__(self, engine: Any, named: dict[str, Any]) -> None:
        self._engine, self._named = engine, named
        self._pinned: Snapshot = {}

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made, without refused ones."""
        states = (self._engine.basic_optimizer.state.get(tensor) for tensor in self.optimizer_tensors())
        return max((int(state.get("step", 0)) for state in states if state), default=0)

    def snapshot(self) -> Snapshot:
        """A copy on the CPU of the fragments that this rank saves.

        What is on a GPU is copied into pinned memory, several times faster than into other memory, which the next
        snapshot overwrites.
        """
        self._create_optimizer_state()
        snapshot = {key: self._copy(key, self.get(*key).detach()) for key in _with_kinds(self.saved_fragments())}
        if self._pinned:
            torch.cuda.synchronize()
        return snapshot

    def _copy(self, key: tuple[Fragment, str], values: Tensor) -> Tensor:
        if not values.is_cuda:
            return values.clone()
        if key not in self._pinned:
            self._pinned[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return self._pinned[key].copy_(values, non_blocking=True)

    def restore(self, read: ReadFragment, updates: int) -> None:
        """Set the state to what ``read`` returns, after ``updates`` updates. All ranks must call it together."""
        self._create_optimizer_state()
        for tensor in self.optimizer_tensors():
            self._engine.basic_optimizer.state[tensor]["step"].fill_(updates)
        for fragment, kind in _with_kinds(self.fragments()):
            self.set(fragment, kind, read(fragment, kind))
        self.sync_model()

    def _create_optimizer_state(self) -> None:
        """Give the optimizer the state that torch's AdamW creates at its first update, where it has none yet."""
        for tensor in self.optimizer_tensors():
            if not self._engine.basic_optimizer.state.get(tensor):
                moments = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
                step = torch.zeros((), device=tensor.device)
                self._engine.basic_optimizer.state[tensor] = {"step": step, **moments}

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """All fragments that this rank holds."""

    def saved_fragments(self) -> list[Fragment]:
        """The fragments that this rank saves: over all ranks each element once."""
        return self.fragments()

    @abstractmethod
    def get(self, fragment: Fragment, kind: str) -> Tensor:
        """The elements [length] of a fragment, as a view where there is one."""

    @abstractmethod
    def set(self, fragment: Fragment, kind: str, values: Tensor) -> None:
        """Write the elements [length] of a fragment."""

    @abstractmethod
    def optimizer_tensors(self) -> list[Tensor]:
        """The tensors that the optimizer updates, each with a state of its own."""

    @abstractmethod
    def sync_model(self) -> None:
        """Copy the weights that were set to those that the model computes with. All ranks must call it together."""


def partitions_of(engine: Any, stage: int) -> Partitions:
    """The partitions of a DeepSpeed ``engine`` at a ZeRO stage.

    Raises RuntimeError where this DeepSpeed lacks a name that they use.
    """
    named = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    require_zero_state(engine, named.values(), stage)
    if stage == 0:
        return _Stage0(engine, named)
    return _Stage3(engine, named) if stage == 3 else _Stage12(engine, named)


def _with_kinds(fragments: list[Fragment]) -> Iterator[tuple[Fragment, str]]:
    return ((fragment, kind) for fragment in fragments for kind in KINDS)


class _Stage0(Partitions):
    """Every rank holds everything. Each saves its share of the parameters."""

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, parameter.numel(), parameter.numel()) for name, parameter in self._named.items()]

    def saved_fragments(self) -> list[Fragment]:
        return self.fragments()[self._engine.global_rank :: self._engine.world_size]

    def get(self, fragment: Fragment, kind: str) -> Tensor:
        return self._tensor(fragment, kind).reshape(-1)

    def set(self, fragment: Fragment, kind: str, values: Tensor) -> None:
        tensor = self._tensor(fragment, kind)
        tensor.copy_(values.reshape(tensor.shape))

    def _tensor(self, fragment: Fragment, kind: str) -> Tensor:
        parameter = self._named[fragment.name]
        if kind == WEIGHT:
            return parameter.detach()  # type: ignore[no-any-return]
        return self._engine.basic_optimizer.state[parameter][kind]  # type: ignore[no-any-return]

    def optimizer_tensors(self) -> list[Tensor]:
        return list(self._named.values())

    def sync_model(self) -> None:
        """Nothing to do: they are the same tensors."""


class _Stage12(Partitions):
    """All parameters end to end in fp32, cut into equal parts, one a rank."""

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel, parameter.numel())
            for name, parameter in self._named.items()
            if (mapping := parameter._hp_mapping) is not None
        ]

    def get(self, fragment: Fragment, kind: str) -> Tensor:
        # DeepSpeed links the moments to parameters only after a first update
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        mapping = self._named[fragment.name]._hp_mapping
        return mapping.get_hp_fragment(None if kind == WEIGHT else kind)  # type: ignore[no-any-return]

    def set(self, fragment: Fragment, kind: str, values: Tensor) -> None:
        self.get(fragment, kind).data.copy_(values)

    def optimizer_tensors(self) -> list[Tensor]:
        return [tensor for group in self._engine.basic_optimizer.param_groups for tensor in group["params"]]

    def sync_model(self) -> None:
        self._engine.optimizer.update_lp_params()


class _Stage3(Partitions):
    """Every parameter cut into equal parts, one a rank, the last ones padded with zeros."""

    def fragments(self) -> list[Fragment]:
        fragments = []
        rank = self._engine.global_rank
        for name, parameter in self._named.items():
            part = parameter.ds_tensor.numel()
            length = max(0, min(part, parameter.ds_numel - rank * part))
            if length:
                fragments.append(Fragment(name, rank * part, length, parameter.ds_numel))
        return fragments

    def get(self, fragment: Fragment, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._named[fragment.name]
        weight = kind == WEIGHT
        part = safe_get_local_fp32_param(parameter) if weight else safe_get_local_optimizer_state(parameter, kind)
        return part[: fragment.length]  # type: ignore[no-any-return]

    def set(self, fragment: Fragment, kind: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter = self._named[fragment.name]
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=values.dtype)
        padded[: fragment.length] = values
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    def optimizer_tensors(self) -> list[Tensor]:
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def sync_model(self) -> None:
        optimizer = self._engine.optimizer
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # small parameters are whole on every rank, and stay so
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
