"""JSONL files: append to them, read them, and follow those that other processes append to."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydiv.utils.errors import UserError, one_line
from raydiv.utils.storage import intact

POLL_SECONDS = 0.3


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line with a JSON object."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, without a last line that is not complete yet.

    Raises UserError where the file is missing, and for a line that is damaged.
    """
    records: list[dict[str, Any]] = []
    with intact(path):
        lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if line.endswith(b"\n"):
                records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: damaged, not a JSON object: {one_line(error, 100)}") from None
    return records


class JsonlTail:
    """Reads each line of a growing JSONL file once, except the first ``skip`` lines."""

    def __init__(self, path: Path, skip: int = 0) -> None:
        self._path, self._lines_read = path, skip
        self._inode: int | None = None
        self._offset = self._line = 0

    def read_new(self) -> Iterator[dict[str, Any]]:
        """Complete lines since the last call. A replaced file is read from its start, without known lines."""
        if not self._path.exists():
            return
        with self._path.open("rb") as content:
            inode = os.fstat(content.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset, self._line = inode, 0, 0
            content.seek(self._offset)
            for line in content:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._line += 1
                if self._line > self._lines_read:
                    self._lines_read = self._line
                    yield json.loads(line)


@contextmanager
def follow(tail: JsonlTail, handle: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call ``handle`` with each new line while the block runs, and with the last ones at its end."""
    stop = threading.Event()

    def poll() -> None:
        while True:
            is_last = stop.is_set()
            for record in tail.read_new():
                handle(record)
            if is_last:
                return
            time.sleep(POLL_SECONDS)

    follower = threading.Thread(target=poll, daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
