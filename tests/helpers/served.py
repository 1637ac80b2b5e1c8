"""A server with OpenAI's endpoints, whose replies a test sets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""From an endpoint and a request's body to a status and the content of the reply."""


@dataclass
class Served:
    """``requests`` are the endpoints and bodies so far, ``keys`` the keys that came with them."""

    url: str = ""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


@contextmanager
def served(handle: Handler, models: tuple[str, ...] = ("tiny",)) -> Iterator[Served]:
    """Serve on a free port of the loopback while the block runs."""
    record = Served()

    class Endpoints(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint = self.path.removeprefix("/v1/")
            record.keys.add(self.headers["Authorization"])
            record.requests.append((endpoint, body))
            self._send(*handle(endpoint, body))

        def _send(self, status: int, content: Any) -> None:
            written = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(written)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(written)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoints)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    record.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield record
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str, ids: list[int] | None = None, finish: str = "stop") -> tuple[int, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish, **({} if ids is None else {"token_ids": ids})}
    return 200, _reply("text_completion", choice)


def message(text: str | None, finish: str = "stop") -> tuple[int, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, _reply("chat.completion", choice)


def error(status: int, text: str = "no") -> tuple[int, Any]:
    return status, {"error": {"message": text}}


def _reply(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    return {"id": "1", "object": kind, "created": 0, "model": "tiny", "choices": [choice], "usage": usage}
