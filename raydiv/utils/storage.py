"""Folders that all nodes of a cluster can reach, through pyarrow's file systems: a shared path, s3:// or gs://."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from raydiv.utils.errors import UserError, one_line


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, moved to ``path`` after the block, or removed if it raises."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise
    try:
        temporary.replace(path)
    except OSError:  # another process wrote the same folder first, with the same content
        if not path.is_dir():
            raise


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError where it is missing or damaged."""
    with intact(path):
        return json.loads(path.read_text())


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Around what reads a file of raydiv's own: raises UserError where it is missing, or holds something else."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {one_line(error, 100)}"
        raise UserError(f"{path}: damaged or missing, as in a partial copy ({reason})") from None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a local file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def require_empty(folder: Path) -> None:
    """Raise UserError unless a local folder is missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name another one")


def require_inside(name: str) -> str:
    """Return a name that another file gives, such as a manifest. Raises UserError where it leads out of its folder."""
    if not name or name.startswith(("/", "~")) or "\\" in name or "://" in name or ".." in name.split("/"):
        raise UserError(f"{name!r}: leads out of its folder; do not trust the file that names it")
    return name


OBJECT_STORES = ("s3", "gs", "gcs")


def file_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI or local path, and the path in it.

    Raises UserError for an unknown scheme and for a file system that cannot be reached.
    """
    scheme, remote, rest = uri.partition("://")
    bucket, _, inside = rest.partition("/")
    if not remote or scheme not in OBJECT_STORES:
        return _connect(uri)
    system, path = _connect(f"{scheme}://{bucket}")  # one client for a bucket
    return system, f"{path}/{unquote(inside)}".rstrip("/")


@lru_cache(maxsize=64)
def _connect(uri: str) -> tuple[Any, str]:
    try:
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri}: cannot be reached: {one_line(error, 200)}") from None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, by absolute path or URI. It pickles small, so workers get it as an argument.

    A file name that leads out of the folder raises UserError in all methods.
    """

    uri: str

    def uri_of(self, name: str) -> str:
        """Path or URI of a file of the folder."""
        require_inside(name)
        return f"{self.uri}/{quote(name) if '://' in self.uri else name}"

    def file_names(self, suffix: str) -> list[str]:
        """Sorted names of the files that end in ``suffix``; none where the folder is missing."""
        return [info.base_name for info in self._entries() if info.is_file and info.base_name.endswith(suffix)]

    def folder_names(self) -> list[str]:
        """Sorted names of the folders in it; none where the folder is missing."""
        return [info.base_name for info in self._entries() if info.type == fs.FileType.Directory]

    def _entries(self) -> list[Any]:
        system, path = file_system(self.uri)
        entries = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(entries, key=lambda info: str(info.base_name))

    def has(self, name: str) -> bool:
        system, path = self._of(name)
        return bool(system.get_file_info(path).is_file)

    def subfolder(self, name: str) -> Folder:
        return Folder(self.uri_of(name))

    def remove(self) -> None:
        """Remove the folder with its content, if it exists."""
        system, path = file_system(self.uri)
        if system.get_file_info(path).type == fs.FileType.Directory:
            system.delete_dir(path)

    def remove_file(self, name: str) -> None:
        if self.has(name):
            system, path = self._of(name)
            system.delete_file(path)

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Yields a local path to write, which becomes ``name`` of this folder after the block, unless it raises."""
        system, path = self._of(name)
        if isinstance(system, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic(Path(path)) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory() as staging:
            local = Path(staging) / "file"
            yield local
            fs.copy_files(str(local), path, fs.LocalFileSystem(), system)

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """Yields a local path of the file, or of a copy, while the block runs. Raises OSError if it is missing."""
        system, path = self._of(name)
        if isinstance(system, fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as staging:
            fs.copy_files(path, str(Path(staging) / "file"), system, fs.LocalFileSystem())
            yield Path(staging) / "file"

    def read(self, name: str) -> bytes:
        """The content of a file. Raises OSError where it is missing."""
        system, path = self._of(name)
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: Any) -> None:
        """Write a file atomically: object stores do so by themselves; a local file is moved into place."""
        system, target = self._of(name)
        buffer = pa.py_buffer(content)
        if not isinstance(system, fs.LocalFileSystem):
            try:
                with system.open_output_stream(target) as stream:
                    stream.write(buffer)
            except OSError:  # closing the stream may leave a partial object
                with suppress(OSError):
                    system.delete_file(target)
                raise
            return
        system.create_dir(str(Path(target).parent), recursive=True)
        with atomic(Path(target)) as temporary, temporary.open("wb") as file:
            file.write(buffer)

    def _of(self, name: str) -> tuple[Any, str]:
        """The file system, and in it the path of a file of the folder."""
        system, path = file_system(self.uri)
        return system, f"{path}/{require_inside(name)}"


def open_input(uri: str, *, mapped: bool = True) -> Any:
    """A file opened for random access. A local file is memory-mapped if ``mapped``.

    A user's own files are not: if one is truncated meanwhile, access to a missing page would kill the process.
    """
    system, path = file_system(uri)
    return pa.memory_map(path) if mapped and isinstance(system, fs.LocalFileSystem) else system.open_input_file(path)
