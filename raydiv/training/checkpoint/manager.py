"""Checkpoints of a training loop: when one is due, how the ranks agree that it is whole, and how a loop goes on from one.

The loop itself waits only for a copy of the state in memory: each rank writes its own while the next steps are computed.
Nothing of a random generator is kept: a micro-batch's is seeded by the step and its examples, and the order of the data is a
function of the step alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.training.checkpoint.async_writer import AsyncWriter
from raydiv.training.checkpoint.manifest import CheckpointStore, Manifest, assigned
from raydiv.training.checkpoint.shards import CheckpointShard, ShardReader, fault
from raydiv.utils import distributed as dist
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class _PendingCheckpoint:
    """A checkpoint that ranks still write."""

    step: int
    updates: int
    loop: dict[str, Any]
    measured: float | None


class CheckpointManager:
    """Writes the checkpoints of a run, and finds the one to go on from. Every method is called by all ranks together.

    ``engine`` has ``updates``, ``snapshot`` and ``restore`` (see raydiv.training.engine.DeepSpeedEngine).
    """

    def __init__(self, run: RunDirectory, recipe: Recipe, engine: Any) -> None:
        self._run, self._section, self._engine = run, recipe.checkpoint, engine
        self._checkpoints = CheckpointStore(run.checkpoints(recipe))
        self._possible = recipe.engine.nvme_path is None
        self._writer = AsyncWriter(dist.rank())
        self._begun: _PendingCheckpoint | None = None
        self._due, self._last = False, time.monotonic()
        self._id = dist.broadcast_object(run.stage.read().id if dist.rank() == 0 else "")

    def find(self) -> Manifest | None:
        """The newest checkpoint all of whose files are as they were written; None without any.

        What is damaged is said, and the one before it taken.
        """
        for step in dist.broadcast_object(self._checkpoints.steps() if dist.rank() == 0 else []):
            found, wrong = self._checked(step)
            if not wrong:
                return found
            if dist.rank() == 0:
                self._run.events.log(f"the checkpoint after step {step} is damaged and not used: {wrong}")
        return None

    def best(self) -> Manifest | None:
        """The checkpoint with the best of what ``checkpoint.best_metric`` measured; None where none was measured.

        Raises RuntimeError where it is damaged.
        """
        step = dist.broadcast_object(self._checkpoints.best(self._section.mode) if dist.rank() == 0 else None)
        if step is None:
            return None
        found, wrong = self._checked(step)
        if wrong:
            raise RuntimeError(f"the best checkpoint, after step {step}, is damaged: {wrong}")
        return found

    def restore(self, manifest: Manifest) -> None:
        """Put the engine where it was."""
        with ShardReader(self._checkpoints.at(manifest.step), manifest.shards) as shards:
            self._engine.restore(shards.read, manifest.updates)

    def _checked(self, step: int) -> tuple[Manifest | None, str]:
        """A checkpoint's manifest and, where it is damaged, how. The ranks share the reading."""
        found, wrong = None, None
        try:
            found = self._checkpoints.manifest(step)
            mine = assigned(found.shards, dist.rank(), dist.world_size())
            wrong = next(filter(None, (fault(self._checkpoints.at(step), shard) for shard in mine)), None)
        except (OSError, ValueError) as error:
            wrong = str(error)
        if found is not None and found.of.get("run") != self._id:
            raise UserError(
                f"checkpoint: {self._checkpoints.at(step).uri} is of another run; give this one another name=... or "
                "another checkpoint.storage=..."
            )
        return found, next(filter(None, dist.all_gather_object(wrong)), "")

    def after_step(
        self, step: int, loop: Callable[[], dict[str, Any]], metrics: Mapping[str, float], last: bool
    ) -> bool:
        """Begin a checkpoint if one is due after ``step`` steps; returns whether the run was asked to stop, and did.

        ``loop``: what the loop carries on; ``metrics``: what was measured after this step. A checkpoint waits for a step at
        which ``checkpoint.best_metric`` is measured; after the ``last`` step everything is written before this returns.
        """
        metric = self._section.best_metric
        measured = None if metric is None else metrics.get(metric)
        busy, due, stop = self._agreed(step, ready=metric is None or measured is not None)
        stop = stop and not last
        if self._begun is not None and not busy:
            self._settle()
        if (due or stop) and self._possible:
            self._settle()
            self._begin(step, loop, measured)
        if stop or last:
            self._settle()
        return stop

    def _agreed(self, step: int, ready: bool) -> tuple[bool, bool, bool]:
        """Whether any rank still writes, a checkpoint is to be begun, and the run is to stop: the same on every rank."""
        seconds, every = self._section.seconds, self._section.every
        if isinstance(every, int):
            self._due |= step % every == 0
        elif seconds is not None:
            self._due |= time.monotonic() - self._last >= seconds
        first = dist.rank() == 0
        said = dist.all_gather_object(
            (self._writer.busy, first and self._due and ready, first and self._run.stop_requested)
        )
        busy, due, stop = (any(flags) for flags in zip(*said, strict=True))
        return busy, due, stop

    def _begin(self, step: int, loop: Callable[[], dict[str, Any]], measured: float | None) -> None:
        if dist.rank() == 0:
            with suppress(OSError):  # then the files cannot be written neither, which is said
                self._checkpoints.begin(step)
        self._begun = _PendingCheckpoint(step, self._engine.updates, loop(), measured)
        self._due, self._last = False, time.monotonic()
        self._writer.start(self._checkpoints.at(step), self._engine.snapshot())

    def _settle(self) -> None:
        """Wait until every rank has written, and call the checkpoint whole if all could."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        written = dist.all_gather_object(self._writer.take())
        if dist.rank() == 0:
            self._commit(begun, written)

    def _commit(self, begun: _PendingCheckpoint, written: Sequence[CheckpointShard | str]) -> None:
        """Call a checkpoint whole, and let go of old ones; where a rank could not write its share, say so instead."""
        folder = self._checkpoints.folder.uri
        try:
            for rank, shard in enumerate(written):
                if isinstance(shard, str):
                    raise OSError(f"worker {rank}: {shard}")
            shards = [shard for shard in written if isinstance(shard, CheckpointShard)]
            of = {"run": self._id, **self._run.stage.read().of}
            self._checkpoints.commit(
                Manifest(begun.step, begun.updates, dist.world_size(), begun.loop, of, begun.measured, shards)
            )
        except OSError as error:
            self._run.events.log(
                f"the checkpoint after step {begun.step} could not be written to {folder}: {error}; training goes on, and "
                "the one before it is kept"
            )
            with suppress(OSError):
                self._checkpoints.at(begun.step).remove()
            return
        try:
            self._checkpoints.prune(self._section.keep, self._section.mode if self._section.best_metric else None)
        except OSError as error:
            self._run.events.log(f"old checkpoints in {folder} could not be removed: {error}")
