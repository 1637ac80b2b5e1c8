"""The index of a prepared source: lengths, labels and digests of its examples, and its bad rows, without the tokens."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.config.data import DataConfig
from raydiv.config.recipe import BatchConfig
from raydiv.config.source import Source
from raydiv.data.fields import A_RATING, SPELLINGS, BadRow
from raydiv.data.formats import FORMATS
from raydiv.data.notes import NOTE_TEXTS, Note
from raydiv.data.readers import file_chunks, line_numbers, parse_record, read_chunk, record_reader
from raydiv.data.sources import File, files_of, stored_bytes
from raydiv.data.tokens import TokenShards
from raydiv.model.chat import Chat
from raydiv.utils.cache import digest, shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import open_input

VERSION = 4
"""Version of the content of shards and index; part of their key."""

INDEX = "index.parquet"

CHECKED_RECORDS = 1000
"""Under quarantine, the number of first records of which one must be good."""

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
        "largest_id": pa.int32(),
        "aligned": pa.bool_(),
        "harmful": pa.int8(),
        "pair": pa.int64(),
        "format": pa.int8(),
        "label_spelling": pa.int8(),
        "harmful_spelling": pa.int8(),
        "notes": pa.int16(),
        "prompt_text": pa.binary(16),
        "prompt_key": pa.binary(16),
        "response_key": pa.binary(16),
    }
)
"""Columns of a shard.

``harmful``: 1, 0, or -1 for no label; ``pair``: digest of the pair's name, or -1 for no pair; ``format`` and the
spellings: positions in FORMATS and SPELLINGS; ``notes``: a Note; ``largest_id``: of the tokens.
"""

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
        self.reader = record_reader(source, data)
        self.files = files_of(source)
        self.lengths = (batch.max_prompt_length, batch.max_length)
        content = [
            VERSION,
            [(file.kind, file.digest) for file in self.files],
            self.reader.columns,
            self.reader.constants,
            self.reader.ignore,
            self.reader.prefer,
            self.reader.rendered,
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


SMALL_BYTES = 8 * 2**20
"""Size of sources that are read and tokenised in the process that was started: a pool takes longer to start.

16,000 pairs of short texts of this size took one process 7 s, and a pool of two actors 16 s (2 cores of a Xeon).
"""


def are_small(sources: Sequence[OpenSource]) -> bool:
    """Whether the sources need no pool."""
    return sum(stored_bytes(file) for opened in sources for file in opened.files) <= SMALL_BYTES


@dataclass(frozen=True, slots=True)
class Index:
    """``columns`` [n]: INDEX_COLUMNS, and ``row``, the row number in ``shards``.

    ``bad``: the rows left out; ``unread``: the columns of the source that no example was made of.
    """

    opened: OpenSource
    shards: TokenShards
    columns: dict[str, np.ndarray]
    bad: RowNotes
    unread: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.columns["file"])

    def where(self, row: int) -> str:
        """``FILE:LINE`` of an example."""
        return self.opened.where(int(self.columns["file"][row]), int(self.columns["position"][row]))

    def noted(self, note: Note) -> RowNotes:
        """The rows with a note."""
        rows = _records(self, (self.columns["notes"] & note) > 0)
        return RowNotes.locate(self.opened.files, [(*row, NOTE_TEXTS[note]) for row in rows])

    def formats(self) -> dict[str, list[str]]:
        """For each format the places of its rows, as ``FILE:LINE`` or ``FILE:FIRST-LAST``."""
        form, file, position = (self.columns[name] for name in ("format", "file", "position"))
        starts = np.flatnonzero((np.diff(form, prepend=-1) != 0) | (np.diff(file, prepend=-1) != 0))
        last_rows = np.append(starts[1:], len(self))[: len(starts)] - 1
        ends = [(int(file[row]), int(position[row]), "") for run in zip(starts, last_rows, strict=True) for row in run]
        places = RowNotes.locate(self.opened.files, ends).places
        found: dict[str, list[str]] = {}
        for start, (name, first), (_, last) in zip(starts, places[::2], places[1::2], strict=True):
            lines = str(first) if first == last else f"{first}-{last}"
            found.setdefault(FORMATS[int(form[start])].name, []).append(f"{name}:{lines}")
        return found

    def spelling(self, name: str) -> np.ndarray:
        """How each example's record spells the label ``name`` (see SPELLINGS); 0 where its format has another."""
        kind = LABELS[name]
        forms = [number for number, form in enumerate(FORMATS) if getattr(form, kind) == name]
        return np.where(np.isin(self.columns["format"], forms), self.columns[f"{kind}_spelling"], 0)

    def spellings(self) -> dict[str, str]:
        """How labels are spelled, by column, if not as true and false."""
        codes = {name: int(self.spelling(name).max(initial=0)) for name in LABELS}
        return {name: SPELLINGS[code] for name, code in codes.items() if SPELLINGS[code] not in ("", "true/false")}

    def require_rows(self, rows: int) -> None:
        """Raise UserError for an example with a token that an embedding of ``rows`` rows does not have."""
        beyond = np.flatnonzero(self.columns["largest_id"] >= rows)
        if len(beyond):
            first = int(beyond[0])
            raise UserError(
                f"{self.where(first)}: holds the token id {self.columns['largest_id'][first]}, and the embedding "
                f"has {rows:,} rows ({len(beyond) - 1} more examples): the tokenizer is that of another model, or the "
                "embedding was not resized for it"
            )

    def rendered_error(self) -> str | None:
        """A message where most prompts are rendered already: the template would wrap each of them once more."""
        rendered = int((self.columns["notes"] & Note.RENDERED > 0).sum())
        return rendered_error(self.opened.source.path, rendered, len(self))

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


