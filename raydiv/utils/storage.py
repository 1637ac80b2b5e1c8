"""Folders that every node of a cluster reaches: a local or shared path, s3:// or gs://, through pyarrow's file systems."""

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

from raydiv.utils.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` (file or folder) that takes its place when the block ends well, and goes otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise
    try:
        temporary.replace(path)
    except OSError:  # another process finished the same folder first; its content is the same
        if not path.is_dir():
            raise


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a local file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def require_empty(folder: Path) -> None:
    """Raise UserError for a local folder that something is in already, or a file in its place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty directory")


def require_inside(name: str) -> str:
    """A name as a file of others says it, such as a manifest. Raises UserError where it leads out of its folder."""
    if not name or name.startswith(("/", "~")) or "\\" in name or "://" in name or ".." in name.split("/"):
        raise UserError(
            f"{name!r}: leads out of the folder that it is to be in; the file that names it is not to be trusted"
        )
    return name


OBJECT_STORES = ("s3", "gs", "gcs")


def file_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI or local path, and the path in it.

    Raises UserError where there is none for the URI's scheme, or it cannot be reached.
    """
    scheme, remote, rest = uri.partition("://")
    bucket, _, inside = rest.partition("/")
    if not remote or scheme not in OBJECT_STORES:
        return _connected(uri)
    system, path = _connected(f"{scheme}://{bucket}")  # one client for all of a bucket
    return system, f"{path}/{unquote(inside)}".rstrip("/")


@lru_cache(maxsize=64)
def _connected(uri: str) -> tuple[Any, str]:
    try:
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri}: cannot be reached: {' '.join(str(error).split())[:200]}") from None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder by its absolute path or URI; small enough to send to any worker."""

    uri: str

    def at(self, name: str) -> str:
        """Path or URI of a file of the folder. Raises UserError for a name that leads out of it, as all that takes one does."""
        require_inside(name)
        return f"{self.uri}/{quote(name) if '://' in self.uri else name}"

    def names(self, suffix: str) -> list[str]:
        """Sorted names of the files that end in ``suffix``; none when there is no such folder."""
        system, path = file_system(self.uri)
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.is_file and info.base_name.endswith(suffix))

    def has(self, name: str) -> bool:
        system, path = self._of(name)
        return bool(system.get_file_info(path).is_file)

    def inside(self, name: str) -> Folder:
        """A folder of this one."""
        return Folder(self.at(name))

    def folders(self) -> list[str]:
        """Sorted names of the folders in it; none when there is no such folder."""
        system, path = file_system(self.uri)
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def remove(self) -> None:
        """Remove the folder with all that is in it, if it is there."""
        system, path = file_system(self.uri)
        if system.get_file_info(path).type == fs.FileType.Directory:
            system.delete_dir(path)

    def remove_file(self, name: str) -> None:
        if self.has(name):
            system, path = self._of(name)
            system.delete_file(path)

    @contextmanager
    def filled(self, name: str) -> Iterator[Path]:
        """A local file to fill, which becomes ``name`` of this folder when the block ends well: whole or not at all."""
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
    def local(self, name: str) -> Iterator[Path]:
        """The file as a local one while the block runs. Raises OSError where there is none."""
        system, path = self._of(name)
        if isinstance(system, fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as staging:
            fs.copy_files(path, str(Path(staging) / "file"), system, fs.LocalFileSystem())
            yield Path(staging) / "file"

    def read(self, name: str) -> bytes:
        """Raises OSError where there is no such file."""
        system, path = self._of(name)
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: Any) -> None:
        """Write a file, whole or not at all: object stores do so by themselves, elsewhere it is moved into place."""
        system, target = self._of(name)
        whole = pa.py_buffer(content)
        if not isinstance(system, fs.LocalFileSystem):
            try:
                with system.open_output_stream(target) as stream:
                    stream.write(whole)
            except OSError:  # closing may have kept a part
                with suppress(OSError):
                    system.delete_file(target)
                raise
            return
        system.create_dir(str(Path(target).parent), recursive=True)
        with atomic(Path(target)) as temporary, temporary.open("wb") as file:
            file.write(whole)

    def _of(self, name: str) -> tuple[Any, str]:
        """The file system, and the path in it of a file of the folder."""
        system, path = file_system(self.uri)
        return system, f"{path}/{require_inside(name)}"


def open_input(uri: str, *, mapped: bool = True) -> Any:
    """A file opened for reading at random; a local one is memory-mapped, unless it is a user's (``mapped``): where such a file
    is cut short while it is read, reading a page that is gone would kill the process.
    """
    system, path = file_system(uri)
    return pa.memory_map(path) if mapped and isinstance(system, fs.LocalFileSystem) else system.open_input_file(path)
