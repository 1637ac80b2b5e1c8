"""The reference, paid once: log-probs kept by content, and the pool of models that finds what is missing.

An entry is known by the model (weights, config, precision, quantization) and by the token ids of one example, which template
and lengths have already gone into. Nothing else is in the key, so every epoch, trial, loss and learning rate shares the
entries, and a changed weight or token cannot hit a stale one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.data.batching import micro_batches
from raydiv.data.tokens import StoredExamples, content_keys
from raydiv.model.collate import Ids, collate
from raydiv.model.compatibility import CompatibilityCheck
from raydiv.model.head import LogProbHead
from raydiv.model.load import ModelSource
from raydiv.model.packing import Packing, packing_of
from raydiv.model.resolve import fingerprint
from raydiv.runtime.actor_pool import Progress, map_rows, no_progress, stream_through
from raydiv.utils.cache import digest, shared_dir
from raydiv.utils.storage import open_input

VERSION = 2
"""Of what an entry's key is made of."""

UNIT = 1024
"""Most examples of a unit of work, which is one part of the store."""


class ReferenceStore:
    """Log-probs of one model, as Parquet parts in a folder that all nodes reach; each part is written whole or not at all."""

    def __init__(self, model_fingerprint: str, precision: str, quantization: str | None = None) -> None:
        computed = (precision, *([] if quantization is None else [quantization]))
        self._folder = shared_dir("reference", digest(VERSION, model_fingerprint, *computed))

    @classmethod
    def of(cls, model: ModelSource) -> ReferenceStore:
        """A model's store; of adapters their base's weights are in its name too."""
        own, base = fingerprint(model.directory), model.base()
        return cls(own if base is None else digest(own, fingerprint(base)), model.precision, model.quantization)

    def look_up(self, keys: pa.Array) -> np.ndarray:
        """Log-probs [n] of ``keys`` (see StoredExamples.keys), NaN where the store has none."""
        parts = [pq.read_table(open_input(self._folder.at(name))) for name in self._folder.names(".parquet")]
        if not parts:
            return np.full(len(keys), np.nan, np.float32)
        known = pa.concat_tables(parts).combine_chunks()
        found = pc.index_in(keys, value_set=known["key"])
        logps: np.ndarray = known["logp"].take(found).to_numpy()
        return logps.astype(np.float32)

    def has(self, part: str) -> bool:
        return self._folder.has(f"{part}.parquet")

    def add(self, part: str, keys: pa.Array, logps: Sequence[float]) -> None:
        """Keep the entries as ``part``, beside what it holds already."""
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": keys, "logp": pa.array(logps, pa.float32())}), buffer, use_dictionary=False)
        name = f"{part}.{digest(keys.to_pylist())}" if self.has(part) else part
        self._folder.write(f"{name}.parquet", buffer.getvalue())


@dataclass(frozen=True, slots=True)
class Lookup:
    """``logps[i]`` [n_i] of the i-th set of examples, fp32; how many distinct examples were found and how many scored."""

    logps: list[np.ndarray]
    hits: int
    misses: int


def reference_logps(
    recipe: Recipe, directory: Path, sets: Sequence[StoredExamples], progress: Progress = no_progress
) -> Lookup:
    """Reference log-probs of all examples of ``sets``, from the store where it has them, else from a pool of models.

    Each unit of work is kept as soon as it is done: an interrupted pass goes on where it stopped, and of two at once each
    finds the other's units done.
    """
    store = ReferenceStore.of(ModelSource.of(recipe, directory))
    keys = pa.concat_arrays([examples.keys for examples in sets])
    logps = store.look_up(keys)
    _, first = np.unique(keys.dictionary_encode().indices.to_numpy(), return_index=True)
    missing = int(np.isnan(logps[first]).sum())
    scored = 0
    if missing:
        for done in _fill(store, recipe, directory, sets, first, np.isnan(logps)):
            scored += done
            progress(scored, missing)
        logps = store.look_up(keys)
        if np.isnan(logps).any():
            raise RuntimeError(
                f"the reference store lacks {int(np.isnan(logps).sum())} log-probs that were just scored"
            )
    ends = np.cumsum([len(examples) for examples in sets])[:-1]
    return Lookup(np.split(logps, ends), len(first) - scored, scored)


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """Examples that are scored together and make the part ``name`` of the store: ``rows`` [m] of set ``sets`` [m]."""

    name: str
    sets: np.ndarray
    rows: np.ndarray


