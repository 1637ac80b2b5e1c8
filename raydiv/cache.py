"""Where things that can be made again are kept: converted models, prepared tokens, reference log-probs, file digests."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder of the cache, made if missing. The root is RAYDIV_CACHE, else raydiv in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydiv"
    folder = Path(os.environ.get("RAYDIV_CACHE") or default).expanduser().resolve().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts: object) -> str:
    """128-bit hexadecimal digest of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` (file or folder) that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    yield temporary
    try:
        temporary.replace(path)
    except OSError:  # another process finished the same folder first; its content is the same
        if not path.is_dir():
            raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file: a hub blob's own name, else computed once per (path, size, modification time)."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    status = real.stat()
    note = cache_dir("digests") / digest(str(real), status.st_size, status.st_mtime_ns)
    if not note.exists():
        with real.open("rb") as content, atomic(note) as temporary:
            temporary.write_text(hashlib.file_digest(content, "sha256").hexdigest())
    return note.read_text()