def rendered_error(source: str, rendered: int, examples: int) -> str | None:
    """A message where most of a source's prompts are rendered already."""
    if 2 * rendered <= examples:
        return None
    return (
        f"{source}: {rendered} of {examples} examples have prompts that are rendered already, as they begin like the "
        "chat template or with a control token; set data.template=none to take them as they are"
    )


class IndexWriter:
    """Writes a source's index, shard by shard; the file appears in the folder when the block ends without an error."""

    def __init__(self, opened: OpenSource) -> None:
        self._opened = opened
        self._temporary = tempfile.TemporaryDirectory()
        self._path = Path(self._temporary.name) / INDEX
        self._writer = pq.ParquetWriter(self._path, pa.schema([SCHEMA.field(name) for name in INDEX_COLUMNS]))
        self._shards: list[tuple[str, int]] = []
        self._bad: list[tuple[int, int, str]] = []
        self._unread: set[str] = set()

    def __enter__(self) -> IndexWriter:
        return self

    def add(self, shard: str, table: pa.Table, bad: Iterable[tuple[int, int, str]], unread: Iterable[str]) -> None:
        """Add the next shard: its name and INDEX_COLUMNS, (file, position, reason) of its bad rows, unread columns."""
        self._writer.write_table(table)
        self._shards.append((shard, len(table)))
        self._bad += bad
        self._unread.update(unread)

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._temporary:
            told = {"shards": self._shards, "bad": self._bad, "unread": sorted(self._unread)}
            self._writer.add_key_value_metadata({"raydiv": json.dumps(told)})
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
    index = Index(opened, shards, columns, bad, tuple(metadata["unread"]))
    for name in LABELS:
        index = _with_one_spelling(index, name)
    return index


LABELS = {name: kind for kind in ("label", "harmful") for form in FORMATS if (name := getattr(form, kind)) is not None}
"""The columns that are labels, and which of ``label_spelling`` and ``harmful_spelling`` says how each is spelled."""


def _with_one_spelling(index: Index, name: str) -> Index:
    """The index without rows whose label ``name`` is spelled differently from most: 0 in one may mean 1 in the other.

    Rows of 1 and 0 are left out as well where the column has other numbers: it is a rating.
    """
    spelling = index.spelling(name)
    records = {kind: _records(index, spelling == kind) for kind in np.unique(spelling[spelling > 0]).tolist()}
    if not records:
        return index
    most = max(records, key=lambda kind: len(records[kind]))
    reasons = {
        kind: f"{name} is spelled {SPELLINGS[kind]} here, and {SPELLINGS[most]} in most rows"
        for kind in records
        if kind != most
    }
    if any(reason.startswith(f"{name} {A_RATING}") for reason in index.bad.reasons):
        reasons[SPELLINGS.index("1/0")] = f"{name} is 1 or 0 here and no label in other rows: a rating"
    left_out = np.isin(spelling, list(reasons))
    notes = [(*place, reasons[kind]) for kind in records.keys() & reasons.keys() for place in records[kind]]
    columns = {column: values[~left_out] for column, values in index.columns.items()}
    return replace(index, columns=columns, bad=index.bad + RowNotes.locate(index.opened.files, sorted(notes)))


def _records(index: Index, members: np.ndarray) -> list[tuple[int, int]]:
    """File and position of the records of some examples, each once."""
    columns = (index.columns[name][members].tolist() for name in ("file", "position"))
    return list(dict.fromkeys(zip(*columns, strict=True)))


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_binary(column.type):
        array, width = pa.concat_arrays(column.chunks), column.type.byte_width
        return np.frombuffer(array.buffers()[1], f"S{width}", len(array), array.offset * width)
    return column.to_numpy()  # type: ignore[no-any-return]
