"""Writing a rank's share of a checkpoint while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from raydiv.training.checkpoint.shards import CheckpointShard, write_shard
from raydiv.training.zero_state import Snapshot
from raydiv.utils.storage import Folder


class AsyncWriter:
    """A thread that writes one rank's file at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[CheckpointShard] | None = None

    def start(self, folder: Folder, state: Snapshot) -> None:
        """Begin to write ``state``, which nobody changes any more."""
        assert self._writing is None, "the one before is to be taken first"
        self._writing = self._thread.submit(write_shard, folder, self._rank, state)

    @property
    def busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def take(self) -> CheckpointShard | str:
        """What was written, or why it could not be; waits for it."""
        assert self._writing is not None
        writing, self._writing = self._writing, None
        try:
            return writing.result()
        except OSError as error:
            return error.strerror or str(error)
