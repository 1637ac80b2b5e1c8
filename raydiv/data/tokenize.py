"""Prepare: a source's records -> examples -> token ids, by a Ray Data pipeline; kept as Parquet, known by content.

Tasks read bundles of records; a pool of tokenizers turns each bundle into one Parquet file, its shard. What the driver keeps
of a shard is its index: lengths, labels and digests, written as one more Parquet file when all shards are there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.config.cluster import ClusterConfig
from raydiv.data.formats import BadRow, Example, RecordReader
from raydiv.data.index import INDEXED, SCHEMA, SPELLINGS, Index, IndexWriter, OpenSource, RowNotes, read_index
from raydiv.data.sources import FileChunk, Raw, file_chunks, parse, read, require_unchanged
from raydiv.data.tokens import GROUP_ROWS, content_key
from raydiv.model.chat import Chat, Tokenized
from raydiv.runtime.actor_pool import Progress, map_stream, no_progress
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder, open_input

CHUNK_RECORDS = 1000
"""Records of a shard."""


def tokenize(
    sources: Sequence[OpenSource],
    chat: Chat,
    cluster: ClusterConfig,
    *,
    quarantine: bool,
    progress: Progress = no_progress,
) -> list[Index]:
    """The index of each source; tokenises what the cache lacks. Needs a Ray session.

    Interrupted, it goes on where it stopped: shards that are there are not made again. Raises UserError at the first
    bad row, unless they are to be left out (``quarantine``).
    """
    missing = {opened.folder.uri: opened for opened in sources if not opened.ready}
    if missing:
        _write(list(missing.values()), chat, cluster, quarantine, progress)
    indices = [read_index(opened) for opened in sources]
    for index in indices:
        if index.bad and not quarantine:
            raise _refusal(index.opened, index.bad)
    return indices


def _refusal(opened: OpenSource, bad: RowNotes) -> UserError:
    """What to say of bad rows: the first, how many more, and what would do."""
    first = next(bad.lines())
    others = len(bad) - 1
    more = f" (and {others} more bad row{'' if others == 1 else 's'})" if others else ""
    return UserError(
        f"{first['file']}:{first['line']}: {first['reason']}{more}; raydiv data check {opened.source.path} lists every bad "
        "row, data.on_bad_row=quarantine leaves them out"
    )


@dataclass(frozen=True, slots=True)
class RecordChunk:
    """Records that become one shard, ``name``, of one source."""

    source: int
    file: int
    name: str
    records: list[Raw]


def record_chunks(sources: Sequence[OpenSource]) -> list[Callable[[], Iterator[RecordChunk]]]:
    """What makes the bundles of all sources, source by source: a call for each piece of a file."""
    return [
        partial(_bundles, number, file, place, piece)
        for number, opened in enumerate(sources)
        for file, content in enumerate(opened.files)
        for place, piece in enumerate(file_chunks(content))
    ]


def _bundles(source: int, file: int, number: int, piece: FileChunk) -> Iterator[RecordChunk]:
    """The bundles of a piece, in order; a bundle's name sorts by file, piece and place in it."""
    records = read(piece)
    for place in itertools.count():
        bundle = list(itertools.islice(records, CHUNK_RECORDS))
        require_unchanged(piece.file)  # what is kept is kept under the content that the file had
        if not bundle:
            return
        yield RecordChunk(source, file, f"{file:05}-{number:06}-{place:06}.parquet", bundle)


def _write(
    sources: Sequence[OpenSource], chat: Chat, cluster: ClusterConfig, quarantine: bool, progress: Progress
) -> None:
    """Tokenise the sources in one pass through one pool, and write each source's index when its last shard is there."""
    makers = record_chunks(sources)
    arguments = {"chat": chat, "targets": [(opened.folder, opened.reading, opened.lengths) for opened in sources]}
    if makers:
        with closing(map_stream(makers, Tokenizer, arguments, cluster=cluster, model=False)) as shards:
            _write_indices(sources, shards, quarantine, progress)
    for opened in sources:
        if not opened.ready:
            raise UserError(f"{opened.source.path}: holds no examples")


def _write_indices(
    sources: Sequence[OpenSource], shards: Iterator[TokenShard], quarantine: bool, progress: Progress
) -> None:
    """Write the index of each source from its shards, which come source by source."""
    rows = 0
    for number, own in itertools.groupby(shards, key=lambda shard: shard.source):
        with IndexWriter(sources[number]) as index:
            for shard in own:
                bad = [(shard.file, position, reason) for position, reason in shard.bad]
                if bad and not quarantine:
                    raise _refusal(sources[number], RowNotes.found(sources[number].files, bad))
                index.add(shard.name, shard.table, bad)
                rows += len(shard.table)
                progress(rows, None)


