"""The files of a source: a local or remote path, folder, pattern, saved data set, hub data set, or bundled data."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import fs

from raydiv.config.source import COMPRESSIONS, SUFFIXES, Source, file_kind
from raydiv.data.bundled import bundled_file
from raydiv.data.bundled.w1 import w1_pairs
from raydiv.model.w1 import W1
from raydiv.utils.cache import digest, file_digest, shared_dir
from raydiv.utils.compat import dataset_fingerprint, saved_data_files
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.storage import Folder, file_system, open_input, require_inside, sha256_of

EXPORT_ROWS = 10_000
"""Rows of each Parquet file to which a hub data set is exported."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source: its place, its name in messages, its kind (one of KINDS) and a digest of its content."""

    uri: str
    name: str
    kind: str
    digest: str
    first_record: int = 0
    """Offset of the file's record numbers: a hub data set is numbered across its files."""
    version: tuple[int, int] | None = None
    """Size and modification time, read no later than the digest; None for a file that raydiv wrote."""
    compression: str | None = None
    """Its compression as pyarrow names it."""


def files_of(source: Source) -> list[File]:
    """The files of a source, sorted by name. A hub data set is downloaded and exported to Parquet in the cache.

    Raises UserError for a source that does not exist or cannot be reached, or a file of unknown kind.
    """
    path = source.path
    if path.startswith("bundled:"):
        return [_local_file(w1_pairs() if path == W1 else bundled_file(path), path)]
    if path.startswith("hf://"):
        return _hub_files(source)
    uri = _uri(path)
    system, inside = file_system(uri)
    try:
        info = system.get_file_info(inside)
        if info.type == fs.FileType.Directory:
            files = _directory_files(source, Folder(uri.rstrip("/")))
        elif info.is_file:
            files = [_file(uri, path, info)]
        else:
            files = _matching_files(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be reached: {one_line(error, 200)}") from None
    if source.split is not None and any(file.kind != ".arrow" for file in files):
        raise UserError(f"{path}: split {source.split} does not apply: only saved and hub data sets have splits")
    return files


def stored_bytes(file: File) -> int:
    """The size of a file, as it is compressed."""
    if file.version is not None:
        return file.version[0]
    system, inside = file_system(file.uri)
    return int(system.get_file_info(inside).size or 0)


def require_unchanged(file: File) -> None:
    """Raise UserError if a file has changed since it was digested: records read since then may be of either content."""
    if file.version is None:
        return
    system, inside = file_system(file.uri)
    info = system.get_file_info(inside)
    if (info.size, info.mtime_ns) == file.version:
        return
    # the time differs for a file that was only touched, or on a node with another clock: the content decides
    if "://" in file.uri or not info.is_file or sha256_of(Path(file.uri)) != file.digest:
        raise UserError(f"{file.name}: changed while it was read, and nothing of it was used; start again")


def _file(uri: str, name: str, info: Any) -> File:
    if "://" not in uri:
        return _local_file(Path(uri), name)
    kind, compression = _kind(name)
    version = (info.size, info.mtime_ns)
    return File(uri, name, kind, digest(uri, *version), version=version, compression=compression)


def _local_file(path: Path, name: str) -> File:
    status = path.stat()
    version = (status.st_size, status.st_mtime_ns)
    kind, compression = _kind(str(path))
    return File(str(path), name, kind, file_digest(path), version=version, compression=compression)


KNOWN_KINDS = f"{', '.join(SUFFIXES)}; text kinds also with {', '.join(COMPRESSIONS)}"


def _kind(name: str) -> tuple[str, str | None]:
    """The kind and the compression of a file. Raises UserError for a name of unknown suffix."""
    kind = file_kind(name)
    if kind is None:
        raise UserError(f"{name}: unknown kind of file (known: {KNOWN_KINDS}; a saved datasets directory)")
    return kind


def _uri(path: str) -> str:
    """A user's path as an absolute path or a URI."""
    scheme, remote, rest = path.partition("://")
    return f"{scheme}://{quote(rest)}" if remote else str(Path(path).expanduser().absolute())


def _matching_files(path: str) -> list[File]:
    """Files that match a pattern such as data/*.jsonl."""
    parent, _, pattern = (path if "://" in path else _uri(path)).rpartition("/")
    if not set(pattern) & set("*?["):
        raise UserError(f"{path}: no such file or directory")
    files = [
        file
        for file in _readable_files(Folder(_uri(parent)), path.rpartition("/")[0])
        if fnmatch.fnmatch(Path(file.uri).name, pattern)
    ]
    if not files:
        raise UserError(f"{path}: no file matches")
    return files


def _readable_files(folder: Folder, name: str) -> list[File]:
    """The files of a folder that are of a known kind and not hidden, by name."""
    system, inside = file_system(folder.uri)
    infos = system.get_file_info(fs.FileSelector(inside, allow_not_found=True))
    visible = sorted(
        (info for info in infos if info.is_file and not info.base_name.startswith(".")), key=lambda i: i.base_name
    )
    prefix = f"{name}/" if name else ""
    return [_file(folder.uri_of(i.base_name), prefix + i.base_name, i) for i in visible if file_kind(i.base_name)]


def _directory_files(source: Source, folder: Folder) -> list[File]:
    """The Arrow files of a saved data set, otherwise every readable file of the folder."""
    path = source.path.rstrip("/")
    if folder.has("dataset_dict.json"):
        splits = _splits(folder, path)
        split = source.split or "train"
        if split not in splits:
            raise UserError(f"{path}: no split {split} (known: {', '.join(splits)}); choose one with split")
        folder, path = Folder(folder.uri_of(split)), f"{path}/{split}"
    elif source.split is not None:
        raise UserError(f"{path}: split {source.split} does not apply: this directory has no splits")
    if folder.has("state.json"):
        return _saved_files(folder, path)
    # a text file beside data usually describes it
    files = [file for file in _readable_files(folder, path) if file.kind != ".txt"]
    if not files:
        raise UserError(
            f"{path}: a directory without data: neither written by datasets' save_to_disk, nor with a file of a known "
            f"kind ({KNOWN_KINDS})"
        )
    return files


def _splits(folder: Folder, path: str) -> list[str]:
    """The names of the splits of a saved data set."""
    try:
        splits = _json_content(folder.uri_of("dataset_dict.json"))["splits"]
        return [require_inside(str(name)) for name in splits]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}/dataset_dict.json: names no splits: {one_line(error, 100)}") from None


