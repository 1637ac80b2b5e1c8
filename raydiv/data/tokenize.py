"""Prepare: a source's records -> examples -> token ids, by a Ray Data pipeline; stored as Parquet, keyed by content.

Tasks read chunks of records. A pool of tokenizers turns each chunk into one Parquet file, its shard. The driver
receives the index of each shard (lengths, labels and digests), and writes one more Parquet file, the source's index,
after the last shard.
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
from raydiv.data.fields import SPELLINGS, BadRow
from raydiv.data.formats import FORMATS, ConvertedRecord, Example, RecordReader
from raydiv.data.index import INDEX_COLUMNS, SCHEMA, Index, IndexWriter, OpenSource, RowNotes, are_small, read_index
from raydiv.data.notes import Note
from raydiv.data.readers import FileChunk, RawRecord, file_chunks, parse_record, read_chunk
from raydiv.data.sources import require_unchanged
from raydiv.data.tokens import ROW_GROUP_SIZE, content_key
from raydiv.model.chat import Chat, ChatPrompt, Response, TokenizedExample, prompt_key, without_beginning
from raydiv.runtime.row_stream import map_stream
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress
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
    """The index of each source; tokenises the sources that are not prepared yet. Needs a Ray session if they are large.

    An interrupted call resumes where it stopped: existing shards are reused. Raises UserError at the first bad row,
    unless ``quarantine`` leaves bad rows out.
    """
    missing = {opened.folder.uri: opened for opened in sources if not opened.ready}
    if missing:
        _write(list(missing.values()), chat, cluster, quarantine, progress)
    indices = [read_index(opened) for opened in sources]
    for index in indices:
        if index.bad and not quarantine:
            raise _bad_rows_error(index.opened, index.bad)
    return indices


def _bad_rows_error(opened: OpenSource, bad: RowNotes) -> UserError:
    first = next(bad.as_json())
    others = len(bad) - 1
    more = f" (and {others} more bad row{'' if others == 1 else 's'})" if others else ""
    return UserError(
        f"{first['file']}:{first['line']}: {first['reason']}{more}; raydiv data check {opened.source.path} lists every "
        "bad row, data.on_bad_row=quarantine leaves them out"
    )


@dataclass(frozen=True, slots=True)
class RecordChunk:
    """Records of one file of one source, which become one shard: ``name``."""

    source: int
    file: int
    name: str
    records: list[RawRecord]


def record_chunks(sources: Sequence[OpenSource]) -> list[Callable[[], Iterator[RecordChunk]]]:
    """Readers of the record chunks of all sources, source by source: one reader per file chunk."""
    return [
        partial(_record_chunks, source, file, number, chunk)
        for source, opened in enumerate(sources)
        for file, content in enumerate(opened.files)
        for number, chunk in enumerate(file_chunks(content))
    ]


def _record_chunks(source: int, file: int, number: int, file_chunk: FileChunk) -> Iterator[RecordChunk]:
    """The record chunks of a file chunk, in order. Their names sort by file, file chunk and position in it."""
    records = read_chunk(file_chunk)
    for position in itertools.count():
        chunk = list(itertools.islice(records, CHUNK_RECORDS))
        require_unchanged(file_chunk.file)  # shards are keyed by the content that the file had
        if not chunk:
            return
        yield RecordChunk(source, file, f"{file:05}-{number:06}-{position:06}.parquet", chunk)


def _write(
    sources: Sequence[OpenSource], chat: Chat, cluster: ClusterConfig, quarantine: bool, progress: Progress
) -> None:
    """Tokenise the sources in one pass through one pool; writes each source's index after its last shard."""
    readers = record_chunks(sources)
    arguments = {"chat": chat, "targets": [(opened.folder, opened.reader, opened.lengths) for opened in sources]}
    if readers:
        with closing(map_stream(readers, Tokenizer, arguments, cluster=cluster, here=are_small(sources))) as shards:
            _write_indices(sources, shards, quarantine, progress)
    for opened in sources:
        if not opened.ready:
            raise UserError(f"{opened.source.path}: holds no examples")


