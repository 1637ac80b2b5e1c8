"""The reference store: log-probs of reference models, cached by content.

An entry's key is the model (weights, config, precision, quantization), the weights of positions where ``loss.position``
sets some, and the token ids of one example. Template and lengths need no place in the key, since they determine the
ids. Nothing else is part of it: all epochs, trials, losses and learning rates share the entries, and a changed weight
or token never hits a stale entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydiv.losses.position import PositionWeights
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
        position: PositionWeights | None = None,
    ) -> None:
        # later settings are absent at their defaults, so that earlier entries keep their keys
        settings = (precision, *(str(setting) for setting in (quantization, position) if setting is not None))
        self._folder = shared_dir("reference", digest(VERSION, model_fingerprint, *settings))

    @classmethod
    def of(cls, model: ModelSource, position: PositionWeights | None = None) -> ReferenceStore:
        """The store of a model's log-probs under weights of positions."""
        return cls(model.fingerprint(), model.precision, model.quantization, position)

    def look_up(self, keys: pa.Array) -> np.ndarray:
        """Log-probs [n] of ``keys`` (see StoredExamples.keys), NaN where the store has none."""
        parts = [pq.read_table(open_input(self._folder.uri_of(name))) for name in self._folder.file_names(".parquet")]
        if not parts:
            return np.full(len(keys), np.nan, np.float32)
        entries = pa.concat_tables(parts).combine_chunks()
        rows = pc.index_in(keys, value_set=entries["key"])
        logps: np.ndarray = entries["logp"].take(rows).to_numpy()
        return logps.astype(np.float32)

    def has(self, part: str) -> bool:
        return self._folder.has(f"{part}.parquet")

    def add(self, part: str, keys: pa.Array, logps: Sequence[float]) -> None:
        """Store the entries as ``part``. If the part exists, it stays, and the entries get another file."""
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": keys, "logp": pa.array(logps, pa.float32())}), buffer, use_dictionary=False)
        name = f"{part}.{digest(keys.to_pylist())}" if self.has(part) else part
        self._folder.write(f"{name}.parquet", buffer.getvalue())