def _saved_files(folder: Folder, path: str) -> list[File]:
    """The Arrow files of a data set written by datasets' save_to_disk."""
    try:
        names = saved_data_files(_json_content(folder.uri_of("state.json")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}/state.json: {one_line(error, 100)}") from None
    system, inside = file_system(folder.uri)
    infos = system.get_file_info([f"{inside}/{name}" for name in names])
    return [_file(folder.uri_of(name), f"{path}/{name}", info) for name, info in zip(names, infos, strict=True)]


def _json_content(uri: str) -> Any:
    with open_input(uri, mapped=False) as content:
        return json.loads(bytes(content.read()))


def _hub_files(source: Source) -> list[File]:
    """A split of a hub data set, as Parquet files that every worker can reach; exported once per content."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = source.path.removeprefix("hf://")
    try:
        data = datasets.load_dataset(
            name, source.config, split=source.split or "train", revision=source.revision
        ).with_format("arrow")
    except Exception as error:  # the hub client raises many unrelated types
        raise UserError(f"{source.path}: cannot be loaded from the hub: {one_line(error, 300)}") from None
    content = digest(name, dataset_fingerprint(data), len(data))
    folder = shared_dir("hub", content)
    exported = set(folder.file_names(".parquet"))
    names = {start: f"{start:012}.parquet" for start in range(0, len(data), EXPORT_ROWS)}
    for start, file_name in names.items():
        if file_name not in exported:
            buffer = pa.BufferOutputStream()
            pq.write_table(data[start : start + EXPORT_ROWS], buffer)
            folder.write(file_name, buffer.getvalue())
    return [
        File(folder.uri_of(file_name), source.path, ".parquet", digest(content, file_name), start)
        for start, file_name in names.items()
    ]
