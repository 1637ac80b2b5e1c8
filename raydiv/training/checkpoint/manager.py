"""Checkpoints of a training loop: when one is due, how the ranks complete it, and how a run resumes from it.

The loop itself waits only for a copy of the state in memory: each rank writes its own while the next steps are
computed. No generator state is saved: that of a micro-batch is seeded by the step and its examples, and the order of
the data is a function of the step alone.
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
from raydiv.training.checkpoint.manifest import CheckpointStore, Manifest, assigned_shards
from raydiv.training.checkpoint.shards import CheckpointShard, ShardReader, find_damage
from raydiv.training.zero_state import Partitions
from raydiv.utils import distributed as dist
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class _PendingCheckpoint:
    """A checkpoint that ranks are still writing."""

    step: int
    updates: int
    loop: dict[str, Any]
    measured: float | None


class CheckpointManager:
    """Writes the checkpoints of a run, and finds the one to resume from. All ranks must call every method together."""

    def __init__(self, run: RunDirectory, recipe: Recipe, partitions: Partitions) -> None:
        self._run, self._section, self._partitions = run, recipe.checkpoint, partitions
        self._store = CheckpointStore(run.checkpoints(recipe))
        # what is offloaded to NVMe is not in a snapshot
        self._enabled = recipe.engine.nvme_path is None
        self._writer = AsyncWriter(dist.rank())
        self._pending: _PendingCheckpoint | None = None
        self._due, self._last = False, time.monotonic()
        self._run_id = dist.broadcast_object(run.stage.read().id if dist.rank() == 0 else "")

    def find(self) -> Manifest | None:
        """The newest checkpoint whose files are undamaged; None where there is none.

        Damaged ones are logged and skipped. Raises UserError where the newest belongs to another run.
        """
        if dist.rank() == 0 and (others := self._store.other_folders()):
            self._run.events.log(f"not checkpoints, and passed over: {', '.join(others)} in {self._store.folder.uri}")
        for step in dist.broadcast_object(self._store.steps() if dist.rank() == 0 else []):
            manifest, damage = self._verify(step)
            if not damage:
                return manifest
            if dist.rank() == 0:
                self._run.events.log(f"the checkpoint after step {step} is damaged and not used: {damage}")
        return None

    def best(self) -> Manifest | None:
        """The checkpoint with the best value of ``checkpoint.best_metric``; None where it was never measured.

        Raises RuntimeError where it is damaged.
        """
        step = dist.broadcast_object(self._store.best(self._section.mode) if dist.rank() == 0 else None)
        if step is None:
            return None
        manifest, damage = self._verify(step)
        if damage:
            raise RuntimeError(f"the best checkpoint, after step {step}, is damaged: {damage}")
        return manifest

    def restore(self, manifest: Manifest) -> None:
        """Set the training state to the checkpoint's."""
        with ShardReader(self._store.at(manifest.step), manifest.shards) as shards:
            self._partitions.restore(shards.read, manifest.updates)

    def _verify(self, step: int) -> tuple[Manifest | None, str]:
        """A checkpoint's manifest, and how it is damaged, else an empty text. The ranks share the reading."""
        manifest, damage = None, None
        try:
            manifest = self._store.manifest(step)
            shards = assigned_shards(manifest.shards, dist.rank(), dist.world_size())
            damage = next(filter(None, (find_damage(self._store.at(step), shard) for shard in shards)), None)
        except (OSError, ValueError) as error:
            damage = str(error)
        damages = dist.all_gather_object(damage)  # before any rank may raise, or the others would wait for it
        if manifest is not None and manifest.of.get("run") != self._run_id:
            raise UserError(
                f"checkpoint: {self._store.at(step).uri} is of another run; give this one another name=... or "
                "another checkpoint.storage=..."
            )
        return manifest, next(filter(None, damages), "")

    def after_step(
        self, step: int, loop: Callable[[], dict[str, Any]], metrics: Mapping[str, float], last: bool
    ) -> bool:
        """Start a checkpoint if one is due after ``step`` steps; returns whether the run stops here on request.

        ``loop`` returns the state of the loop; ``metrics`` are those measured after this step. A checkpoint that is due
        waits for a step at which ``checkpoint.best_metric`` is measured. After the ``last`` step this returns when all
        is written.
        """
        metric = self._section.best_metric
        measured = None if metric is None else metrics.get(metric)
        writing, due, stop = self._agree(step, ready=metric is None or measured is not None)
        stop = stop and not last
        if self._pending is not None and not writing:
            self._finish()
        if (due or stop) and self._enabled:
            self._finish()
            self._start(step, loop, measured)
        if stop or last:
            self._finish()
        return stop

    def _agree(self, step: int, ready: bool) -> tuple[bool, bool, bool]:
        """Whether any rank is still writing, a checkpoint is due, and the run is to stop: the same on every rank."""
        seconds, every = self._section.interval_seconds, self._section.every
        if isinstance(every, int):
            self._due |= step % every == 0
        elif seconds is not None:
            self._due |= time.monotonic() - self._last >= seconds
        first = dist.rank() == 0
        flags = (self._writer.busy, first and self._due and ready, first and self._run.stop_requested)
        writing, due, stop = (any(votes) for votes in zip(*dist.all_gather_object(flags), strict=True))
        return writing, due, stop

    def _start(self, step: int, loop: Callable[[], dict[str, Any]], measured: float | None) -> None:
        if dist.rank() == 0:
            with suppress(OSError):  # writing the files fails as well, and that is logged
                self._store.invalidate(step)
        self._pending = _PendingCheckpoint(step, self._partitions.updates, loop(), measured)
        self._due, self._last = False, time.monotonic()
        self._writer.start(self._store.at(step), self._partitions.snapshot())

    def _finish(self) -> None:
        """Wait until every rank has written the pending checkpoint, and commit it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        results = dist.all_gather_object(self._writer.result())
        if dist.rank() == 0:
            self._commit(pending, results)

    def _commit(self, pending: _PendingCheckpoint, results: Sequence[CheckpointShard | str]) -> None:
        """Write the manifest and remove old checkpoints; where a rank could not write its shard, log that instead."""
        folder = self._store.folder.uri
        try:
            for rank, result in enumerate(results):
                if isinstance(result, str):
                    raise OSError(f"worker {rank}: {result}")
            shards = [result for result in results if isinstance(result, CheckpointShard)]
            of = {"run": self._run_id, **self._run.stage.read().fingerprints}
            self._store.commit(
                Manifest(pending.step, pending.updates, dist.world_size(), pending.loop, of, pending.measured, shards)
            )
        except OSError as error:
            self._run.events.log(
                f"the checkpoint after step {pending.step} could not be written to {folder}: {error}; training goes "
                "on, and the one before it is kept"
            )
            with suppress(OSError):
                self._store.at(pending.step).remove()
            return
        try:
            self._store.prune(self._section.keep, self._section.mode if self._section.best_metric else None)
        except OSError as error:
            self._run.events.log(f"old checkpoints in {folder} could not be removed: {error}")
