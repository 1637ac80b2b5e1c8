"""The readers of each kind of file. Tasks read chunks of a file independently; each record comes with its position.

To add a kind of file, add it to ``raydiv.config.source.KINDS`` and its reader to ``READERS``.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raydiv.config.data import NO_TEMPLATE, DataConfig
from raydiv.config.source import Source
from raydiv.data.fields import BadRow, Record, describe
from raydiv.data.formats import Example, RecordReader, convert, format_of
from raydiv.data.sources import File, files_of, require_unchanged
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.storage import file_system, open_input

FILE_CHUNK_BYTES = 4 * 2**20
"""Bytes of a JSONL file that one task reads."""

UTF_16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

csv.field_size_limit(2**31 - 1)  # a field that is too long makes a bad row, not an unreadable file


@dataclass(frozen=True, slots=True)
class FileChunk:
    """A part of a file that one task reads: a byte range of JSONL, row groups of Parquet, otherwise the whole.

    A compressed JSONL file is one chunk.
    """

    file: File
    start: int = 0
    stop: int = 0


RawRecord = tuple[int, Any]
"""A record's position (its byte in a JSONL file, uncompressed; otherwise its number from 1), and its content: JSON text
(bytes), the parsed record, or a BadRow."""


def file_chunks(file: File) -> list[FileChunk]:
    """The chunks of a file."""
    if file.kind == ".jsonl":
        if file.compression:
            return [FileChunk(file, 0, sys.maxsize)]
        system, inside = file_system(file.uri)
        size = system.get_file_info(inside).size
        return [
            FileChunk(file, start, min(start + FILE_CHUNK_BYTES, size)) for start in range(0, size, FILE_CHUNK_BYTES)
        ]
    if file.kind == ".parquet":
        return [FileChunk(file, group, group + 1) for group in range(_parquet_file(file).num_row_groups)]
    return [FileChunk(file)]


def read_chunk(chunk: FileChunk) -> Iterator[RawRecord]:
    """The records of a chunk, in order. Raises UserError for a file that cannot be read."""
    import pyarrow as pa

    file, position = chunk.file, 0
    try:
        for position, content in READERS[file.kind](chunk):
            yield position, content
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not {error.encoding.upper()}, which its beginning says") from None
    except (OSError, ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        what = f"not {file.compression}, or cut off" if file.compression else f"damaged, or not {file.kind[1:]}"
        unit = "byte" if file.kind == ".jsonl" else "record"
        raise UserError(f"{file.name}: {what}, after {unit} {position}: {one_line(error, 100)}") from None


def parse_record(content: Any) -> Any:
    """A record from the content of a RawRecord. Raises BadRow for a line that is not JSON."""
    if isinstance(content, BadRow):
        raise content
    if not isinstance(content, bytes):
        return content
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8, at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise BadRow(f"not JSON: {reason}, at character {getattr(error, 'colno', 1)}") from None


def line_numbers(file: File, positions: Iterable[int]) -> dict[int, int]:
    """The number that messages give for each position: the line in a JSONL file, otherwise the record's number."""
    ordered = sorted(set(positions))
    if file.kind != ".jsonl":
        return {position: file.first_record + position for position in ordered}
    lines, line, offset = {}, 1, 0
    with _opened(file) as content:
        for position in ordered:
            while offset < position:
                block = content.read(min(position - offset, FILE_CHUNK_BYTES))
                line, offset = line + bytes(block).count(b"\n"), offset + len(block)
            lines[position] = line
    return lines


def record_reader(source: Source, data: DataConfig | None = None) -> RecordReader:
    """The reader of a source's records; the columns of ``data`` apply if the source names none itself."""
    if data is None:
        return RecordReader(source.columns or {}, source.constants)
    return RecordReader(
        data.columns_of(source), source.constants, tuple(data.ignore), data.prefer, data.template == NO_TEMPLATE
    )


