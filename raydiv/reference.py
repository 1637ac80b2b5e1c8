"""The reference, paid once: log-probs kept by content, and the pool of models that finds what is missing.

An entry is known by the model (weights, config, precision) and by the token ids of one example, which template and lengths
have already gone into. Nothing else is in the key, so every epoch, trial, loss and learning rate shares the entries, and a
changed weight or token cannot hit a stale one.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.cache import atomic, cache_dir, digest
from raydiv.config import Recipe
from raydiv.config.recipe import Cluster
from raydiv.data.plan import micro_batches
from raydiv.data.tokens import TokenizedExamples
from raydiv.model.collate import Ids, collate
from raydiv.model.files import fingerprint
from raydiv.model.head import LogProbHead
from raydiv.model.load import ModelSource
from raydiv.pool import Progress, map_rows, unwatched


class ReferenceStore:
    """Log-probs of one model, as Parquet parts in a folder; each part is written whole or not at all."""

    def __init__(self, model_fingerprint: str, precision: str) -> None:
        self._folder = cache_dir("reference", digest(model_fingerprint, precision))

    def read(self) -> dict[str, float]:
        """Every entry: example key -> log-prob."""
        entries: dict[str, float] = {}
        for part in sorted(self._folder.glob("*.parquet")):
            table = pq.read_table(part)
            entries.update(zip(table["key"].to_pylist(), table["logp"].to_pylist(), strict=True))
        return entries

    def add(self, entries: dict[str, float]) -> None:
        table = pa.table({"key": list(entries), "logp": pa.array(entries.values(), pa.float32())})
        with atomic(self._folder / f"{uuid.uuid4().hex}.parquet") as temporary:
            pq.write_table(table, temporary)


@dataclass(frozen=True, slots=True)
class Lookup:
    """``logps[i]`` [n_i] of the i-th set of examples, fp32; how many distinct examples were found and how many scored."""

    logps: list[np.ndarray]
    hits: int
    misses: int


def reference_logps(
    recipe: Recipe, directory: Path, sets: Sequence[TokenizedExamples], progress: Progress = unwatched
) -> Lookup:
    """Reference log-probs of all examples of ``sets``, from the store where it has them, else from a pool of models."""
    store = ReferenceStore(fingerprint(directory), recipe.engine.precision)
    known = store.read()
    wanted = {key: examples[row] for examples in sets for row, key in enumerate(examples.keys)}
    missing = {key: ids for key, ids in wanted.items() if key not in known}
    if missing:
        scored = score(ModelSource.of(recipe, directory), list(missing.values()), recipe.cluster, progress)
        fresh = dict(zip(missing, scored, strict=True))
        store.add(fresh)
        known |= fresh
    logps = [np.array([known[key] for key in examples.keys], dtype=np.float32) for examples in sets]
    return Lookup(logps, len(wanted) - len(missing), len(missing))


def score(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: Cluster,
    progress: Progress = unwatched,
) -> list[float]:
    """Log-probs of the (prompt ids, response ids) examples, summed over response tokens, by a Ray Data pool of models."""
    rows = [{"prompt": list(prompt), "response": list(response)} for prompt, response in examples]
    scored = map_rows(
        rows,
        LogProbScorer,
        {"model": model},
        cluster=cluster,
        batch_rows=64,
        progress=progress,
        length=lambda row: len(row["prompt"]) + len(row["response"]),
    )
    return [float(result["logp"]) for result in scored]


TOKENS_PER_FORWARD = 4096
"""Padded tokens that a scoring model takes at once; changes its speed and memory alone."""


class LogProbScorer:
    """A model that scores tokenised examples."""

    def __init__(self, model: ModelSource) -> None:
        self._model = model.serve()
        self._head = LogProbHead(self._model)
        self._head.check(self._model, self._model.device)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with ``prompt`` and ``response`` ids -> rows with ``logp``."""
        import torch

        lengths = [len(row["prompt"]) + len(row["response"]) for row in rows]
        logps = torch.zeros(len(rows))
        for micro_batch in micro_batches(lengths, TOKENS_PER_FORWARD, ranks=1)[0]:
            inputs = collate([(rows[i]["prompt"], rows[i]["response"]) for i in micro_batch]).to(self._model.device)
            with torch.inference_mode():
                self._head.aim(inputs.rows, inputs.columns, inputs.targets)
                output = self._model(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False)
                logps[micro_batch] = inputs.per_example(output.logits, len(micro_batch)).cpu()
        return [{"logp": float(logp)} for logp in logps]
