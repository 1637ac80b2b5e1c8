"""Tokenised examples: on storage, by row, with their labels and lengths at hand; and in memory, those of one step."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.utils.storage import open_input

Ids = Sequence[int] | np.ndarray

GROUP_ROWS = 128
"""Rows of a Parquet row group: the least that reading one example reads."""

KEY = np.dtype("S16")
"""A digest of token ids or of a text: 128 bits."""


def content_key(ids: Ids) -> bytes:
    """Digest of token ids."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def content_keys(examples: Sequence[tuple[Ids, Ids]]) -> pa.FixedSizeBinaryArray:
    """Content of (prompt ids, response ids) examples, as StoredExamples.keys has it."""
    prompts, responses = (np.array([content_key(example[side]) for example in examples], KEY) for side in (0, 1))
    return _joined_keys(prompts, responses, np.array([len(response) for _, response in examples], np.int32))


def _joined_keys(prompts: np.ndarray, responses: np.ndarray, lengths: np.ndarray) -> pa.FixedSizeBinaryArray:
    """[n] of 36 bytes, from the digests of ids and how many tokens of each response are scored."""
    count = len(prompts)
    parts = [
        np.frombuffer(column.tobytes(), np.uint8).reshape(count, column.itemsize)
        for column in (prompts, responses, lengths.astype("<i4"))
    ]
    joined = np.ascontiguousarray(np.concatenate(parts, axis=1)) if count else np.zeros(0, np.uint8)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(36), count, [None, pa.py_buffer(joined)])


