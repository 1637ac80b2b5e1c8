"""What is known of a prepared source without reading its tokens: an index of lengths, labels and digests, and its bad rows."""

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

from raydiv.config.recipe import BatchConfig, DataConfig
from raydiv.config.source import Source
from raydiv.data.formats import BadRow
from raydiv.data.sources import File, file_chunks, files_of, locate, parse, read, reading_of
from raydiv.data.tokens import TokenShards
from raydiv.model.chat import Chat
from raydiv.utils.cache import digest, shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import open_input

VERSION = 1
"""Of what shards and index hold; another one reads nothing that this one wrote."""

INDEX = "index.parquet"

PEEKED = 1000
"""Records of which one must be good."""

SPELLINGS = ("", "safe", "1", "true")
"""How a source may write one label, where it has several ways (see formats.SAFETY)."""

SPELLED = ("", "safe/unsafe", "1/0", "true/false")
"""The same, for messages."""

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
"""A shard. ``harmful``: 1, 0, or -1 where there is no label; ``pair``: digest of its name, -1 without."""

INDEXED = [name for name in SCHEMA.names if not name.endswith("_ids")]


@dataclass(frozen=True, slots=True)
class RowNotes:
    """Rows that something is to be said of: file and line of each, and what."""

    places: list[tuple[str, int]]
    reasons: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def __add__(self, other: RowNotes) -> RowNotes:
        return RowNotes(self.places + other.places, self.reasons + other.reasons)

    def lines(self) -> Iterator[dict[str, Any]]:
        """A mapping each, for files and ``--json``."""
        for (file, line), reason in zip(self.places, self.reasons, strict=True):
            yield {"file": file, "line": line, "reason": reason}

    @classmethod
    def found(cls, files: Sequence[File], rows: Iterable[tuple[int, int, str]]) -> RowNotes:
        """Notes on (number of the file, position in it, what), each file read through once to find its lines."""
        rows = list(rows)
        lines = {
            number: locate(files[number], (position for file, position, _ in rows if file == number))
            for number in {file for file, _, _ in rows}
        }
        return cls([(files[f].name, lines[f][position]) for f, position, _ in rows], [what for _, _, what in rows])


class OpenSource:
    """A source whose files were found, and the folder that its content names.

    Raises UserError for a source that is not there, or is of no known kind.
    """

    def __init__(self, source: Source, data: DataConfig, batch: BatchConfig, chat: Chat) -> None:
        self.source = source
        self.reading = reading_of(source, data.columns or {})
        self.files = files_of(source)
        self.lengths = (batch.max_prompt_length, batch.max_length)
        content = [
            VERSION,
            [(file.kind, file.digest) for file in self.files],
            self.reading.columns,
            self.reading.constants,
        ]
        self.folder = shared_dir("prepared", digest(content, chat.fingerprint, self.lengths))

    @property
    def ready(self) -> bool:
        return self.folder.has(INDEX)

    def peek(self, tolerant: bool) -> None:
        """Raise UserError when there is no record, or the first is none, before anything is started.

        ``tolerant``: when not one of the first is.
        """
        raws = (
            (number, raw)
            for number, file in enumerate(self.files)
            for piece in file_chunks(file)
            for raw in read(piece)
        )
        wrong = f"{self.source.path}: holds no examples"
        for tried, (number, (position, raw)) in enumerate(itertools.islice(raws, PEEKED if tolerant else 1)):
            try:
                self.reading.examples(parse(raw), "")
                return
            except BadRow as error:
                wrong = wrong if tried else f"{self.where(number, position)}: {error}"
        raise UserError(wrong)

    def where(self, file: int, position: int) -> str:
        """``FILE:LINE`` of a record."""
        return f"{self.files[file].name}:{locate(self.files[file], [position])[position]}"


@dataclass(frozen=True, slots=True)
class Index:
    """``columns`` [n]: those of INDEXED, and ``row``, the number in ``shards``. ``bad``: the rows left out."""

    opened: OpenSource
    shards: TokenShards
    columns: dict[str, np.ndarray]
    bad: RowNotes

    def __len__(self) -> int:
        return len(self.columns["file"])

    def where(self, row: int) -> str:
        """``FILE:LINE`` of an example."""
        return self.opened.where(int(self.columns["file"][row]), int(self.columns["position"][row]))

    def cut(self) -> RowNotes:
        """The rows whose prompt or response truncation cut, and by how much."""
        notes = []
        for side in ("prompt", "response"):
            cut = np.flatnonzero(self.columns[f"{side}_cut"])
            found = (self.columns[name][cut].tolist() for name in ("file", "position", f"{side}_cut"))
            notes += [
                (file, position, f"{side} cut by {tokens} tokens")
                for file, position, tokens in zip(*found, strict=True)
            ]
        return RowNotes.found(self.opened.files, dict.fromkeys(notes))


class IndexWriter:
    """Writes a source's index shard by shard; it takes its place when the block ends well."""

    def __init__(self, opened: OpenSource) -> None:
        self._opened = opened
        self._temporary = tempfile.TemporaryDirectory()
        self._path = Path(self._temporary.name) / INDEX
        self._writer = pq.ParquetWriter(self._path, pa.schema([SCHEMA.field(name) for name in INDEXED]))
        self._shards: list[tuple[str, int]] = []
        self._bad: list[tuple[int, int, str]] = []

    def __enter__(self) -> IndexWriter:
        return self

    def add(self, shard: str, table: pa.Table, bad: Iterable[tuple[int, int, str]]) -> None:
        """The next shard: its name, its columns of INDEXED, and (file, position, reason) of its bad rows."""
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
    """The index of a source that is ready."""
    with open_input(opened.folder.at(INDEX)) as content:
        stored = pq.ParquetFile(content)
        table, facts = stored.read(), json.loads(stored.metadata.metadata[b"raydiv"])
    columns = {name: _numpy(table[name]) for name in table.column_names}
    columns["row"] = np.arange(len(table))
    starts = np.cumsum([0, *(rows for _, rows in facts["shards"])], dtype=np.int64)
    shards = TokenShards(tuple(opened.folder.at(name) for name, _ in facts["shards"]), starts)
    return _one_spelling(Index(opened, shards, columns, RowNotes.found(opened.files, map(tuple, facts["bad"]))))


def _one_spelling(index: Index) -> Index:
    """The index without the rows whose label is spelled otherwise than in most: 0 may mean what 1 means there."""
    spelling = index.columns["spelling"]
    kinds = np.unique(spelling[spelling > 0])
    if len(kinds) < 2:
        return index
    rows = {kind: _records(index, spelling == kind) for kind in kinds.tolist()}
    most = max(rows, key=lambda kind: len(rows[kind]))
    other = (spelling > 0) & (spelling != most)
    notes = [
        (file, position, f"safety is spelled {SPELLED[kind]} here, and {SPELLED[most]} in most rows")
        for kind in rows.keys() - {most}
        for file, position in rows[kind]
    ]
    columns = {name: column[~other] for name, column in index.columns.items()}
    return Index(index.opened, index.shards, columns, index.bad + RowNotes.found(index.opened.files, sorted(notes)))


def _records(index: Index, members: np.ndarray) -> list[tuple[int, int]]:
    """File and position of the records of some examples, each once."""
    found = (index.columns[name][members].tolist() for name in ("file", "position"))
    return list(dict.fromkeys(zip(*found, strict=True)))


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_binary(column.type):
        whole, width = pa.concat_arrays(column.chunks), column.type.byte_width
        return np.frombuffer(whole.buffers()[1], f"S{width}", len(whole), whole.offset * width)
    return column.to_numpy()  # type: ignore[no-any-return]