def iterate_records(source: Source, data: DataConfig | None = None) -> Iterator[tuple[str, Record]]:
    """(``FILE:LINE``, record) for a whole source that fits into memory. Raises UserError at the first bad row."""
    reader = record_reader(source, data)
    for file in files_of(source):
        records = [record for chunk in file_chunks(file) for record in read_chunk(chunk)]
        lines = line_numbers(file, (position for position, _ in records))
        require_unchanged(file)
        for position, content in records:
            where = f"{file.name}:{lines[position]}"
            try:
                yield where, reader.rename_columns(parse_record(content))
            except BadRow as error:
                raise UserError(f"{where}: {error}") from None


def read_examples(source: Source, data: DataConfig | None = None) -> list[Example]:
    """All examples of a source that fits into this process, in order; ``data`` as in ``record_reader``.

    Raises UserError, naming file and line, for a source that does not exist or holds no example, for unknown columns,
    and for a missing, empty or ill-typed field.
    """
    examples: list[Example] = []
    for where, record in iterate_records(source, data):
        try:
            examples += convert(record, where).examples
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
    if not examples:
        raise UserError(f"{source.path}: holds no examples")
    return examples


def _opened(file: File) -> Any:
    """The file's uncompressed content as a stream; the content of a file that is not compressed can be sought."""
    import pyarrow as pa

    content = open_input(file.uri, mapped=False)
    return pa.CompressedInputStream(content, file.compression) if file.compression else content


def _content(file: File) -> str:
    """The text of a file in UTF-8 or in UTF-16 with a byte order mark. Invalid bytes become lone surrogates."""
    with _opened(file) as stream:
        content = bytes(stream.read())
    return content.decode(_encoding(content), "surrogateescape")


def _buffered(file: File) -> io.BufferedReader:
    return io.BufferedReader(_opened(file), 2**20)


def _encoding(beginning: bytes) -> str:
    """The encoding of a file that begins so: UTF-16 by its byte order mark, else UTF-8, with a mark or without."""
    return "utf-16" if beginning.startswith(UTF_16_BOMS) else "utf-8-sig"


