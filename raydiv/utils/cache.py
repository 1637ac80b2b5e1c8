"""Where things that can be made again are kept: converted models, prepared tokens, reference log-probs, file digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from raydiv.utils.errors import UserError
from raydiv.utils.secrets import has_password
from raydiv.utils.storage import Folder, atomic, sha256_of


def cache_dir(*parts: str) -> Path:
    """A local folder of the cache, made if missing. The root is RAYDIV_CACHE, else raydiv in the user's cache folder.

    Where RAYDIV_CACHE is a URI, what must be local files (converted models, digests) goes to the user's cache folder.
    """
    chosen = os.environ.get("RAYDIV_CACHE", "")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydiv"
    folder = Path(default if not chosen or "://" in chosen else chosen).expanduser().resolve().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shared_dir(*parts: str) -> Folder:
    """A folder of the cache that workers on any node read: under RAYDIV_CACHE, which may be s3:// or gs://.

    Raises UserError for an address with a password in it.
    """
    chosen = os.environ.get("RAYDIV_CACHE", "")
    if has_password(chosen):  # Ray jobs are handed it, and whoever sees the cluster's jobs sees it
        raise UserError(
            "RAYDIV_CACHE: has a password in its address; the store's own variables (AWS_...) are its place"
        )
    root = chosen.rstrip("/") if "://" in chosen else str(cache_dir())
    return Folder("/".join((root, *parts)))


def digest(*parts: object) -> str:
    """128-bit hexadecimal digest of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def code_digest(*rooms: str) -> list[str]:
    """What running a model gives depends on this beside the model: libraries, and the source of raydiv's ``rooms``."""
    package = Path(__file__).parents[1]
    own = [file_digest(path) for room in rooms for path in sorted((package / room).glob("*.py"))]
    return [metadata.version(name) for name in ("torch", "transformers", "peft")] + own


def cached_text(note: Path, make: Callable[[], str]) -> str:
    """The text of ``note``, which is made where it is missing."""
    if not note.exists():
        text = make()
        with atomic(note) as temporary:
            temporary.write_text(text)
    return note.read_text()


def file_digest(path: Path) -> str:
    """SHA-256 of a file: a hub blob's own name, else computed once per (path, size, modification time)."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    status = real.stat()
    note = cache_dir("digests") / digest(str(real), status.st_size, status.st_mtime_ns)
    return cached_text(note, lambda: sha256_of(real))
