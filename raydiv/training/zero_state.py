"""The training state as a rank holds it: pieces of named parameters, from which any other layout can be put together.

Under every ZeRO stage a rank's share of a parameter is one run of its flattened elements. A checkpoint of such runs therefore
loads on any number of workers and under any stage. Beside each weight, in fp32, stand AdamW's two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What there is of every trained parameter."""


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


Read = Callable[[Fragment, str], Tensor]
"""The elements [length] of a piece, of one of the KINDS."""

Snapshot = dict[tuple[Fragment, str], Tensor]
"""The elements [length] by piece and kind."""


class Partitions(Protocol):
    """What a rank holds of the training state, and how it is reached."""

    def pieces(self) -> list[Fragment]:
        """All that this rank holds."""

    def own(self) -> list[Fragment]:
        """What of it this rank keeps: over all ranks each element once."""

    def get(self, piece: Fragment, kind: str) -> Tensor:
        """The elements [length] of a piece: a view where there is one."""

    def set(self, piece: Fragment, kind: str, values: Tensor) -> None:
        """Put ``values`` [length] there."""

    def flats(self) -> list[Tensor]:
        """The tensors that the optimizer updates; each has a state of its own."""

    def settle(self) -> None:
        """Make the weights that the model computes with those that have been set. All ranks must call it together."""


def partitions_of(engine: Any, stage: int) -> Partitions:
    """Of a DeepSpeed ``engine`` at a ZeRO stage."""
    named = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if stage == 0:
        return _Whole(engine, named)
    return _Partitioned(engine, named) if stage == 3 else _Fragments(engine, named)


def updates(engine: Any, held: Partitions) -> int:
    """Updates that the optimizer has made."""
    states = (engine.basic_optimizer.state.get(flat) for flat in held.flats())
    return max((int(state.get("step", 0)) for state in states if state), default=0)


def restore(engine: Any, held: Partitions, read: Read, made: int) -> None:
    """Take up the state that ``read`` gives, after ``made`` updates. All ranks must call it together."""
    _begin(engine, held)
    for flat in held.flats():
        engine.basic_optimizer.state[flat]["step"].fill_(made)
    for piece, kind in every(held.pieces()):
        held.set(piece, kind, read(piece, kind))
    held.settle()


def snapshot(engine: Any, held: Partitions) -> Snapshot:
    """A copy on the CPU of all that this rank keeps."""
    _begin(engine, held)
    return {(piece, kind): held.get(piece, kind).detach().to("cpu", copy=True) for piece, kind in every(held.own())}


def every(pieces: list[Fragment]) -> Iterator[tuple[Fragment, str]]:
    return ((piece, kind) for piece in pieces for kind in KINDS)


def _begin(engine: Any, held: Partitions) -> None:
    """Give the optimizer the state that torch's AdamW begins with at its first update, where it has none yet."""
    for flat in held.flats():
        if not engine.basic_optimizer.state.get(flat):
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            engine.basic_optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}


class _Whole:
    """Stage 0: every rank holds everything. Each keeps its share of the parameters."""

    def __init__(self, engine: Any, named: dict[str, Tensor]) -> None:
        self._engine, self._named = engine, named

    def pieces(self) -> list[Fragment]:
        return [Fragment(name, 0, parameter.numel(), parameter.numel()) for name, parameter in self._named.items()]

    def own(self) -> list[Fragment]:
        return self.pieces()[self._engine.global_rank :: self._engine.world_size]

    def get(self, piece: Fragment, kind: str) -> Tensor:
        return self._of(piece, kind).reshape(-1)

    def set(self, piece: Fragment, kind: str, values: Tensor) -> None:
        there = self._of(piece, kind)
        there.copy_(values.reshape(there.shape))

    def _of(self, piece: Fragment, kind: str) -> Tensor:
        parameter = self._named[piece.name]
        if kind == WEIGHT:
            return parameter.detach()
        return self._engine.basic_optimizer.state[parameter][kind]  # type: ignore[no-any-return]

    def flats(self) -> list[Tensor]:
        return list(self._named.values())

    def settle(self) -> None:
        """They are the same tensors."""


class _Fragments:
    """Stages 1 and 2: all parameters end to end in fp32, in equal parts, of which a rank has one."""

    def __init__(self, engine: Any, named: dict[str, Any]) -> None:
        self._engine, self._named = engine, named

    def pieces(self) -> list[Fragment]:
        return [
            Fragment(name, held.lp_fragment_address.start, held.lp_fragment_address.numel, parameter.numel())
            for name, parameter in self._named.items()
            if (held := parameter._hp_mapping) is not None
        ]

    own = pieces

    def get(self, piece: Fragment, kind: str) -> Tensor:
        # DeepSpeed links the moments to parameters only after a first update
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        fragment = self._named[piece.name]._hp_mapping
        return fragment.get_hp_fragment(None if kind == WEIGHT else kind)  # type: ignore[no-any-return]

    def set(self, piece: Fragment, kind: str, values: Tensor) -> None:
        self.get(piece, kind).data.copy_(values)

    def flats(self) -> list[Tensor]:
        return [flat for group in self._engine.basic_optimizer.param_groups for flat in group["params"]]

    def settle(self) -> None:
        self._engine.optimizer.update_lp_params()


class _Partitioned:
    """Stage 3: every parameter in equal parts, the last ones filled up with zeros, of which a rank has one."""

    def __init__(self, engine: Any, named: dict[str, Any]) -> None:
        self._optimizer, self._rank, self._named = engine.optimizer, engine.global_rank, named

    def pieces(self) -> list[Fragment]:
        found = []
        for name, parameter in self._named.items():
            part = parameter.ds_tensor.numel()
            length = max(0, min(part, parameter.ds_numel - self._rank * part))
            if length:
                found.append(Fragment(name, self._rank * part, length, parameter.ds_numel))
        return found

    own = pieces

    def get(self, piece: Fragment, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._named[piece.name]
        weight = kind == WEIGHT
        part = safe_get_local_fp32_param(parameter) if weight else safe_get_local_optimizer_state(parameter, kind)
        return part[: piece.length]  # type: ignore[no-any-return]

    def set(self, piece: Fragment, kind: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter = self._named[piece.name]
        filled = torch.zeros(parameter.ds_tensor.numel(), dtype=values.dtype)
        filled[: piece.length] = values
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, filled)
        else:
            safe_set_local_optimizer_state(parameter, filled, kind)

    def flats(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def settle(self) -> None:
        for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # small parameters are whole on every rank, and stay so
        small = self._optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)