def _read_jsonl(chunk: FileChunk) -> Iterator[RawRecord]:
    """The lines that begin in the chunk, without blank ones."""
    with _buffered(chunk.file) as content:
        position = chunk.start
        if not chunk.start and content.peek(2).startswith(UTF_16_BOMS):
            raise UserError(f"{chunk.file.name}: is UTF-16; write it in UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if chunk.start:  # a line that begins in the previous chunk belongs to that one
            content.seek(chunk.start - 1)
            position += len(content.readline()) - 1
        while position < chunk.stop:
            line = content.readline()
            if not line and chunk.file.compression:
                return
            if not line:
                raise UserError(f"{chunk.file.name}: became shorter while it was read; start again")
            record = line.removeprefix(codecs.BOM_UTF8) if position == 0 else line
            if record.strip():
                yield position, record
            position += len(line)


def _read_text(chunk: FileChunk) -> Iterator[RawRecord]:
    """A prompt a line, without blank lines."""
    # not str.splitlines, which ends a line at a form feed and at other characters within a text
    for number, line in enumerate(io.StringIO(_content(chunk.file), newline=None), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _read_json(chunk: FileChunk) -> Iterator[RawRecord]:
    """The records of a list, of the one list in a mapping (``{"data": [...]}``), or of JSON Lines."""
    text = _content(chunk.file)
    try:
        content = json.loads(text)
    except ValueError as error:
        if not _is_json_lines(text):
            raise UserError(f"{chunk.file.name}: not JSON: {error}") from None
        lines = enumerate(io.StringIO(text), start=1)
        yield from ((number, line.encode(errors="surrogateescape")) for number, line in lines if line.strip())
        return
    if isinstance(content, Mapping):
        content = _wrapped_records(content)
    if not isinstance(content, list):
        raise UserError(f"{chunk.file.name}: must be a list of records or JSON Lines, found {describe(content)}")
    yield from enumerate(content, start=1)


def _is_json_lines(text: str) -> bool:
    """Whether the first line of a text is a mapping by itself."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _wrapped_records(content: Mapping[str, Any]) -> list[Any]:
    """The one list of mappings in a mapping, such as ``data``; without one, or with messages, the mapping itself."""
    if format_of(content) is not None:
        return [content]
    lists = [v for v in content.values() if isinstance(v, list) and v and isinstance(v[0], Mapping)]
    return lists[0] if len(lists) == 1 and not {"role", "from"} & lists[0][0].keys() else [content]


def _read_csv(chunk: FileChunk) -> Iterator[RawRecord]:
    """Rows of text; an empty field is None. The header says which of comma, semicolon and tab is the delimiter."""
    with _buffered(chunk.file) as content:
        encoding = _encoding(content.peek(2))
        # bytes that are not UTF-8 stay in their field, where they make a bad row
        lines = io.TextIOWrapper(content, encoding, errors="surrogateescape", newline="")
        try:
            header = next(lines, "")
            delimiter = "\t" if chunk.file.kind == ".tsv" else next((d for d in ",;\t" if d in header), ",")
            rows = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, restkey="\0", strict=True)
            for number, row in enumerate(rows, start=1):
                record = {str(key): value or None for key, value in row.items()}
                yield number, BadRow("has more fields than the header") if "\0" in row else record
        except csv.Error as error:
            raise UserError(f"{chunk.file.name}: not CSV: {error}, in line {rows.line_num}") from None


def _parquet_file(file: File) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(open_input(file.uri, mapped=False))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{file.name}: cannot be read as Parquet: {one_line(error, 200)}") from None


def _read_parquet(chunk: FileChunk) -> Iterator[RawRecord]:
    with _parquet_file(chunk.file) as content:
        groups = range(chunk.start, chunk.stop)
        number = 1 + sum(content.metadata.row_group(group).num_rows for group in range(chunk.start))
        for batch in content.iter_batches(batch_size=1000, row_groups=groups):
            yield from enumerate(_batch_records(batch), start=number)
            number += len(batch)


def _read_arrow(chunk: FileChunk) -> Iterator[RawRecord]:
    import pyarrow as pa

    number = 1
    with open_input(chunk.file.uri, mapped=False) as content, pa.ipc.open_stream(content) as batches:
        for batch in batches:
            _require_valid(batch)
            yield from enumerate(_batch_records(batch), start=number)
            number += len(batch)


def _require_valid(batch: Any) -> None:
    """Raise ArrowInvalid where offsets lead out of a damaged batch, which could end the process.

    Text that is not UTF-8 makes bad rows instead, so that columns of texts are checked as bytes.
    """
    import pyarrow as pa

    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for column in batch.columns:
        column.view(as_bytes.get(column.type, column.type)).validate(full=True)


def _batch_records(batch: Any) -> list[Any]:
    """The records of an Arrow batch, with a BadRow for each that holds invalid UTF-8, or a value that Python lacks.

    Columns of dates, times and bytes are None: no field is read from them, and some of their values cannot be read.
    """
    import pyarrow as pa

    try:
        columns = {
            name: column.to_pylist() if _may_hold_a_field(column.type) else [None] * len(batch)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except (ValueError, OverflowError, KeyError, pa.ArrowException) as error:
        if len(batch) == 1:
            utf_8 = isinstance(error, UnicodeDecodeError)
            return [BadRow("a field is not UTF-8" if utf_8 else f"a field cannot be read: {one_line(error, 100)}")]
        return [record for row in range(len(batch)) for record in _batch_records(batch.slice(row, 1))]


def _may_hold_a_field(column_type: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return not (types.is_temporal(column_type) or types.is_binary(column_type) or types.is_large_binary(column_type))


READERS: dict[str, Callable[[FileChunk], Iterator[RawRecord]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
"""The reader of each kind of file."""
