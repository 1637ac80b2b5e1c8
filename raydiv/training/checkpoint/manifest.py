"""The checkpoints of a run: which there are, which is the newest that is whole, and which may go.

A checkpoint is a folder of one file a rank, and of a manifest that is written last: without it nobody takes the folder for
a checkpoint. The manifest has the digest of every file, and its own. Nothing in it is code: JSON and safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raydiv.training.checkpoint.shards import CheckpointShard
from raydiv.utils.storage import Folder, require_inside

MANIFEST = "manifest.json"
PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds.

    ``step``: training steps that it has behind it; ``updates`` the optimizer's, which a refused step does not add to.
    ``loop``: what the training loop carries from step to step beside weights and moments. ``of``: facts by which a run knows
    its own checkpoints. ``measured``: the value of ``checkpoint.best_metric`` then.
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
    def from_bytes(cls, written: bytes) -> Manifest:
        """Raises ValueError where the bytes are not what was written."""
        try:
            whole = json.loads(written)
            content = whole["content"]
            if _sha256(content) != whole["sha256"]:
                raise ValueError("its SHA-256 differs")
            found = json.loads(content)
            shards = [CheckpointShard.from_json(shard) for shard in found.pop("shards")]
            for shard in shards:
                require_inside(shard.file)
            return cls(**found, shards=shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST} is not what was written: {error}") from None


class CheckpointStore:
    """The checkpoints in a folder, which may be of an object store."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def at(self, step: int) -> Folder:
        """The folder of the checkpoint after ``step`` steps."""
        return self.folder.inside(f"{PREFIX}{step:08d}")

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, the newest first."""
        return [step for step in sorted(self._begun(), reverse=True) if self.at(step).has(MANIFEST)]

    def manifest(self, step: int) -> Manifest:
        """Raises ValueError where it is damaged, OSError where it cannot be read."""
        found = Manifest.from_bytes(self.at(step).read(MANIFEST))
        if found.step != step:
            raise ValueError(f"{MANIFEST} is that of step {found.step}")
        return found

    def begin(self, step: int) -> None:
        """Make way for a checkpoint: one of that step that is there already counts no more."""
        self.at(step).remove_file(MANIFEST)

    def commit(self, manifest: Manifest) -> None:
        """Call a checkpoint whole, all of whose files are written."""
        self.at(manifest.step).write(MANIFEST, manifest.as_bytes())

    def prune(self, newest: int, best: str | None) -> None:
        """Remove all but the ``newest`` ones, and the best one where there is a direction for it: ``min`` or ``max``.

        What was never finished goes as well.
        """
        kept = set(self.steps()[:newest])
        if best is not None and (step := self.best(best)) is not None:
            kept.add(step)
        for step in self._begun() - kept:
            # the manifest first: what is half removed is no checkpoint either
            self.at(step).remove_file(MANIFEST)
            self.at(step).remove()

    def best(self, direction: str) -> int | None:
        """The step of the best checkpoint by what was measured, the earliest of equal ones; None where nothing was."""
        sign = 1 if direction == "min" else -1
        measured = [(sign * value, step) for step in self.steps() if (value := self._measured(step)) is not None]
        return min(measured)[1] if measured else None

    def _measured(self, step: int) -> float | None:
        try:
            return self.manifest(step).measured
        except (OSError, ValueError):
            return None

    def _begun(self) -> set[int]:
        """Steps of all checkpoints, whole or not."""
        return {int(name.removeprefix(PREFIX)) for name in self.folder.folders() if name.startswith(PREFIX)}


def assigned(shards: Sequence[CheckpointShard], rank: int, world_size: int) -> Sequence[CheckpointShard]:
    """The files that a rank checks: over all ranks each one once."""
    return shards[rank::world_size]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
