"""events.jsonl: messages of workers to whoever follows the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from raydiv.utils.jsonl import JsonlTail, append_record, follow

ExamplePlace = tuple[int, int, int]
"""The place of an example: the indices of its source in data.train and of its file, and its position in the file."""


class EventLog:
    """The events of a run. Any worker logs; the driver follows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, message: str, examples: Sequence[ExamplePlace] = ()) -> None:
        """Append an event, with the places of the ``examples`` that it concerns."""
        append_record(self.path, {"time": round(time.time(), 3), "message": message, "examples": list(examples)})

    def follow(
        self, show: Callable[[str], None], locate: Callable[[ExamplePlace], str]
    ) -> AbstractContextManager[None]:
        """Call ``show`` with each event logged while the block runs. ``locate`` returns an example's file and line."""
        earlier = self.path.read_bytes().count(b"\n") if self.path.exists() else 0

        def handle(event: Mapping[str, Any]) -> None:
            places = ", ".join(locate(tuple(place)) for place in event["examples"])
            show(f"{event['message']}{f' ({places})' if places else ''}")

        return follow(JsonlTail(self.path, earlier), handle)
