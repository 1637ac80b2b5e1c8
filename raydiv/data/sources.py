"""Sources of records: which files a source is, how each kind is read piece by piece, and where a record stands in it."""

from __future__ import annotations

import csv
import fnmatch
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import fs

from raydiv.config.source import Source
from raydiv.data.bundled import bundled_file
from raydiv.data.bundled.w1 import w1_pairs
from raydiv.data.formats import AS_IT_IS, BadRow, Cells, Example, Record, RecordReader, brief
from raydiv.model.w1 import W1
from raydiv.utils.cache import digest, file_digest, shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder, file_system, open_input, sha256_of

FILE_CHUNK_BYTES = 4 * 2**20
"""Bytes of a JSONL file that one task reads."""

TEXT = ".txt"
"""Plain text, a prompt a line."""

EXPORT_ROWS = 10_000
"""Rows of a hub data set in one of the Parquet files that it is kept as."""

csv.field_size_limit(2**31 - 1)  # a long field is a bad row, not a broken file


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source: where it is, what messages call it, its kind (a row of KINDS) and a digest of its content."""

    uri: str
    name: str
    kind: str
    digest: str
    before: int = 0
    """Records of the source in the files before, where its own count runs through them."""
    version: tuple[int, int] | None = None
    """Its size and modification time when it was digested, or a moment before; None of one that raydiv wrote."""


@dataclass(frozen=True, slots=True)
class FileChunk:
    """A part of a file that is read alone: bytes of JSONL, row groups of Parquet; other kinds are read whole."""

    file: File
    start: int = 0
    stop: int = 0


Raw = tuple[int, Any]
"""Position of a record (a byte of a JSONL file, else its number from 1), and its JSON text (bytes), the record, or
what is wrong with it (a BadRow)."""


def files_of(source: Source) -> list[File]:
    """The files of a source, in order of their names; a hub data set is downloaded and kept as Parquet.

    Raises UserError where there is none, or none that can be read.
    """
    path = source.path
    if path.startswith("bundled:"):
        return [_local(w1_pairs() if path == W1 else bundled_file(path), path)]
    if path.startswith("hf://"):
        return _hub(source)
    uri = _uri(path)
    system, inside = file_system(uri)
    try:
        info = system.get_file_info(inside)
        if info.type == fs.FileType.Directory:
            files = _directory(source, Folder(uri.rstrip("/")))
        elif info.is_file:
            files = [_file(uri, path, info)]
        else:
            files = _matching(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be reached: {' '.join(str(error).split())[:200]}") from None
    if source.split is not None and any(file.kind != ".arrow" for file in files):
        raise UserError(f"{path}: split {source.split} means nothing here: only saved and hub data sets have splits")
    return files


def _file(uri: str, name: str, info: Any) -> File:
    if "://" not in uri:
        return _local(Path(uri), name)
    return File(uri, name, _kind(name), digest(uri, info.size, info.mtime_ns), version=(info.size, info.mtime_ns))


def _local(path: Path, name: str) -> File:
    status = path.stat()
    version = (status.st_size, status.st_mtime_ns)
    return File(str(path), name, _kind(str(path)), file_digest(path), version=version)


def require_unchanged(file: File) -> None:
    """Raises UserError where a file is not what it was when it was digested: what was read since may be of either content."""
    if file.version is None:
        return
    system, inside = file_system(file.uri)
    info = system.get_file_info(inside)
    if (info.size, info.mtime_ns) == file.version:
        return
    # touched, or on a node whose clock differs: then it is the content that counts
    if "://" in file.uri or not info.is_file or sha256_of(Path(file.uri)) != file.digest:
        raise UserError(
            f"{file.name}: was changed while it was read; nothing of it was used: start again when it is whole"
        )


def _kind(name: str) -> str:
    kind = Path(name).suffix
    if kind not in KINDS:
        raise UserError(f"{name}: unknown kind of file (known: {', '.join(KINDS)}, a saved datasets directory)")
    return kind


def _uri(path: str) -> str:
    """A place as a user writes it, as an absolute path or a URI."""
    scheme, remote, rest = path.partition("://")
    return f"{scheme}://{quote(rest)}" if remote else str(Path(path).expanduser().absolute())


def _matching(path: str) -> list[File]:
    """Files that a pattern such as data/*.jsonl names."""
    parent, _, pattern = (path if "://" in path else _uri(path)).rpartition("/")
    if not set(pattern) & set("*?["):
        raise UserError(f"{path}: no such file or directory")
    files = [
        file
        for file in _listed(Folder(_uri(parent)), path.rpartition("/")[0])
        if fnmatch.fnmatch(Path(file.uri).name, pattern)
    ]
    if not files:
        raise UserError(f"{path}: no file matches")
    return files


def _listed(folder: Folder, name: str) -> list[File]:
    """The files of a folder that can be read."""
    system, inside = file_system(folder.uri)
    infos = system.get_file_info(fs.FileSelector(inside, allow_not_found=True))
    shown = sorted(
        (info for info in infos if info.is_file and not info.base_name.startswith(".")), key=lambda i: i.base_name
    )
    prefix = f"{name}/" if name else ""
    return [_file(folder.at(i.base_name), prefix + i.base_name, i) for i in shown if Path(i.base_name).suffix in KINDS]


def _directory(source: Source, folder: Folder) -> list[File]:
    """The Arrow files of a saved data set, else every file of the folder that can be read."""
    path = source.path.rstrip("/")
    if folder.has("dataset_dict.json"):
        splits = json.loads(_whole(folder.at("dataset_dict.json")))["splits"]
        split = source.split or "train"
        if split not in splits:
            raise UserError(
                f"{path}: holds splits {', '.join(splits)}, and none is called {split}; choose one with split"
            )
        folder, path = Folder(folder.at(split)), f"{path}/{split}"
    elif source.split is not None:
        raise UserError(f"{path}: split {source.split} means nothing here: this directory has no splits")
    if folder.has("state.json"):
        saved = [entry["filename"] for entry in json.loads(_whole(folder.at("state.json")))["_data_files"]]
        system, inside = file_system(folder.uri)
        places = [folder.at(name) for name in saved]
        infos = system.get_file_info([f"{inside}/{name}" for name in saved])
        return [_file(at, f"{path}/{name}", info) for at, name, info in zip(places, saved, infos, strict=True)]
    # text beside data is more often about it than part of it
    files = [file for file in _listed(folder, path) if file.kind != TEXT]
    if not files:
        raise UserError(
            f"{path}: a directory, but neither written by datasets' save_to_disk nor one with {', '.join(KINDS)} in it"
        )
    return files


def _hub(source: Source) -> list[File]:
    """A split of a hub data set, as Parquet files that every worker reaches; made once per content."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = source.path.removeprefix("hf://")
    try:
        data = datasets.load_dataset(
            name, source.config, split=source.split or "train", revision=source.revision
        ).with_format("arrow")
    except Exception as error:  # the hub client raises many unrelated types
        raise UserError(f"{source.path}: cannot be loaded from the hub: {' '.join(str(error).split())[:300]}") from None
    content = digest(name, data._fingerprint, len(data))
    folder = shared_dir("hub", content)
    starts = range(0, len(data), EXPORT_ROWS)
    there = set(folder.names(".parquet"))
    for start in starts:
        if f"{start:012}.parquet" not in there:
            buffer = pa.BufferOutputStream()
            pq.write_table(data[start : start + EXPORT_ROWS], buffer)
            folder.write(f"{start:012}.parquet", buffer.getvalue())
    names = {start: f"{start:012}.parquet" for start in starts}
    return [File(folder.at(n), source.path, ".parquet", digest(content, n), start) for start, n in names.items()]


def file_chunks(file: File) -> list[FileChunk]:
    """How a file is cut up, so that tasks can read it side by side."""
    if file.kind == ".jsonl":
        system, inside = file_system(file.uri)
        size = system.get_file_info(inside).size
        return [
            FileChunk(file, start, min(start + FILE_CHUNK_BYTES, size)) for start in range(0, size, FILE_CHUNK_BYTES)
        ]
    if file.kind == ".parquet":
        return [FileChunk(file, group, group + 1) for group in range(_parquet_file(file).num_row_groups)]
    return [FileChunk(file)]


def read(piece: FileChunk) -> Iterator[Raw]:
    """The records of a piece, one after another. Raises UserError for a file that cannot be read at all."""
    return KINDS[piece.file.kind](piece)


def parse(raw: Any) -> Any:
    """A record from what ``read`` gives. Raises BadRow for a line that is not JSON."""
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8, at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise BadRow(f"not JSON: {reason}, at character {getattr(error, 'colno', 1)}") from None


def locate(file: File, positions: Iterable[int]) -> dict[int, int]:
    """What a reader of the file would call each position: the line of a JSONL file, else the record's number."""
    wanted = sorted(set(positions))
    if file.kind != ".jsonl":
        return {position: file.before + position for position in wanted}
    lines, line, at = {}, 1, 0
    with open_input(file.uri, mapped=False) as content:
        for position in wanted:
            while at < position:
                chunk = content.read(min(position - at, FILE_CHUNK_BYTES))
                line, at = line + bytes(chunk).count(b"\n"), at + len(chunk)
            lines[position] = line
    return lines


def iterate_records(source: Source, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, Record]]:
    """(where, record) of all of a source small enough for this process. Raises UserError at the first that is none."""
    reading = reading_of(source, columns or {})
    for file in files_of(source):
        found = [raw for piece in file_chunks(file) for raw in read(piece)]
        names = locate(file, (position for position, _ in found))
        require_unchanged(file)
        for position, raw in found:
            where = f"{file.name}:{names[position]}"
            try:
                yield where, reading.rename(parse(raw))
            except BadRow as error:
                raise UserError(f"{where}: {error}") from None


def read_examples(source: Source, columns: Mapping[str, str] | None = None) -> list[Example]:
    """All examples of a source small enough for this process, in its order; ``columns`` where it names none of its own.

    Raises UserError for a source that does not exist, holds no example, has unknown columns, or a record with a missing,
    empty or ill-typed field, naming file and record.
    """
    examples: list[Example] = []
    for where, record in iterate_records(source, columns):
        try:
            examples += AS_IT_IS.examples(record, where)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
    if not examples:
        raise UserError(f"{source.path}: holds no examples")
    return examples


def reading_of(source: Source, columns: Mapping[str, str]) -> RecordReader:
    """How the records of a source are read; ``columns`` where it names none of its own."""
    return RecordReader(columns if source.columns is None else source.columns, source.constants)


def _whole(uri: str) -> bytes:
    with open_input(uri, mapped=False) as content:
        return bytes(content.read())


def _buffered(file: File) -> io.BufferedReader:
    return io.BufferedReader(open_input(file.uri, mapped=False), 2**20)


def _jsonl(piece: FileChunk) -> Iterator[Raw]:
    """Lines that begin in the piece; blank ones are none."""
    with _buffered(piece.file) as content:
        position = piece.start
        if piece.start:  # the line that the piece starts in the middle of belongs to the one before
            content.seek(piece.start - 1)
            position += len(content.readline()) - 1
        while position < piece.stop:
            line = content.readline()
            if not line:
                raise UserError(f"{piece.file.name}: became shorter while it was read; start again")
            record = line.removeprefix(b"\xef\xbb\xbf") if position == 0 else line
            if record.strip():
                yield position, record
            position += len(line)


def _text(piece: FileChunk) -> Iterator[Raw]:
    """Lines that are not blank, each a prompt."""
    for number, line in enumerate(_whole(piece.file.uri).removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                yield number, {"prompt": line.decode().strip()}
            except UnicodeDecodeError as error:
                yield number, BadRow(f"not UTF-8, at byte {error.start + 1} of the line")


def _json(piece: FileChunk) -> Iterator[Raw]:
    try:
        rows = json.loads(_whole(piece.file.uri).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{piece.file.name}: not UTF-8, at byte {error.start}") from None
    except ValueError as error:
        raise UserError(f"{piece.file.name}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{piece.file.name}: must be a list of records, found {brief(rows)}")
    yield from enumerate(rows, start=1)


def _csv(piece: FileChunk) -> Iterator[Raw]:
    """Rows of text; an empty field is none at all."""
    with _buffered(piece.file) as content:
        # bytes that are no UTF-8 stay in their field, where they make a bad row
        lines = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(lines, restkey="\0", strict=True)
        try:
            for number, row in enumerate(rows, start=1):
                cells = Cells({str(key): value or None for key, value in row.items()})
                yield number, BadRow("has more fields than the header") if "\0" in row else cells
        except csv.Error as error:
            raise UserError(f"{piece.file.name}: not CSV: {error}, in line {rows.line_num}") from None


def _parquet_file(file: File) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(open_input(file.uri, mapped=False))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{file.name}: cannot be read as Parquet: {error}") from None


def _parquet(piece: FileChunk) -> Iterator[Raw]:
    with _parquet_file(piece.file) as content:
        groups = range(piece.start, piece.stop)
        number = 1 + sum(content.metadata.row_group(group).num_rows for group in range(piece.start))
        for batch in content.iter_batches(batch_size=1000, row_groups=groups):
            yield from enumerate(_rows(batch), start=number)
            number += len(batch)


def _rows(batch: Any) -> list[Any]:
    """The records of an Arrow batch; one that holds text that is none is a BadRow."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [BadRow("a field is not UTF-8")]
        return [row for place in range(len(batch)) for row in _rows(batch.slice(place, 1))]


def _arrow(piece: FileChunk) -> Iterator[Raw]:
    import pyarrow as pa

    number = 1
    with open_input(piece.file.uri, mapped=False) as content, pa.ipc.open_stream(content) as batches:
        for batch in batches:
            yield from enumerate(_rows(batch), start=number)
            number += len(batch)


KINDS: dict[str, Callable[[FileChunk], Iterator[Raw]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    TEXT: _text,
}
"""Kinds of file by their ending, and how a piece of each is read."""
