"""The checkpoints of a run: which exist, which are complete, and which are removed.

A checkpoint is a folder of one file a rank, and a manifest that is written last: a folder without it is no checkpoint.
The manifest holds the digest of every file, and its own. Nothing in it is code: JSON and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raydiv.training.checkpoint.shards import CheckpointShard
from raydiv.utils.storage import Folder, require_inside

MANIFEST = "manifest.json"
PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}([0-9]{{8,}})")
"""The name of a checkpoint's folder, with its step."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a checkpoint.

    ``step`` counts training steps, ``updates`` those of the optimizer, without refused ones. ``loop`` is the state of
    the loop besides weights and moments. ``of`` identifies the run. ``measured``: the value of
    ``checkpoint.best_metric``.
    """

    step: int
    updates: int
    world_size: int
    loop: dict[str, Any]
    of: dict[str, str]
    measured: float | None
    shards: list[CheckpointShard]

    def as_bytes(self) -> bytes:
        content = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"sha256": _sha256(content), "content": content}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError where the bytes are damaged."""
        try:
            signed = json.loads(data)
            content = signed["content"]
            if _sha256(content) != signed["sha256"]:
                raise ValueError("its SHA-256 differs")
            fields = json.loads(content)
            shards = [CheckpointShard.from_json(shard) for shard in fields.pop("shards")]
            for shard in shards:
                require_inside(shard.file)
            return cls(**fields, shards=shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST} is damaged: {error}") from None


class CheckpointStore:
    """The checkpoints in a folder, which may be in an object store."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def at(self, step: int) -> Folder:
        """The folder of the checkpoint after ``step`` steps."""
        return self.folder.subfolder(f"{PREFIX}{step:08d}")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, the newest first."""
        return [step for step in sorted(self._all_steps(), reverse=True) if self.at(step).has(MANIFEST)]

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint. Raises ValueError where it is damaged, OSError where it cannot be read."""
        manifest = Manifest.from_bytes(self.at(step).read(MANIFEST))
        if manifest.step != step:
            raise ValueError(f"{MANIFEST} is that of step {manifest.step}")
        return manifest

    def invalidate(self, step: int) -> None:
        """Remove the manifest of the checkpoint at ``step``, if there is one, before its files are overwritten."""
        self.at(step).remove_file(MANIFEST)

    def commit(self, manifest: Manifest) -> None:
        """Complete a checkpoint whose files are all written."""
        self.at(manifest.step).write(MANIFEST, manifest.as_bytes())

    def prune(self, newest: int, best: str | None) -> None:
        """Remove all but the ``newest`` ones, and the best by direction ``best`` (``min``, ``max`` or None).

        Incomplete ones are removed as well.
        """
        keep = set(self.steps()[:newest])
        if best is not None and (step := self.best(best)) is not None:
            keep.add(step)
        for step in self._all_steps() - keep:
            # the manifest first, so that a half-removed checkpoint is none
            self.at(step).remove_file(MANIFEST)
            self.at(step).remove()

    def best(self, direction: str) -> int | None:
        """The step of the best checkpoint, the earliest of equal ones; None where none has a measured value."""
        sign = 1 if direction == "min" else -1
        measured = [(sign * value, step) for step in self.steps() if (value := self._measured(step)) is not None]
        return min(measured)[1] if measured else None

    def _measured(self, step: int) -> float | None:
        try:
            return self.manifest(step).measured
        except (OSError, ValueError):
            return None

    def _all_steps(self) -> set[int]:
        """Steps of all checkpoints, complete or not."""
        matches = map(NAME.fullmatch, self.folder.folder_names())
        return {int(match[1]) for match in matches if match}

    def other_folders(self) -> list[str]:
        """Names of folders beside the checkpoints that are none of them, such as a copy of one."""
        return [name for name in self.folder.folder_names() if not NAME.fullmatch(name)]


def assigned_shards(shards: Sequence[CheckpointShard], rank: int, world_size: int) -> Sequence[CheckpointShard]:
    """The files that a rank verifies: over all ranks each one once."""
    return shards[rank::world_size]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