def _fill(
    store: ReferenceStore,
    recipe: Recipe,
    directory: Path,
    sets: Sequence[StoredExamples],
    wanted: np.ndarray,
    missing: np.ndarray,
) -> Iterator[int]:
    """Score what is ``missing`` [n] among the ``wanted``; the numbers done, unit by unit."""
    import ray

    units = _units(sets, wanted, missing, int(ray.cluster_resources().get("CPU", 1)))
    # another process may be at the same units: begin elsewhere, and find its own done
    random.shuffle(units)
    arguments = {"model": ModelSource.of(recipe, directory), "store": store, "sets": ray.put(list(sets))}
    makers = [partial(iter, units)]
    yield from stream_through(makers, StoreFiller, arguments, cluster=recipe.cluster, actors=len(units))


def _units(sets: Sequence[StoredExamples], wanted: np.ndarray, missing: np.ndarray, workers: int) -> list[ScoringTask]:
    """Units of similar lengths. They are cut from all that is wanted, missing or not, so that a process that starts later
    cuts the same ones.
    """
    number = np.repeat(np.arange(len(sets)), [len(examples) for examples in sets])
    row = np.concatenate([np.arange(len(examples)) for examples in sets])
    lengths = np.concatenate([examples.lengths for examples in sets])
    keys = pa.concat_arrays([examples.keys for examples in sets])
    order = wanted[np.argsort(-lengths[wanted], kind="stable")]
    size = max(1, min(UNIT, -(-len(order) // (4 * workers))))
    units = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        name = hashlib.sha256(b"".join(keys.take(pa.array(members)).to_pylist())).hexdigest()[:32]
        left = members[missing[members]]
        if len(left):
            units.append(ScoringTask(name, number[left], row[left]))
    return units


class StoreFiller:
    """A model that scores units of work and keeps each in the store."""

    def __init__(self, model: ModelSource, store: ReferenceStore, sets: Any) -> None:
        import ray

        self._scorer = LogProbScorer(model)
        self._store = store
        self._sets: list[StoredExamples] = ray.get(sets)

    def __call__(self, units: list[ScoringTask]) -> list[int]:
        """How many examples of each unit were scored here."""
        return [self._score(unit) for unit in units]

    def _score(self, unit: ScoringTask) -> int:
        left = self._left(unit)
        if not len(left):
            return 0
        rows, keys = [], []
        for number in np.unique(unit.sets[left]).tolist():
            own = unit.rows[left][unit.sets[left] == number]
            rows += [{"prompt": prompt, "response": response} for prompt, response in self._sets[number].ids(own)]
            keys.append(self._sets[number].keys.take(pa.array(own)))
        logps = [result["logp"] for result in self._scorer(rows)]
        self._store.add(unit.name, pa.concat_arrays(keys), logps)
        return len(logps)

    def _left(self, unit: ScoringTask) -> np.ndarray:
        """Places in the unit of what no other process has scored since it was cut."""
        if not self._store.has(unit.name):
            return np.arange(len(unit.rows))
        places = zip(unit.sets.tolist(), unit.rows.tolist(), strict=True)
        keys = [self._sets[number].keys[row].as_py() for number, row in places]
        return np.flatnonzero(np.isnan(self._store.look_up(pa.array(keys, pa.binary(36)))))


def score(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
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


def score_once(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[float]:
    """What ``score`` gives, from the store where it has it: for a model that will be asked again."""
    store = ReferenceStore.of(model)
    keys = content_keys(examples)
    logps = store.look_up(keys)
    missing = np.flatnonzero(np.isnan(logps))
    if len(missing):
        logps[missing] = score(model, [examples[place] for place in missing.tolist()], cluster, progress)
        left = keys.take(pa.array(missing))
        store.add(digest(left.to_pylist()), left, logps[missing].tolist())
    return [float(logp) for logp in logps]


TOKENS_PER_FORWARD = 4096
"""Tokens that a scoring model takes at once; changes its speed and memory alone."""


class LogProbScorer:
    """A model that scores tokenised examples."""

    def __init__(self, model: ModelSource) -> None:
        self._model = model.serve()
        self._head = LogProbHead(self._model)
        probe = CompatibilityCheck(self._head, self._model, self._model, self._model.device)
        probe.require_known_logits()
        self._packs = probe.packing(longest=0)[0] != "none"

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with ``prompt`` and ``response`` ids -> rows with ``logp``."""
        import torch

        lengths = [len(row["prompt"]) + len(row["response"]) for row in rows]
        logps = torch.zeros(len(rows))
        packing: Packing = packing_of(self._model, max(lengths, default=0))[0] if self._packs else "none"
        for micro_batch in micro_batches(lengths, TOKENS_PER_FORWARD, ranks=1, packed=packing != "none")[0]:
            examples = [(rows[i]["prompt"], rows[i]["response"]) for i in micro_batch]
            inputs = collate(examples, packing).to(self._model.device)
            with torch.inference_mode():
                self._head.set_targets(inputs.rows, inputs.columns, inputs.targets)
                output = self._model(**inputs.arguments())
                logps[micro_batch] = inputs.per_example(output.logits, len(micro_batch)).cpu()
        return [{"logp": float(logp)} for logp in logps]
