"""Hidden states on disk: a Parquet file with a row per prompt and a column per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.data.prompt_sets import Prompt


class EmbeddingFile:
    """A Parquet file that is written as states arrive. Columns: id, harmful, kind, category, tokens, and layer_K [d]
    for each layer K.
    """

    def __init__(self, path: Path, layers: Sequence[int]) -> None:
        self._path, self._layers = path, layers
        self._writer: pq.ParquetWriter | None = None

    def write(self, prompts: Sequence[Prompt], states: np.ndarray, tokens: Sequence[int]) -> None:
        """Add rows: ``states`` [n, layers, d] in fp32."""
        columns: dict[str, Any] = {
            name: pa.array([getattr(prompt, name) for prompt in prompts], kind)
            for name, kind in (("id", pa.string()), ("harmful", pa.bool_()), ("kind", pa.string()))
        }
        columns["category"] = pa.array([prompt.category for prompt in prompts], pa.string())
        columns["tokens"] = pa.array(tokens, pa.int32())
        for index, layer in enumerate(self._layers):
            flat = pa.array(states[:, index].reshape(-1), pa.float32())
            columns[f"layer_{layer}"] = pa.FixedSizeListArray.from_arrays(flat, states.shape[2])
        rows = pa.table(columns)
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, rows.schema)
        self._writer.write_table(rows)

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
