"""Tokenised examples: all of a set on storage, with labels and lengths in memory; and those of one step in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.losses.position import PositionRule, PositionWeights, RewardWeights, TokenConstraint
from raydiv.model.chat import Ids
from raydiv.utils.storage import open_input

ROW_GROUP_SIZE = 128
"""Rows of a Parquet row group: the minimum that is read for one example."""

KEY = np.dtype("S16")
"""A digest of token ids or of a text: 128 bits."""


def content_key(ids: Ids) -> bytes:
    """Digest of token ids."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def content_keys(examples: Sequence[tuple[Ids, Ids]]) -> pa.FixedSizeBinaryArray:
    """Keys of (prompt ids, response ids) examples, as in StoredExamples.keys."""
    prompts, responses = (np.array([content_key(example[side]) for example in examples], KEY) for side in (0, 1))
    return _join_keys(prompts, responses, np.array([len(response) for _, response in examples], np.int32))


def _join_keys(prompts: np.ndarray, responses: np.ndarray, *lengths: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Keys [n]: the digests of prompt and response ids, and 4 bytes for each of ``lengths``, such as the number of
    scored response tokens.
    """
    count, columns = len(prompts), (prompts, responses, *(numbers.astype("<i4") for numbers in lengths))
    parts = [np.frombuffer(column.tobytes(), np.uint8).reshape(count, column.itemsize) for column in columns]
    joined = np.ascontiguousarray(np.concatenate(parts, axis=1)) if count else np.zeros(0, np.uint8)
    width = sum(column.itemsize for column in columns)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, pa.py_buffer(joined)])


def _lengths_of_shorter(lengths: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The smaller of the ``lengths`` [n] of an example and its partner; its own without a partner."""
    shorter = lengths.copy()
    shorter[pairs] = lengths[pairs].min(axis=1, keepdims=True)
    return shorter


def _complete_pairs(pair: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """[p, 2] rows of each complete pair's aligned and unaligned example, in order of first appearance."""
    order = np.argsort(pair, kind="stable")
    first, second = order[:-1], order[1:]
    complete = (pair[first] == pair[second]) & (pair[first] >= 0) & (aligned[first] != aligned[second])
    first, second = first[complete], second[complete]
    pairs = np.where(aligned[first][:, None], np.stack([first, second], 1), np.stack([second, first], 1))
    return np.ascontiguousarray(pairs[np.argsort(first)], dtype=np.int64)


def _weights(
    position: PositionRule | None, lengths: np.ndarray, shorter: np.ndarray, rows: Sequence[int] | np.ndarray
) -> list[np.ndarray] | None:
    if not isinstance(position, PositionWeights):
        return None
    return [position.of(int(lengths[row]), int(shorter[row])) for row in rows]


@dataclass(frozen=True)
class TokenValues:
    """A value of each response token of n examples: ``values`` [t], of which example i has those from ``starts[i]`` to
    ``starts[i + 1]``.
    """

    values: np.ndarray
    starts: np.ndarray

    def spread(self, rows: np.ndarray, count: int) -> TokenValues:
        """The values of ``count`` examples, of which those at ``rows``, ascending, have these and the others none."""
        lengths = np.zeros(count, np.int64)
        lengths[rows] = np.diff(self.starts)
        return TokenValues(self.values, np.append(0, np.cumsum(lengths)))

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """The sum of the values of each of the examples at ``rows``, fp32."""
        return np.array([values.sum(dtype=np.float64) for values in self.at(rows)], np.float32)

    def at(self, rows: np.ndarray) -> list[np.ndarray]:
        """The values of the examples at ``rows``."""
        return [self.values[self.starts[row] : self.starts[row + 1]] for row in rows.tolist()]


@dataclass(frozen=True)
class TokenizedExamples:
    """n examples of a step in memory, in example order: lengths and labels of all, token ids of this rank's examples.

    ``prompt_ids`` and ``response_ids`` hold int arrays, or None for another rank's examples. The model's input is the
    prompt followed by the response, which ends in EOS unless it was truncated. ``pair`` [n] is a number that the two
    examples of a pair share, or -1 for no pair. ``shorter_lengths`` [n] are the response tokens of the shorter response
    of each example's pair in the whole set, whether the step has both or not; its own without a pair.
    ``token_values`` has what ``loss.position`` takes of the response tokens, like the ids of this rank's examples
    alone: the reference's log-probs for a TokenConstraint, weights for RewardWeights; ``weight_sums`` [n] their sums
    over the tokens of all examples, which RewardWeights takes.
    """

    prompt_ids: Sequence[np.ndarray | None]
    response_ids: Sequence[np.ndarray | None]
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    aligned: np.ndarray
    pair: np.ndarray
    shorter_lengths: np.ndarray
    token_values: Sequence[np.ndarray | None] = ()
    weight_sums: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response ids of one example. Raises LookupError for another rank's example."""
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
        return _complete_pairs(self.pair, self.aligned)

    def weights(self, position: PositionRule | None, rows: Sequence[int]) -> list[np.ndarray] | None:
        """Weights of the response tokens of the examples at ``rows``; None where all are 1.

        Raises LookupError for another rank's example under RewardWeights.
        """
        if isinstance(position, RewardWeights):
            return [self._values_of(row) for row in rows]
        return _weights(position, self.response_lengths, self.shorter_lengths, rows)

    def token_counts(self, position: PositionRule | None) -> np.ndarray:
        """The number of response tokens [n] of each example, or the sum of their weights."""
        if isinstance(position, RewardWeights):
            assert self.weight_sums is not None, "a step under RewardWeights has the sums of its weights"
            return self.weight_sums
        weights = self.weights(position, range(len(self)))
        if weights is None:
            return self.response_lengths.astype(np.int64)
        return np.array([of_example.sum() for of_example in weights], np.float32)

    def constraint(self, position: PositionRule | None, rows: Sequence[int]) -> list[np.ndarray] | None:
        """[2, t] for each example at ``rows``: the betas of its response tokens, and the reference's log-probs of
        them; None where they are not constrained.

        Raises LookupError for another rank's example.
        """
        if not isinstance(position, TokenConstraint):
            return None
        constraints = []
        for row in rows:
            logps = self._values_of(row)
            constraints.append(np.stack([position.of(len(logps)), logps]))
        return constraints

    def _values_of(self, row: int) -> np.ndarray:
        values = self.token_values[row]
        if values is None:
            raise LookupError(f"example {row} of the step is another rank's")
        return values

    @cached_property
    def units(self) -> list[list[int]]:
        """The rows of each complete pair, and each other row alone."""
        paired = self.pairs.tolist()
        single = set(range(len(self))) - {row for rows in paired for row in rows}
        return sorted([*paired, *([row] for row in single)])

    def with_ids(
        self,
        positions: Sequence[int],
        ids: Sequence[tuple[np.ndarray, np.ndarray]],
        token_values: Sequence[np.ndarray] = (),
    ) -> TokenizedExamples:
        """The same examples, those at ``positions`` with their token ids and ``token_values``."""
        prompts, responses = list(self.prompt_ids), list(self.response_ids)
        for position, (prompt, response) in zip(positions, ids, strict=True):
            prompts[position], responses[position] = prompt, response
        of_rows: list[np.ndarray | None] = []
        if token_values:
            of_rows = [None] * len(self)
            for position, values in zip(positions, token_values, strict=True):
                of_rows[position] = values
        return replace(self, prompt_ids=prompts, response_ids=responses, token_values=of_rows)

    @classmethod
    def from_ids(
        cls, ids: Sequence[tuple[Ids, Ids]], aligned: Sequence[bool], pair: Sequence[int]
    ) -> TokenizedExamples:
        """From (prompt ids, response ids) and labels of a whole set."""
        prompts = [np.asarray(prompt, dtype=np.int64) for prompt, _ in ids]
        responses = [np.asarray(response, dtype=np.int64) for _, response in ids]
        prompt_lengths, lengths = (
            np.array([len(one) for one in sequences], dtype=np.int32) for sequences in (prompts, responses)
        )
        labels, pairs = np.array(aligned, dtype=bool), np.array(pair, dtype=np.int64)
        shorter = _lengths_of_shorter(lengths, _complete_pairs(pairs, labels))
        return cls(prompts, responses, prompt_lengths, lengths, labels, pairs, shorter)


@dataclass(frozen=True)
class TokenShards:
    """Prepared Parquet files as one table with consecutive row numbers.

    ``uris`` [s] of the files; ``starts`` [s + 1]: the number of each file's first row, and the number of all rows.
    """

    uris: tuple[str, ...]
    starts: np.ndarray

    def __add__(self, other: TokenShards) -> TokenShards:
        return TokenShards(self.uris + other.uris, np.append(self.starts, self.starts[-1] + other.starts[1:]))

    def read(self, column: str, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids (``prompt_ids`` or ``response_ids``) of ``rows``, each row group read once."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        groups, offsets = np.divmod(rows - self.starts[shards], ROW_GROUP_SIZE)
        ids: list[Any] = [None] * len(rows)
        loaded: tuple[int, int] | None = None
        for position in np.lexsort((groups, shards)).tolist():
            group = (int(shards[position]), int(groups[position]))
            if group != loaded:
                bounds, values = _list_column(self.uris[group[0]], group[1], column)
                loaded = group
            offset = int(offsets[position])
            ids[position] = values[bounds[offset] : bounds[offset + 1]].astype(np.int64)
        return ids

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The number of the source's file that each of ``rows`` came from, and the position in that file."""
        places = []
        for row in np.asarray(rows).tolist():
            shard = int(np.searchsorted(self.starts, row, side="right")) - 1
            group, offset = divmod(row - int(self.starts[shard]), ROW_GROUP_SIZE)
            file = _parquet_file(self.uris[shard])
            table = file.read_row_group(group, columns=["file", "position"], use_threads=False)
            places.append((table["file"][offset].as_py(), table["position"][offset].as_py()))
        return places


@lru_cache(maxsize=256)
def _parquet_file(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_input(uri))


def _list_column(uri: str, group: int, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists in one row group."""
    table = _parquet_file(uri).read_row_group(group, columns=[column], use_threads=False)
    lists = table[column].combine_chunks()
    return lists.offsets.to_numpy(), lists.values.to_numpy()


@dataclass(frozen=True)
class StoredExamples:
    """n examples in a fixed order: lengths and labels in memory (about 70 bytes each), token ids on storage.

    ``prompt_rows`` and ``response_rows`` [n] are the rows of ``shards`` that hold the ids; they differ for mismatched
    examples alone. A response is the first ``response_lengths`` of the stored tokens. ``prompt_keys`` and
    ``response_keys`` [n] are digests of the stored ids; ``pair`` [n] as in TokenizedExamples; ``source`` [n] is the
    number of the source.
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
        return replace(self, **{name: getattr(self, name)[rows] for name in _COLUMNS})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [n] of each example, prompt and response."""
        lengths: np.ndarray = self.prompt_lengths + self.response_lengths
        return lengths

    @cached_property
    def keys(self) -> pa.FixedSizeBinaryArray:
        """Keys [n] of 36 bytes: the digests of the ids, and the number of response tokens that are scored."""
        return _join_keys(self.prompt_keys, self.response_keys, self.response_lengths)

    def keys_under(self, position: PositionRule | None) -> pa.FixedSizeBinaryArray:
        """``keys``, of 40 bytes where weights of positions depend on the pair."""
        if position is None or not position.depends_on_pair:
            return self.keys
        return _join_keys(self.prompt_keys, self.response_keys, self.response_lengths, self._shorter_lengths)

    def weights(self, position: PositionRule | None, rows: np.ndarray) -> list[np.ndarray] | None:
        """As in TokenizedExamples."""
        return _weights(position, self.response_lengths, self._shorter_lengths, rows)

    @cached_property
    def _pairs(self) -> np.ndarray:
        return _complete_pairs(self.pair, self.aligned)

    @cached_property
    def _shorter_lengths(self) -> np.ndarray:
        return _lengths_of_shorter(self.response_lengths, self._pairs)

    @cached_property
    def units(self) -> np.ndarray:
        """The units that are shuffled, [u, 2], by first row: the rows of a complete pair, or a single row and -1."""
        pairs = self._pairs
        single = np.setdiff1d(np.arange(len(self)), pairs, assume_unique=True)
        units = np.concatenate([pairs, np.stack([single, np.full(len(single), -1)], 1)])
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
        """Number of the source, number of its file and position in that file (see OpenSource.where) of ``rows``."""
        places = self.shards.places(self.prompt_rows[rows])
        return [(source, *place) for source, place in zip(self.source[rows].tolist(), places, strict=True)]

    def without_ids(self, rows: np.ndarray, pair: np.ndarray) -> TokenizedExamples:
        """The examples at ``rows`` with the pair numbers ``pair``; their token ids are not read."""
        no_ids = [None] * len(rows)
        lengths = (self.prompt_lengths[rows], self.response_lengths[rows])
        return TokenizedExamples(no_ids, no_ids, *lengths, self.aligned[rows], pair, self._shorter_lengths[rows])


_COLUMNS = [name for name in StoredExamples.__dataclass_fields__ if name != "shards"]


def mismatched(examples: StoredExamples, max_length: int) -> StoredExamples:
    """Each example's prompt with the response of an example of another prompt: KTO's mismatched examples.

    The result is a fixed derangement, a function of the examples alone. Row i has the prompt of row i of ``examples``;
    responses are truncated to ``max_length``.

    Raises ValueError if one prompt has more than half of the examples, since then no derangement exists.
    """
    _, prompts, counts = np.unique(examples.prompt_keys, return_inverse=True, return_counts=True)
    largest = int(counts.max(initial=0))
    if 2 * largest > len(examples):
        raise ValueError(
            f"one prompt has {largest} of {len(examples)} examples: other prompts have too few responses for it"
        )
    order = np.lexsort((np.arange(len(examples)), examples.response_keys, prompts))
    donor = np.empty(len(examples), dtype=np.int64)
    donor[order] = np.roll(order, -largest)
    max_response_lengths = max_length - examples.prompt_lengths
    return replace(
        examples,
        response_rows=examples.response_rows[donor],
        response_lengths=np.minimum(examples.response_lengths[donor], max_response_lengths).astype(np.int32),
        response_keys=examples.response_keys[donor],
        aligned=np.zeros(len(examples), dtype=bool),
        pair=np.full(len(examples), -1, dtype=np.int64),
    )
