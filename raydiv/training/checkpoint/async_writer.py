"""Writes a rank's shard of a checkpoint in a thread, while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from raydiv.training.checkpoint.shards import CheckpointShard, write_shard
from raydiv.training.zero_state import Snapshot
from raydiv.utils.storage import Folder


class AsyncWriter:
    """Writes one shard at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._shard: Future[CheckpointShard] | None = None

    def start(self, folder: Folder, state: Snapshot) -> None:
        """Start to write ``state``, which must not change any more."""
        assert self._shard is None, "the previous shard's result has not been taken"
        self._shard = self._thread.submit(write_shard, folder, self._rank, state)

    @property
    def busy(self) -> bool:
        return self._shard is not None and not self._shard.done()

    def result(self) -> CheckpointShard | str:
        """The shard, or why it could not be written; waits for it."""
        assert self._shard is not None
        shard, self._shard = self._shard, None
        try:
            return shard.result()
        except OSError as error:
            return error.strerror or str(error)
