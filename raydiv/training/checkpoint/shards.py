"""A checkpoint's files: safetensors, one a rank, in which every piece of the training state stands once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raydiv.training.zero_state import Fragment, Snapshot
from raydiv.utils.storage import Folder, sha256_of


@dataclass(frozen=True, slots=True)
class CheckpointShard:
    """A rank's file: its size in bytes, its digest, and the (first, last + 1) elements of each parameter in it."""

    file: str
    size: int
    sha256: str
    pieces: dict[str, tuple[int, int]]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CheckpointShard:
        pieces = {name: (int(start), int(stop)) for name, (start, stop) in found["pieces"].items()}
        return cls(str(found["file"]), int(found["size"]), str(found["sha256"]), pieces)


def write_shard(folder: Folder, rank: int, state: Snapshot) -> CheckpointShard:
    """Write a rank's share of the state. Raises OSError where that fails, and leaves no file then."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = f"rank-{rank:05d}.safetensors"
    with folder.filled(file) as path:
        try:
            save_file({_key(piece.name, kind): values for (piece, kind), values in state.items()}, path)
        except SafetensorError as error:  # a disk that is full, say
            raise OSError(f"{file}: {error}") from None
        size, sha256 = path.stat().st_size, sha256_of(path)
    return CheckpointShard(file, size, sha256, {piece.name: (piece.start, piece.stop) for piece, _ in state})


def fault(folder: Folder, shard: CheckpointShard) -> str | None:
    """What is wrong with a file; None when it is as it was written."""
    try:
        with folder.local(shard.file) as path:
            if path.stat().st_size != shard.size:
                return f"{shard.file} has {path.stat().st_size} bytes of {shard.size}"
            if sha256_of(path) != shard.sha256:
                return f"{shard.file} is not what was written (its SHA-256 differs)"
    except OSError as error:
        return f"{shard.file} cannot be read: {error.strerror or error}"
    return None


class ShardReader:
    """The state in a checkpoint's files, by pieces of any layout. A context: files are opened when they are first needed."""

    def __init__(self, folder: Folder, shards: Sequence[CheckpointShard]) -> None:
        self._folder, self._shards = folder, shards
        self._opened: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def read(self, piece: Fragment, kind: str) -> Tensor:
        """The elements [length] of a piece. Raises ValueError where the checkpoint does not have all of them."""
        values = torch.empty(piece.length)
        there = 0
        for shard in self._shards:
            start, stop = shard.pieces.get(piece.name, (0, 0))
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = self._file(shard.file).get_slice(_key(piece.name, kind))[first - start : last - start]
                values[first - piece.start : last - piece.start] = part
                there += last - first
        if there != piece.length:
            raise ValueError(
                f"{self._folder.uri}: has {there} of the {piece.length} elements of {piece.name} that are needed"
            )
        return values

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._opened:
            path = self._open.enter_context(self._folder.local(name))
            self._opened[name] = self._open.enter_context(safe_open(path, framework="pt"))
        return self._opened[name]


def _key(name: str, kind: str) -> str:
    return f"{kind}/{name}"
