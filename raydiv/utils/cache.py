"""The cache of what can be recomputed: converted models, prepared tokens, reference log-probs, file digests."""

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
    """A local folder of the cache, created if missing.

    The root is RAYDIV_CACHE, by default ``raydiv`` in the user's cache. Where RAYDIV_CACHE is a URI, the user's cache
    holds what must be local files: converted models and digests.
    """
    setting = os.environ.get("RAYDIV_CACHE", "")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydiv"
    root = Path(default if not setting or "://" in setting else setting).expanduser().resolve()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)  # a folder that is there keeps its mode
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shared_dir(*parts: str) -> Folder:
    """A folder of the cache that workers on all nodes read, under RAYDIV_CACHE, which may be s3:// or gs://.

    Raises UserError for an address with a password.
    """
    setting = os.environ.get("RAYDIV_CACHE", "")
    if has_password(setting):  # Ray jobs get this variable, and Ray's list of jobs shows it
        raise UserError("RAYDIV_CACHE: has a password in its address; set the store's own variables (AWS_...) instead")
    root = setting.rstrip("/") if "://" in setting else str(cache_dir())
    return Folder("/".join((root, *parts)))


def digest(*parts: object) -> str:
    """128-bit hexadecimal digest of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def code_digest(*packages: str) -> list[str]:
    """Versions of the libraries and digests of the source of raydiv's ``packages`` that a model's results depend on."""
    root = Path(__file__).parents[1]
    sources = [file_digest(path) for package in packages for path in sorted((root / package).glob("*.py"))]
    return [metadata.version(name) for name in ("torch", "transformers", "peft")] + sources


def cached_text(path: Path, make: Callable[[], str]) -> str:
    """The text of a file of the cache, written first where it is missing."""
    if not path.exists():
        text = make()
        with atomic(path) as temporary:
            temporary.write_text(text)
    return path.read_text()


def file_digest(path: Path) -> str:
    """SHA-256 of a file: a blob's name in the hub's cache, else computed once per (path, size, modification time)."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    status = real.stat()
    cached = cache_dir("digests") / digest(str(real), status.st_size, status.st_mtime_ns)
    return cached_text(cached, lambda: sha256_of(real))
