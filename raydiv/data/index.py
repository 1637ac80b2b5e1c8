"""The index of a prepared source: lengths, labels and digests of its examples, and its bad rows, without the tokens."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.config.data import DataConfig
from raydiv.config.recipe import BatchConfig
from raydiv.config.source import Source
from raydiv.data.formats import BadRow
from raydiv.data.readers import file_chunks, line_numbers, parse_record, read_chunk, record_reader
from raydiv.data.sources import File, files_of
from raydiv.data.tokens import TokenShards
from raydiv.model.chat import Chat
from raydiv.utils.cache import digest, shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import open_input

VERSION = 2
"""Version of the content of shards and index; part of their key."""

INDEX = "index.parquet"

CHECKED_RECORDS = 1000
"""Under quarantine, the number of first records of which one must be good."""

SPELLINGS = ("", "safe", "1", "true")
"""The column ``spelling`` is a position in this tuple: how the record spells its label (see formats.SAFETY)."""

SPELLING_LABELS = ("", "safe/unsafe", "1/0", "true/false")
"""The same for messages."""

SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "file": pa.int32(),
        "position": pa.int64(),
        "prompt_length": pa.int32(),
        "response_length": pa.int32(),
        "prompt_cut": pa.int32(),
        "response_cut": pa.int32(),
        "aligned": pa.bool_(),
        "harmful": pa.int8(),
        "pair": pa.int64(),
        "spelling": pa.int8(),
        "prompt_text": pa.binary(16),
        "prompt_key": pa.binary(16),
        "response_key": pa.binary(16),
    }
)
"""Columns of a shard. ``harmful``: 1, 0, or -1 for no label; ``pair``: digest of the pair's name, or -1 for no pair."""

INDEX_COLUMNS = [name for name in SCHEMA.names if not name.endswith("_ids")]


@dataclass(frozen=True, slots=True)
class RowNotes:
    """Notes on rows: the file and line of each, and the reason for the note."""

    places: list[tuple[str, int]]
    reasons: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def __add__(self, other: RowNotes) -> RowNotes:
        return RowNotes(self.places + other.places, self.reasons + other.reasons)

    def as_json(self) -> Iterator[dict[str, Any]]:
        """One mapping per note, for ``rows.jsonl`` and ``--json``."""
        for (file, line), reason in zip(self.places, self.reasons, strict=True):
            yield {"file": file, "line": line, "reason": reason}

    @classmethod
    def locate(cls, files: Sequence[File], rows: Iterable[tuple[int, int, str]]) -> RowNotes:
        """Notes from (file number, position in the file, reason). Each file is read through once to find the lines."""
        rows = list(rows)
        lines = {
            number: line_numbers(files[number], (position for file, position, _ in rows if file == number))
            for number in {file for file, _, _ in rows}
        }
        places = [(files[file].name, lines[file][position]) for file, position, _ in rows]
        return cls(places, [reason for _, _, reason in rows])


class OpenSource:
    """A source with its files, its reader, and the cache folder of its prepared examples.

    Raises UserError for a source that does not exist, or a file of unknown kind.
    """

    def __init__(self, source: Source, data: DataConfig, batch: BatchConfig, chat: Chat) -> None:
        self.source = source
        self.reader = record_reader(source, data.columns or {})
        self.files = files_of(source)
        self.lengths = (batch.max_prompt_length, batch.max_length)
        content = [
            VERSION,
            [(file.kind, file.digest) for file in self.files],
            self.reader.columns,
            self.reader.constants,
        ]
        self.folder = shared_dir("prepared", digest(content, chat.fingerprint, self.lengths))

    @property
    def ready(self) -> bool:
        """Whether the source is prepared."""
        return self.folder.has(INDEX)

    def require_example(self, quarantine: bool) -> None:
        """Raise UserError if the first record is not an example, before any work starts.

        With ``quarantine``, raise it only if none of the first CHECKED_RECORDS records is.
        """
        records = (
            (number, record)
            for number, file in enumerate(self.files)
            for chunk in file_chunks(file)
            for record in read_chunk(chunk)
        )
        message = f"{self.source.path}: holds no examples"
        checked = itertools.islice(records, CHECKED_RECORDS if quarantine else 1)
        for count, (number, (position, content)) in enumerate(checked):
            try:
                self.reader.examples(parse_record(content), "")
                return
            except BadRow as error:
                if count == 0:
                    message = f"{self.where(number, position)}: {error}"
        raise UserError(message)

    def where(self, file: int, position: int) -> str:
        """``FILE:LINE`` of a record."""
        return f"{self.files[file].name}:{line_numbers(self.files[file], [position])[position]}"