def _write_indices(
    sources: Sequence[OpenSource], shards: Iterator[TokenShard], quarantine: bool, progress: Progress
) -> None:
    """Write the index of each source from its shards, which arrive source by source."""
    rows = 0
    for number, source_shards in itertools.groupby(shards, key=lambda shard: shard.source):
        with IndexWriter(sources[number]) as index:
            for shard in source_shards:
                bad = [(shard.file, position, reason) for position, reason in shard.bad]
                if bad and not quarantine:
                    raise _bad_rows_error(sources[number], RowNotes.locate(sources[number].files, bad))
                index.add(shard.name, shard.table, bad, shard.unread)
                rows += len(shard.table)
                progress(rows, None)


@dataclass(frozen=True, slots=True)
class TokenShard:
    """A written shard as the driver receives it: INDEX_COLUMNS, positions and reasons of bad rows, unread columns."""

    source: int
    file: int
    name: str
    table: pa.Table
    bad: list[tuple[int, str]]
    unread: list[str]


Records = list[tuple[int, ConvertedRecord]]
"""Positions of records, and their content."""


class Tokenizer:
    """A pool's actor: writes chunks of records as shards.

    ``targets``: for each source its folder, its reader, and the maximum lengths of prompt and example. The chat is
    passed ready-made, since detecting a directory's tokenizer takes longer than tokenising a thousand examples.
    """

    def __init__(self, chat: Chat, targets: Sequence[tuple[Folder, RecordReader, tuple[int, int]]]) -> None:
        self._chat, self._targets = chat, targets

    def __call__(self, chunks: list[RecordChunk]) -> list[TokenShard]:
        return [self._shard(chunk) for chunk in chunks]

    def _shard(self, chunk: RecordChunk) -> TokenShard:
        folder = self._targets[chunk.source][0]
        if folder.has(chunk.name):
            table = pq.read_table(open_input(folder.uri_of(chunk.name)), columns=INDEX_COLUMNS)
        else:
            shard = self._table(chunk)
            buffer = pa.BufferOutputStream()
            pq.write_table(shard, buffer, row_group_size=ROW_GROUP_SIZE, compression="lz4", use_dictionary=False)
            folder.write(chunk.name, buffer.getvalue())
            table = shard.select(INDEX_COLUMNS)
        told = json.loads(table.schema.metadata[b"raydiv"])
        bad = [(int(position), reason) for position, reason in told["bad"]]
        return TokenShard(chunk.source, chunk.file, chunk.name, table.replace_schema_metadata(), bad, told["unread"])

    def _table(self, chunk: RecordChunk) -> pa.Table:
        _, reader, lengths = self._targets[chunk.source]
        records: Records = []
        bad: list[tuple[int, str]] = []
        for position, content in chunk.records:
            try:
                records.append((position, reader.convert(parse_record(content), f"@{chunk.file}:{position}")))
            except BadRow as error:
                bad.append((position, str(error)))
        try:
            tokens = self._tokens(records, lengths)
        except ValueError:  # the template fails on one of the prompts: find out on which
            records, bad = self._without_failing(records, bad, lengths)
            tokens = self._tokens(records, lengths)
        unread = sorted({column for _, record in records for column in record.unread})
        metadata = {b"raydiv": json.dumps({"bad": bad, "unread": unread}).encode()}
        notes = _notes(self._chat, [example for _, record in records for example in record.examples], tokens)
        return pa.table(_columns(chunk.file, records, tokens, notes), schema=SCHEMA.with_metadata(metadata))

    def _tokens(self, records: Records, lengths: tuple[int, int]) -> list[TokenizedExample]:
        examples = [example for _, record in records for example in record.examples]
        return self._chat.tokenize([e.prompt for e in examples], [e.response for e in examples], *lengths, trained=True)

    def _without_failing(
        self, records: Records, bad: list[tuple[int, str]], lengths: tuple[int, int]
    ) -> tuple[Records, list[tuple[int, str]]]:
        """The records that the template accepts, and all bad rows."""
        good, bad = [], list(bad)
        for record in records:
            try:
                self._tokens([record], lengths)
                good.append(record)
            except ValueError as error:
                bad.append((record[0], str(error)))
        return good, sorted(bad)