@dataclass(frozen=True)
class TokenizedExamples:
    """n examples in memory, in example order: lengths and labels of all of them, token ids of those that are here.

    ``prompt_ids`` and ``response_ids`` hold int arrays, or None where another rank has them; the prompt is a prefix of what
    the model sees, the response ends in EOS unless it was cut. ``pair`` [n] is a number that the two examples of a pair
    share, -1 without.
    """

    prompt_ids: Sequence[np.ndarray | None]
    response_ids: Sequence[np.ndarray | None]
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    aligned: np.ndarray
    pair: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response ids of one example. Raises LookupError where they are not here."""
        prompt, response = self.prompt_ids[row], self.response_ids[row]
        if prompt is None or response is None:
            raise LookupError(f"example {row} of the step is another rank's")
        return prompt, response

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example, prompt and response."""
        lengths: list[int] = (self.prompt_lengths.astype(np.int64) + self.response_lengths).tolist()
        return lengths

    @cached_property
    def pairs(self) -> np.ndarray:
        """[p, 2] rows of each complete pair's aligned and unaligned example, in order of first appearance."""
        partners: dict[int, dict[bool, int]] = defaultdict(dict)
        for row, (pair, aligned) in enumerate(zip(self.pair.tolist(), self.aligned.tolist(), strict=True)):
            if pair >= 0:
                partners[pair][aligned] = row
        complete = [(both[True], both[False]) for both in partners.values() if len(both) == 2]
        return np.array(complete, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def units(self) -> list[list[int]]:
        """The rows of a pair together, every other row alone."""
        paired = self.pairs.tolist()
        alone = set(range(len(self))) - {row for rows in paired for row in rows}
        return sorted([*paired, *([row] for row in alone)])

    def holding(self, positions: Sequence[int], ids: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenizedExamples:
        """The same examples, with the token ids of those at ``positions``."""
        prompts, responses = list(self.prompt_ids), list(self.response_ids)
        for position, (prompt, response) in zip(positions, ids, strict=True):
            prompts[position], responses[position] = prompt, response
        return replace(self, prompt_ids=prompts, response_ids=responses)

    @classmethod
    def from_ids(
        cls, ids: Sequence[tuple[Ids, Ids]], aligned: Sequence[bool], pair: Sequence[int]
    ) -> TokenizedExamples:
        """From (prompt ids, response ids) and labels."""
        prompts = [np.asarray(prompt, dtype=np.int64) for prompt, _ in ids]
        responses = [np.asarray(response, dtype=np.int64) for _, response in ids]
        return cls(
            prompts,
            responses,
            np.array([len(prompt) for prompt in prompts], dtype=np.int32),
            np.array([len(response) for response in responses], dtype=np.int32),
            np.array(aligned, dtype=bool),
            np.array(pair, dtype=np.int64),
        )


@dataclass(frozen=True)
class TokenShards:
    """Prepared Parquet files as one long table; a row is known by its number in it.

    ``uris`` [s], and ``starts`` [s + 1]: the number of each file's first row, then of all rows.
    """

    uris: tuple[str, ...]
    starts: np.ndarray

    def __add__(self, other: TokenShards) -> TokenShards:
        return TokenShards(self.uris + other.uris, np.append(self.starts, self.starts[-1] + other.starts[1:]))

    def read(self, column: str, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids (``prompt_ids`` or ``response_ids``) of ``rows``, each row group read once."""
        rows = np.asarray(rows, dtype=np.int64)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        group, within = np.divmod(rows - self.starts[shard], GROUP_ROWS)
        found: list[Any] = [None] * len(rows)
        order = np.lexsort((group, shard))
        last: tuple[int, int] | None = None
        for place in order.tolist():
            where = (int(shard[place]), int(group[place]))
            if where != last:
                offsets, values = _group(self.uris[where[0]], where[1], column)
                last = where
            at = int(within[place])
            found[place] = values[offsets[at] : offsets[at + 1]].astype(np.int64)
        return found

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The number of the file, and the position in it, that each of ``rows`` came from."""
        found = []
        for row in np.asarray(rows).tolist():
            shard = int(np.searchsorted(self.starts, row, side="right")) - 1
            group, within = divmod(row - int(self.starts[shard]), GROUP_ROWS)
            table = _opened(self.uris[shard]).read_row_group(group, columns=["file", "position"], use_threads=False)
            found.append((table["file"][within].as_py(), table["position"][within].as_py()))
        return found


@lru_cache(maxsize=256)
def _opened(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_input(uri))


def _group(uri: str, group: int, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists in one row group."""
    lists = _opened(uri).read_row_group(group, columns=[column], use_threads=False)[column].combine_chunks()
    return lists.offsets.to_numpy(), lists.values.to_numpy()


@dataclass(frozen=True)
class StoredExamples:
    """n examples of a set, in a fixed order: lengths and labels in memory (some 70 bytes each), token ids on storage.

    ``prompt_rows`` and ``response_rows`` [n] say where in ``shards`` the ids are: the same row, but for mismatched examples.
    The response is the first ``response_lengths`` tokens of what is there. ``prompt_keys`` and ``response_keys`` [n] digest
    the ids on storage; ``pair`` [n] as in TokenizedExamples; ``source`` [n] counts the sources of a mixture.
    """

    shards: TokenShards
    prompt_rows: np.ndarray
    response_rows: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    aligned: np.ndarray
    pair: np.ndarray
    source: np.ndarray
    prompt_keys: np.ndarray
    response_keys: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_rows)

    def select(self, rows: np.ndarray) -> StoredExamples:
        """The examples at ``rows``, in that order."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(self, **columns)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [n] of each example, prompt and response."""
        lengths: np.ndarray = self.prompt_lengths + self.response_lengths
        return lengths

    @cached_property
    def keys(self) -> pa.FixedSizeBinaryArray:
        """Content of each example: the digests of its ids, and how many tokens of the response are scored; [n] of 36 bytes."""
        return _joined_keys(self.prompt_keys, self.response_keys, self.response_lengths)

    @cached_property
    def units(self) -> np.ndarray:
        """What the data order shuffles, [u, 2], by first row: the rows of a complete pair, or a lone row and -1."""
        order = np.argsort(self.pair, kind="stable")
        first = order[:-1][(self.pair[order[:-1]] == self.pair[order[1:]]) & (self.pair[order[:-1]] >= 0)]
        second = order[1:][(self.pair[order[:-1]] == self.pair[order[1:]]) & (self.pair[order[1:]] >= 0)]
        lone = np.ones(len(self), dtype=bool)
        lone[first] = lone[second] = False
        alone = np.flatnonzero(lone)
        pairs = np.where(self.aligned[first][:, None], np.stack([first, second], 1), np.stack([second, first], 1))
        units = np.concatenate([pairs, np.stack([alone, np.full(len(alone), -1)], 1)])
        return np.ascontiguousarray(units[np.argsort(units[:, 0], kind="stable")], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the examples, their labels, sources and order."""
        digest = hashlib.sha256()
        for column in (self.prompt_keys, self.response_keys, self.response_lengths, self.aligned, self.source):
            digest.update(column.tobytes())
        digest.update(self.units.tobytes())
        return digest.hexdigest()[:32]

    def ids(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompt and response ids of the examples at ``rows``, from storage."""
        prompts = self.shards.read("prompt_ids", self.prompt_rows[rows])
        responses = self.shards.read("response_ids", self.response_rows[rows])
        lengths = self.response_lengths[rows].tolist()
        return [(p, r[:n]) for p, r, n in zip(prompts, responses, lengths, strict=True)]

    def places(self, rows: np.ndarray) -> list[tuple[int, int, int]]:
        """The source, the file of it and the position in that (see OpenSource.where) of the examples at ``rows``."""
        found = self.shards.places(self.prompt_rows[rows])
        return [(source, *place) for source, place in zip(self.source[rows].tolist(), found, strict=True)]

    def without_ids(self, rows: np.ndarray, pair: np.ndarray) -> TokenizedExamples:
        """The examples at ``rows`` under the pair numbers ``pair``, their token ids left where they are."""
        nothing = [None] * len(rows)
        lengths = (self.prompt_lengths[rows], self.response_lengths[rows])
        return TokenizedExamples(nothing, nothing, *lengths, self.aligned[rows], pair)


_COLUMNS = [name for name in StoredExamples.__dataclass_fields__ if name != "shards"]


def mismatched(examples: StoredExamples, max_length: int) -> StoredExamples:
    """Each example's prompt with the response of another prompt's example: KTO's fixed derangement.

    A function of the examples alone: never the same prompt, independent of the order of training. Rows correspond to
    ``examples``; responses are cut to ``max_length``.

    Raises ValueError when one prompt has more than half of the examples, since then no derangement exists.
    """
    _, number, counts = np.unique(examples.prompt_keys, return_inverse=True, return_counts=True)
    largest = int(counts.max(initial=0))
    if 2 * largest > len(examples):
        raise ValueError(
            f"one prompt has {largest} of {len(examples)} examples: no mismatched responses are left for it"
        )
    order = np.lexsort((np.arange(len(examples)), examples.response_keys, number))
    donor = np.empty(len(examples), dtype=np.int64)
    donor[order] = np.roll(order, -largest)
    room = max_length - examples.prompt_lengths
    return replace(
        examples,
        response_rows=examples.response_rows[donor],
        response_lengths=np.minimum(examples.response_lengths[donor], room).astype(np.int32),
        response_keys=examples.response_keys[donor],
        aligned=np.zeros(len(examples), dtype=bool),
        pair=np.full(len(examples), -1, dtype=np.int64),
    )
