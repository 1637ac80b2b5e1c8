"""Replies of servers, kept by content in the cache: a request that was answered is not asked again."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from raydiv.utils.cache import digest, shared_dir

PART_REPLIES = 64
"""New replies after which they are written."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``text`` and, where the server gives them, token ``ids``; ``finished``: it ends where the model ended it.

    ``error`` says why there is no text, and ``status`` is HTTP's, where there is one.
    """

    text: str = ""
    ids: list[int] | None = None
    finished: bool = False
    error: str | None = None
    status: int | None = None


class ReplyStore:
    """The replies of one server. Several processes may write: each adds files of its own."""

    def __init__(self, server: str) -> None:
        self._folder = shared_dir("replies", digest(server))
        self._new: dict[str, dict[str, Any]] = {}
        self._known: dict[str, dict[str, Any]] = {}
        for name in self._folder.file_names(".json"):
            self._known |= json.loads(self._folder.read(name))

    def get(self, request: dict[str, Any]) -> Reply | None:
        """The reply to a request with this content."""
        reply = self._known.get(digest(request))
        return None if reply is None else Reply(**reply)

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        self._new[digest(request)] = asdict(reply)
        if len(self._new) >= PART_REPLIES:
            self.save()

    def save(self) -> None:
        """Write the new replies."""
        if self._new:
            self._folder.write(f"{uuid.uuid4().hex}.json", json.dumps(self._new).encode())
            self._known |= self._new
            self._new = {}