def _notes(chat: Chat, examples: Sequence[Example], tokens: Sequence[TokenizedExample]) -> list[int]:
    """The notes on each example. The examples of a pair are compared if both are in the shard."""
    prompts = {id(example.prompt): example.prompt for example in examples}
    of_prompts = {key: _prompt_notes(chat, prompt) for key, prompt in prompts.items()}
    notes = [
        int(example.notes) | of_prompts[id(example.prompt)] | _response_notes(chat, example.response)
        for example in examples
    ]
    partners: dict[str, int] = {}
    for number, example in enumerate(examples):
        if example.pair is None:
            continue
        other = partners.setdefault(example.pair, number)
        if other != number:
            note = _pair_note(tokens[other], tokens[number])
            notes[other], notes[number] = notes[other] | note, notes[number] | note
    return notes


def _prompt_notes(chat: Chat, prompt: ChatPrompt) -> int:
    """The notes on control tokens of a template in a prompt."""
    if not chat.template.renders:
        return 0
    held = Note.CONTROL_TOKENS if chat.control_tokens_in(prompt) else 0
    return int(held) | int(Note.RENDERED if chat.is_rendered(prompt) else 0)


def _response_notes(chat: Chat, response: Response) -> int:
    """The notes on control tokens of a template in a response."""
    held = chat.control_tokens_in(response) if chat.template.renders else None
    if not held:
        return 0
    return int(Note.CONTROL_TOKENS) | int(Note.END_IN_RESPONSE if held.intersection(chat.ends) else 0)


def _pair_note(first: TokenizedExample, second: TokenizedExample) -> int:
    """How the two responses of a pair are alike, the token that ends each of them aside."""
    whole = not first.response_cut and not second.response_cut
    if first.response == second.response:
        return int(Note.EQUAL_SIDES if whole else Note.EQUAL_WHEN_CUT)
    short, long = sorted((first.response, second.response), key=len)
    begins = whole and long[: len(short) - 1] == short[:-1]
    return int(Note.SIDE_BEGINS_OTHER if begins else 0)


def _columns(file: int, records: Records, tokens: list[TokenizedExample], notes: list[int]) -> dict[str, Any]:
    """A shard's columns (see index.SCHEMA)."""
    examples = [example for _, record in records for example in record.examples]
    origins = [record for _, record in records for _ in record.examples]
    # the examples of one prompt share its list of ids
    prompts = {id(t.prompt): t.prompt for t in tokens}
    prompt_keys = {key: content_key(ids) for key, ids in prompts.items()}
    largest = {key: max(ids, default=0) for key, ids in prompts.items()}
    return {
        "prompt_ids": _list_array([t.prompt for t in tokens]),
        "response_ids": _list_array([t.response for t in tokens]),
        "file": np.full(len(tokens), file, np.int32),
        "position": [position for position, record in records for _ in record.examples],
        "prompt_length": [len(t.prompt) for t in tokens],
        "response_length": [len(t.response) for t in tokens],
        "prompt_cut": [t.prompt_cut for t in tokens],
        "response_cut": [t.response_cut for t in tokens],
        "largest_id": [max(largest[id(t.prompt)], *t.response, 0) for t in tokens],
        "aligned": [example.aligned for example in examples],
        "harmful": [-1 if example.harmful is None else int(example.harmful) for example in examples],
        "pair": [-1 if example.pair is None else _pair_number(example.pair) for example in examples],
        "format": [FORMATS.index(record.format) for record in origins],
        "label_spelling": [SPELLINGS.index(record.label_spelling) for record in origins],
        "harmful_spelling": [SPELLINGS.index(record.harmful_spelling) for record in origins],
        "notes": notes,
        "prompt_text": [_text_key(example.prompt) for example in examples],
        "prompt_key": [prompt_keys[id(t.prompt)] for t in tokens],
        "response_key": [content_key(t.response) for t in tokens],
    }


def _list_array(ids: list[list[int]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    values = np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, values)


def _pair_number(name: str) -> int:
    """A non-negative number from a pair's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def _text_key(prompt: Any) -> bytes:
    """Digest of a prompt's text. It does not depend on the tokenizer, so neither do splits.

    Nor does it depend on a beginning of the answer: all examples of a prompt are on one side of a split.
    """
    return hashlib.blake2b(prompt_key(without_beginning(prompt)).encode(), digest_size=16).digest()
