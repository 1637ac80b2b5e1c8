"""The reference store: log-probs of reference models, cached by content.

An entry's key is the model (weights, config, precision, quantization), the weights of positions where ``loss.position``
sets some, and the token ids of one example. Template and lengths need no place in the key, since they determine the
ids. Nothing else is part of it: all epochs, trials, losses and learning rates share the entries, and a changed weight
or token never hits a stale entry. Where ``loss.position`` is a rule by token, entries also have the log-prob of each
token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydiv.data.tokens import TokenValues
from raydiv.losses.position import PositionRule
from raydiv.model.load import ModelSource
from raydiv.utils.cache import digest, shared_dir
from raydiv.utils.storage import open_input

VERSION = 2
"""Version of the key's definition; part of every key."""


class ReferenceStore:
    """Log-probs of one model: Parquet parts in a folder that all nodes reach. A part is written whole or not at all."""

    def __init__(
        self,
        model_fingerprint: str,
        precision: str,
        quantization: str | None = None,
        position: PositionRule | None = None,
    ) -> None:
        # later settings are absent at their defaults, so that earlier entries keep their keys
        later = (quantization, None if position is None else position.store_key)
        settings = (precision, *(setting for setting in later if setting is not None))
        self._folder = shared_dir("reference", digest(VERSION, model_fingerprint, *settings))

    @classmethod
    def of(cls, model: ModelSource, position: PositionRule | None = None) -> ReferenceStore:
        """The store of a model's log-probs, of which tokens count as ``position`` says."""
        return cls(model.fingerprint(), model.precision, model.quantization, position)

    def look_up(self, keys: pa.Array) -> np.ndarray:
        """Log-probs [n] of ``keys`` (see StoredExamples.keys), NaN where the store has none."""
        logps = np.full(len(keys), np.nan, np.float32)
        for rows, found in self._entries(keys, "logp"):
            logps[rows] = found.to_numpy()
        return logps

    def look_up_tokens(self, keys: pa.Array, lengths: np.ndarray) -> TokenValues:
        """Log-probs of the response tokens of ``keys``, of which each has as many as ``lengths`` [n] says.

        Raises KeyError where the store lacks one. A part is read at a time.
        """
        starts = np.append(0, np.cumsum(lengths, dtype=np.int64))
        values, found = np.empty(starts[-1], np.float32), np.zeros(len(keys), bool)
        for rows, lists in self._entries(keys, "tokens"):
            found[rows] = True
            for row, tokens in zip(rows.tolist(), np.split(lists.flatten(), lists.offsets[1:-1]), strict=True):
                values[starts[row] : starts[row + 1]] = tokens
        if not found.all():
            raise KeyError(f"the reference store lacks the tokens of {int((~found).sum())} examples")
        return TokenValues(values, starts)

    def _entries(self, keys: pa.Array, column: str) -> Iterator[tuple[np.ndarray, pa.Array]]:
        """Of each part: which rows of ``keys`` it has, and the column's values of these."""
        for name in self._folder.file_names(".parquet"):
            part = pq.read_table(open_input(self._folder.uri_of(name)), columns=["key", column]).combine_chunks()
            places = pc.index_in(keys, value_set=part["key"])
            rows = np.flatnonzero(places.is_valid())
            if len(rows):
                yield rows, part[column].take(places.drop_null()).combine_chunks()

    def has(self, part: str) -> bool:
        return self._folder.has(f"{part}.parquet")

    def add(
        self, part: str, keys: pa.Array, logps: Sequence[float], tokens: Sequence[np.ndarray] | None = None
    ) -> None:
        """Store the entries as ``part``, with the log-probs of their ``tokens``. If the part exists, it stays, and the
        entries get another file.
        """
        columns = {"key": keys, "logp": pa.array(logps, pa.float32())}
        if tokens is not None:
            columns["tokens"] = pa.array(tokens, pa.large_list(pa.float32()))
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), buffer, use_dictionary=False)
        name = f"{part}.{digest(keys.to_pylist())}" if self.has(part) else part
        self._folder.write(f"{name}.parquet", buffer.getvalue())