@dataclass(frozen=True, slots=True)
class TokenShard:
    """What the driver learns of a shard: its index, and the positions and reasons of its bad rows."""

    source: int
    file: int
    name: str
    table: pa.Table
    bad: list[tuple[int, str]]


class Tokenizer:
    """Turns bundles of records into shards. ``targets``: folder, reading, and longest prompt and example of each source.

    The chat comes ready made: finding out what tokenizer a directory holds takes longer than a thousand examples.
    """

    def __init__(self, chat: Chat, targets: Sequence[tuple[Folder, RecordReader, tuple[int, int]]]) -> None:
        self._chat, self._targets = chat, targets

    def __call__(self, bundles: list[RecordChunk]) -> list[TokenShard]:
        return [self._shard(bundle) for bundle in bundles]

    def _shard(self, bundle: RecordChunk) -> TokenShard:
        folder = self._targets[bundle.source][0]
        if folder.has(bundle.name):
            table = pq.read_table(open_input(folder.at(bundle.name)), columns=INDEXED)
        else:
            whole = self._table(bundle)
            buffer = pa.BufferOutputStream()
            pq.write_table(whole, buffer, row_group_size=GROUP_ROWS, compression="lz4", use_dictionary=False)
            folder.write(bundle.name, buffer.getvalue())
            table = whole.select(INDEXED)
        bad = [(int(position), reason) for position, reason in json.loads(table.schema.metadata[b"bad"])]
        return TokenShard(bundle.source, bundle.file, bundle.name, table.replace_schema_metadata(), bad)

    def _table(self, bundle: RecordChunk) -> pa.Table:
        _, reading, lengths = self._targets[bundle.source]
        records: list[tuple[int, list[Example]]] = []
        bad: list[tuple[int, str]] = []
        for position, raw in bundle.records:
            try:
                records.append((position, reading.examples(parse(raw), f"@{bundle.file}:{position}")))
            except BadRow as error:
                bad.append((position, str(error)))
        try:
            tokens = self._tokens(records, lengths)
        except ValueError:  # the template fails on some prompt: find out on which
            records, bad = self._sift(records, bad, lengths)
            tokens = self._tokens(records, lengths)
        metadata = {b"bad": json.dumps(bad).encode()}
        return pa.table(_columns(bundle.file, records, tokens), schema=SCHEMA.with_metadata(metadata))

    def _tokens(self, records: list[tuple[int, list[Example]]], lengths: tuple[int, int]) -> list[Tokenized]:
        examples = [example for _, found in records for example in found]
        return self._chat.examples([e.prompt for e in examples], [e.response for e in examples], *lengths)

    def _sift(
        self, records: list[tuple[int, list[Example]]], bad: list[tuple[int, str]], lengths: tuple[int, int]
    ) -> tuple[list[tuple[int, list[Example]]], list[tuple[int, str]]]:
        """The records that can be tokenised, and the bad rows with those that cannot."""
        good, bad = [], list(bad)
        for record in records:
            try:
                self._tokens([record], lengths)
                good.append(record)
            except ValueError as error:
                bad.append((record[0], str(error)))
        return good, sorted(bad)


def _columns(file: int, records: list[tuple[int, list[Example]]], tokens: list[Tokenized]) -> dict[str, Any]:
    """A shard's columns."""
    examples = [example for _, found in records for example in found]
    keys = {id(one.prompt): content_key(one.prompt) for one in tokens}  # the examples of a prompt share its list
    return {
        "prompt_ids": _lists([one.prompt for one in tokens]),
        "response_ids": _lists([one.response for one in tokens]),
        "file": np.full(len(tokens), file, np.int32),
        "position": np.repeat([p for p, _ in records], [len(found) for _, found in records]).astype(np.int64),
        "prompt_length": [len(one.prompt) for one in tokens],
        "response_length": [len(one.response) for one in tokens],
        "prompt_cut": [one.prompt_cut for one in tokens],
        "response_cut": [one.response_cut for one in tokens],
        "aligned": [example.aligned for example in examples],
        "harmful": [-1 if example.harmful is None else int(example.harmful) for example in examples],
        "pair": [-1 if example.pair is None else _number(example.pair) for example in examples],
        "spelling": [SPELLINGS.index(example.spelling) for example in examples],
        "prompt_text": [_text_key(example.prompt) for example in examples],
        "prompt_key": [keys[id(one.prompt)] for one in tokens],
        "response_key": [content_key(one.response) for one in tokens],
    }


def _lists(ids: list[list[int]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    values = np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, values)


def _number(name: str) -> int:
    """A pair's name as a number that is not negative."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def _text_key(prompt: Any) -> bytes:
    """Digest of a prompt's text: the same whatever the tokenizer, so that splits are."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
