"""A checkpoint's files: safetensors, one a rank, which together hold every element of the training state once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raydiv.training.zero_state import Fragment, Snapshot
from raydiv.utils.storage import Folder, sha256_of

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the state's dtypes in the format of safetensors."""


@dataclass(frozen=True, slots=True)
class CheckpointShard:
    """A rank's file: its size in bytes, its digest, and the (first, last + 1) elements of each parameter in it."""

    file: str
    size: int
    sha256: str
    pieces: dict[str, tuple[int, int]]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> CheckpointShard:
        pieces = {name: (int(start), int(stop)) for name, (start, stop) in fields["pieces"].items()}
        return cls(str(fields["file"]), int(fields["size"]), str(fields["sha256"]), pieces)


def write_shard(folder: Folder, rank: int, state: Snapshot) -> CheckpointShard:
    """Write a rank's part of the state. Raises OSError where that fails, and then leaves no file."""
    file = f"rank-{rank:05d}.safetensors"
    with folder.new_file(file) as path:
        size, sha256 = _write_safetensors(
            path, {_key(fragment.name, kind): values for (fragment, kind), values in state.items()}
        )
    pieces = {fragment.name: (fragment.start, fragment.stop) for fragment, _ in state}
    return CheckpointShard(file, size, sha256, pieces)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write CPU tensors in the format of safetensors; the number of bytes, and their SHA-256.

    safetensors' own writer has no hook for a digest, and to read a file again takes as long as to write it.
    """
    header, size = {}, 0
    for name, tensor in tensors.items():
        offsets = [size, size := size + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors' bytes are aligned to 8
    values = (tensor.contiguous().view(torch.uint8).numpy().data for tensor in tensors.values())
    parts: Iterator[bytes | memoryview] = chain((len(encoded).to_bytes(8, "little"), encoded), values)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        return file.tell(), digest.hexdigest()


def find_damage(folder: Folder, shard: CheckpointShard) -> str | None:
    """How a file is damaged; None where it is not."""
    try:
        with folder.local_file(shard.file) as path:
            if path.stat().st_size != shard.size:
                return f"{shard.file} has {path.stat().st_size} bytes of {shard.size}"
            if sha256_of(path) != shard.sha256:
                return f"{shard.file} is damaged (its SHA-256 differs)"
    except OSError as error:
        return f"{shard.file} cannot be read: {error.strerror or error}"
    return None


class ShardReader:
    """Reads fragments of any layout from a checkpoint's files. A context: files are opened at their first use."""

    def __init__(self, folder: Folder, shards: Sequence[CheckpointShard]) -> None:
        self._folder, self._shards = folder, shards
        self._files: dict[str, Any] = {}
        self._contexts = ExitStack()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._contexts.close()

    def read(self, fragment: Fragment, kind: str) -> Tensor:
        """The elements [length] of a fragment. Raises ValueError where the checkpoint does not have all of them."""
        values = torch.empty(fragment.length)
        count = 0
        for shard in self._shards:
            start, stop = shard.pieces.get(fragment.name, (0, 0))
            first, last = max(start, fragment.start), min(stop, fragment.stop)
            if first < last:
                elements = self._file(shard.file).get_slice(_key(fragment.name, kind))[first - start : last - start]
                values[first - fragment.start : last - fragment.start] = elements
                count += last - first
        if count != fragment.length:
            raise ValueError(
                f"{self._folder.uri}: has {count} of the {fragment.length} elements of {fragment.name} that are needed"
            )
        return values

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._files:
            path = self._contexts.enter_context(self._folder.local_file(name))
            self._files[name] = self._contexts.enter_context(safe_open(path, framework="pt"))
        return self._files[name]


def _key(name: str, kind: str) -> str:
    return f"{kind}/{name}"