@dataclass(frozen=True, slots=True)
class Index:
    """``columns`` [n]: INDEX_COLUMNS, and ``row``, the row number in ``shards``. ``bad``: the rows left out."""

    opened: OpenSource
    shards: TokenShards
    columns: dict[str, np.ndarray]
    bad: RowNotes

    def __len__(self) -> int:
        return len(self.columns["file"])

    def where(self, row: int) -> str:
        """``FILE:LINE`` of an example."""
        return self.opened.where(int(self.columns["file"][row]), int(self.columns["position"][row]))

    def truncated(self) -> RowNotes:
        """The rows with a truncated prompt or response, and the number of tokens cut."""
        notes = []
        for side in ("prompt", "response"):
            rows = np.flatnonzero(self.columns[f"{side}_cut"])
            columns = (self.columns[name][rows].tolist() for name in ("file", "position", f"{side}_cut"))
            notes += [
                (file, position, f"{side} cut by {tokens} tokens")
                for file, position, tokens in zip(*columns, strict=True)
            ]
        return RowNotes.locate(self.opened.files, dict.fromkeys(notes))


class IndexWriter:
    """Writes a source's index, shard by shard; the file appears in the folder when the block ends without an error."""

    def __init__(self, opened: OpenSource) -> None:
        self._opened = opened
        self._temporary = tempfile.TemporaryDirectory()
        self._path = Path(self._temporary.name) / INDEX
        self._writer = pq.ParquetWriter(self._path, pa.schema([SCHEMA.field(name) for name in INDEX_COLUMNS]))
        self._shards: list[tuple[str, int]] = []
        self._bad: list[tuple[int, int, str]] = []

    def __enter__(self) -> IndexWriter:
        return self

    def add(self, shard: str, table: pa.Table, bad: Iterable[tuple[int, int, str]]) -> None:
        """Add the next shard: its name, its INDEX_COLUMNS, and (file, position, reason) of its bad rows."""
        self._writer.write_table(table)
        self._shards.append((shard, len(table)))
        self._bad += bad

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._temporary:
            self._writer.add_key_value_metadata({"raydiv": json.dumps({"shards": self._shards, "bad": self._bad})})
            self._writer.close()
            if kind is None:
                with pa.memory_map(str(self._path)) as content:
                    self._opened.folder.write(INDEX, content.read_buffer())


def read_index(opened: OpenSource) -> Index:
    """The index of a prepared source."""
    with open_input(opened.folder.uri_of(INDEX)) as content:
        file = pq.ParquetFile(content)
        table, metadata = file.read(), json.loads(file.metadata.metadata[b"raydiv"])
    columns = {name: _as_numpy(table[name]) for name in table.column_names}
    columns["row"] = np.arange(len(table))
    starts = np.cumsum([0, *(rows for _, rows in metadata["shards"])], dtype=np.int64)
    shards = TokenShards(tuple(opened.folder.uri_of(name) for name, _ in metadata["shards"]), starts)
    bad = RowNotes.locate(opened.files, map(tuple, metadata["bad"]))
    return _with_one_spelling(Index(opened, shards, columns, bad))


def _with_one_spelling(index: Index) -> Index:
    """The index without rows whose label is spelled differently from most: 0 in one may mean 1 in the other."""
    spelling = index.columns["spelling"]
    kinds = np.unique(spelling[spelling > 0])
    if len(kinds) < 2:
        return index
    records = {kind: _records(index, spelling == kind) for kind in kinds.tolist()}
    most = max(records, key=lambda kind: len(records[kind]))
    minority = (spelling > 0) & (spelling != most)
    notes = [
        (file, position, f"safety is spelled {SPELLING_LABELS[kind]} here, and {SPELLING_LABELS[most]} in most rows")
        for kind in records.keys() - {most}
        for file, position in records[kind]
    ]
    columns = {name: column[~minority] for name, column in index.columns.items()}
    bad = index.bad + RowNotes.locate(index.opened.files, sorted(notes))
    return Index(index.opened, index.shards, columns, bad)


def _records(index: Index, members: np.ndarray) -> list[tuple[int, int]]:
    """File and position of the records of some examples, each once."""
    columns = (index.columns[name][members].tolist() for name in ("file", "position"))
    return list(dict.fromkeys(zip(*columns, strict=True)))


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_binary(column.type):
        array, width = pa.concat_arrays(column.chunks), column.type.byte_width
        return np.frombuffer(array.buffers()[1], f"S{width}", len(array), array.offset * width)
    return column.to_numpy()  # type: ignore[no-any-return]
