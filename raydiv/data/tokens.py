"""Tokenised examples: columns of token ids and labels, with pairs found by their ids."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.cache import atomic


@dataclass(frozen=True)
class TokenizedExamples:
    """n examples of a prepared set, in a fixed order.

    ``prompt_ids`` and ``response_ids`` hold int arrays; the prompt is a prefix of what the model sees, the response ends in
    EOS unless it was cut. ``pair`` [n] is a number that the two examples of a pair share, -1 without. ``keys`` [n] digest
    an example's token ids, and nothing else.
    """

    prompt_ids: Sequence[np.ndarray]
    response_ids: Sequence[np.ndarray]
    aligned: np.ndarray
    pair: np.ndarray
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response ids of one example."""
        return self.prompt_ids[row], self.response_ids[row]

    def select(self, rows: Sequence[int] | np.ndarray) -> TokenizedExamples:
        """The examples at ``rows``, in that order."""
        return TokenizedExamples(
            [self.prompt_ids[row] for row in rows],
            [self.response_ids[row] for row in rows],
            self.aligned[rows],
            self.pair[rows],
            [self.keys[row] for row in rows],
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example, prompt and response."""
        return [
            len(prompt) + len(response) for prompt, response in zip(self.prompt_ids, self.response_ids, strict=True)
        ]

    @cached_property
    def response_lengths(self) -> np.ndarray:
        return np.array([len(response) for response in self.response_ids], dtype=np.int64)

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
        """What the data order shuffles: the rows of a pair together, every other row alone."""
        paired = self.pairs.tolist()
        alone = set(range(len(self))) - {row for rows in paired for row in rows}
        return sorted([*paired, *([row] for row in alone)])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the examples, their labels and their order."""
        digest = hashlib.sha256()
        for key, aligned, pair in zip(self.keys, self.aligned.tolist(), self.pair.tolist(), strict=True):
            digest.update(f"{key}/{aligned:d}/{pair}\n".encode())
        return digest.hexdigest()[:32]

    def write(self, path: Path) -> None:
        """Write one Parquet file, atomically."""
        table = pa.table(
            {
                "prompt_ids": pa.array(self.prompt_ids, pa.list_(pa.int32())),
                "response_ids": pa.array(self.response_ids, pa.list_(pa.int32())),
                "aligned": self.aligned,
                "pair": self.pair,
                "key": list(self.keys),
            }
        )

        with atomic(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def read(cls, path: Path) -> TokenizedExamples:
        columns = pq.read_table(path).to_pydict()
        return cls(
            [np.array(ids, dtype=np.int64) for ids in columns["prompt_ids"]],
            [np.array(ids, dtype=np.int64) for ids in columns["response_ids"]],
            np.array(columns["aligned"], dtype=bool),
            np.array(columns["pair"], dtype=np.int64),
            columns["key"],
        )

    @classmethod
    def from_ids(
        cls, ids: Sequence[tuple[Sequence[int], Sequence[int]]], aligned: Sequence[bool], pair: Sequence[int]
    ) -> TokenizedExamples:
        """From (prompt ids, response ids) and labels; computes the keys."""
        return cls(
            [np.asarray(prompt, dtype=np.int64) for prompt, _ in ids],
            [np.asarray(response, dtype=np.int64) for _, response in ids],
            np.array(aligned, dtype=bool),
            np.array(pair, dtype=np.int64),
            [content_key(prompt, response) for prompt, response in ids],
        )


def content_key(prompt: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray) -> str:
    """Digest of one example's token ids: 128 bits, hexadecimal."""
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes())
    digest.update(b"/" + np.asarray(response, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


def mismatched(examples: TokenizedExamples, max_length: int) -> TokenizedExamples:
    """Each example's prompt with the response of another prompt's example: KTO's fixed derangement.

    A function of the examples alone: never the same prompt, independent of the order of training. Rows correspond to
    ``examples``; responses are cut to ``max_length``.

    Raises ValueError when one prompt has more than half of the examples, since then no derangement exists.
    """
    prompts = [content_key(prompt, ()) for prompt in examples.prompt_ids]
    order = sorted(range(len(examples)), key=lambda row: (prompts[row], examples.keys[row], row))
    largest = max(Counter(prompts).values(), default=0)
    if 2 * largest > len(examples):
        raise ValueError(
            f"one prompt has {largest} of {len(examples)} examples: no mismatched responses are left for it"
        )
    donor = dict(zip(order, order[largest:] + order[:largest], strict=True))
    ids = []
    for row, (prompt, _) in enumerate(examples[row] for row in range(len(examples))):
        response = examples.response_ids[donor[row]]
        ids.append((prompt.tolist(), response[: max_length - len(prompt)].tolist()))
    return TokenizedExamples.from_ids(ids, [False] * len(ids), [-1] * len(ids))
