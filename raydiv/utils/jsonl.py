"""Files of JSON objects, a line each, that one process appends to and others follow."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POLLED = 0.3
"""Seconds between looks."""


class JsonlTail:
    """The lines of a file of JSON objects that others append to, each given once; the first ``skip`` are not."""

    def __init__(self, path: Path, skip: int = 0) -> None:
        self._path, self._given = path, skip
        self._file: int | None = None
        self._offset = self._number = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines since the last call. A file that was put in the other's place is read from its start."""
        if not self._path.exists():
            return
        with self._path.open("rb") as content:
            file = os.fstat(content.fileno()).st_ino
            if file != self._file:
                self._file, self._offset, self._number = file, 0, 0
            content.seek(self._offset)
            for line in content:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._number += 1
                if self._number > self._given:
                    self._given = self._number
                    yield json.loads(line)


@contextmanager
def follow(lines: JsonlTail, handle: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call ``handle`` with each new line while the block runs, and with the last ones after it."""
    stop = threading.Event()

    def follow() -> None:
        while True:
            last = stop.is_set()
            for record in lines.new():
                handle(record)
            if last:
                return
            time.sleep(POLLED)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
