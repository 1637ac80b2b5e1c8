"""Reference log-probs of tokenised examples: from the reference store, and the missing ones from a pool of models."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.data.batching import micro_batches
from raydiv.data.reference_store import ReferenceStore
from raydiv.data.tokens import StoredExamples, TokenValues, content_keys
from raydiv.losses.position import PositionRule, RewardWeights
from raydiv.model.chat import Ids
from raydiv.model.collate import collate
from raydiv.model.compatibility import CompatibilityCheck
from raydiv.model.head import LogProbHead
from raydiv.model.load import ModelSource
from raydiv.model.packing import Packing, packing_of
from raydiv.runtime.model_pool import map_rows, map_rows_unordered
from raydiv.runtime.resources import pool_resources
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress

LARGEST_WEIGHT = 1e6
"""Of a token: a few such tokens would make all others of a batch vanish in fp32."""

TASK_EXAMPLES = 1024
"""Maximum examples of a scoring task. A task becomes one part of the store."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """``logps[i]`` [n_i] of the i-th example set, fp32; numbers of distinct examples that were stored, and scored.

    ``tokens[i]``: what ``loss.position`` takes of its response tokens, where it takes something.
    """

    logps: list[np.ndarray]
    hits: int
    misses: int
    tokens: Sequence[TokenValues | None] = ()


def reference_logps(
    recipe: Recipe,
    directory: Path,
    example_sets: Sequence[StoredExamples],
    progress: Progress = no_progress,
    rewards: Path | None = None,
) -> Lookup:
    """Reference log-probs of all examples of ``example_sets``, from the store or else from a pool of models.

    Under RewardWeights, whose model is in ``rewards``, they are sums of weighted log-probs, and the numbers of examples
    those that either model scored.
    """
    lookup = _look_up(recipe, directory, example_sets, progress)
    return lookup if rewards is None else _weighted(recipe, rewards, example_sets, lookup, progress)


def _weighted(
    recipe: Recipe, rewards: Path, sets: Sequence[StoredExamples], reference: Lookup, progress: Progress
) -> Lookup:
    """``reference``, by token, with its tokens weighted: sums of weighted log-probs, and the weights.

    Raises UserError for a weight of LARGEST_WEIGHT or more.
    """
    position = recipe.loss.position.rule
    assert isinstance(position, RewardWeights)
    aligned = [np.flatnonzero(examples.aligned) for examples in sets]
    selected = [examples.select(rows) for examples, rows in zip(sets, aligned, strict=True)]
    rewarded = _look_up(recipe, rewards, selected, progress)
    logps, weights = [], []
    for rows, logps_of_model, tokens in zip(aligned, rewarded.tokens, reference.tokens, strict=True):
        assert logps_of_model is not None
        assert tokens is not None
        of_set = TokenValues(np.ones_like(tokens.values), tokens.starts)
        pairs = zip(of_set.at(rows), logps_of_model.at(np.arange(len(rows))), tokens.at(rows), strict=True)
        for place, logps_of_example, reference_of_example in pairs:
            place[:] = position.of(logps_of_example, reference_of_example)
        weights.append(of_set)
        logps.append(TokenValues(of_set.values * tokens.values, tokens.starts).sums(np.arange(len(tokens.starts) - 1)))
    largest = max((float(of_set.values.max(initial=0)) for of_set in weights), default=0.0)
    if not largest < LARGEST_WEIGHT:
        raise UserError(
            f"loss.position.temperature: {position.temperature} gives a token a weight of {largest:.3g} "
            f"(above {LARGEST_WEIGHT:,.0f}); set one further from 0"
        )
    return Lookup(logps, reference.hits + rewarded.hits, reference.misses + rewarded.misses, weights)


def _look_up(
    recipe: Recipe, directory: Path, example_sets: Sequence[StoredExamples], progress: Progress = no_progress
) -> Lookup:
    """Log-probs by the model in ``directory``, from the store or else from a pool of models.

    A finished task is stored at once. So an interrupted pass resumes where it stopped, and two concurrent passes share
    their work.
    """
    position = recipe.loss.position.rule
    store = ReferenceStore.of(ModelSource.from_recipe(recipe, directory), position)
    set_keys = [examples.keys_under(position) for examples in example_sets]
    keys = pa.concat_arrays(set_keys)
    logps = store.look_up(keys)
    _, distinct = np.unique(keys.dictionary_encode().indices.to_numpy(), return_index=True)
    missing = int(np.isnan(logps[distinct]).sum())
    scored = 0
    if missing:
        for count in _score_missing(store, recipe, directory, example_sets, distinct, np.isnan(logps)):
            scored += count
            progress(scored, missing)
        logps = store.look_up(keys)
        if np.isnan(logps).any():
            raise RuntimeError(
                f"the reference store lacks {int(np.isnan(logps).sum())} log-probs that were just scored"
            )
    ends = np.cumsum([len(examples) for examples in example_sets])[:-1]
    tokens = []
    if recipe.loss.needs_reference_tokens:
        sets = zip(set_keys, example_sets, strict=True)
        tokens = [store.look_up_tokens(of_set, examples.response_lengths) for of_set, examples in sets]
    return Lookup(np.split(logps, ends), len(distinct) - scored, scored, tokens)


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """Examples that are scored together and make the part ``name`` of the store: row ``rows[m]`` of set ``sets[m]``."""

    name: str
    sets: np.ndarray
    rows: np.ndarray


def _score_missing(
    store: ReferenceStore,
    recipe: Recipe,
    directory: Path,
    example_sets: Sequence[StoredExamples],
    distinct: np.ndarray,
    missing: np.ndarray,
) -> Iterator[int]:
    """Score the ``distinct`` examples that are ``missing`` [n]; yields the number of examples of each finished task."""
    import ray

    position, actors = recipe.loss.position.rule, pool_resources(recipe.cluster, model=True).actors
    tasks = _scoring_tasks(example_sets, distinct, missing, actors, position)
    # concurrent processes work on the same tasks: starting elsewhere, each finds those of the others done
    random.shuffle(tasks)
    arguments = {
        "model": ModelSource.from_recipe(recipe, directory),
        "store": store,
        "example_sets": ray.put(list(example_sets)),
        "position": position,
    }
    for _, count in map_rows_unordered(tasks, StoreFiller, arguments, cluster=recipe.cluster, batch_rows=1):
        yield count


def _scoring_tasks(
    example_sets: Sequence[StoredExamples],
    distinct: np.ndarray,
    missing: np.ndarray,
    workers: int,
    position: PositionRule | None = None,
) -> list[ScoringTask]:
    """Tasks of similar lengths.

    They are cut from all ``distinct`` examples, missing or not, so that a process that starts later cuts the same
    tasks.
    """
    set_numbers = np.repeat(np.arange(len(example_sets)), [len(examples) for examples in example_sets])
    rows = np.concatenate([np.arange(len(examples)) for examples in example_sets])
    lengths = np.concatenate([examples.lengths for examples in example_sets])
    keys = pa.concat_arrays([examples.keys_under(position) for examples in example_sets])
    order = distinct[np.argsort(-lengths[distinct], kind="stable")]
    size = max(1, min(TASK_EXAMPLES, -(-len(order) // (4 * workers))))
    tasks = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        name = hashlib.sha256(b"".join(keys.take(pa.array(members)).to_pylist())).hexdigest()[:32]
        unscored = members[missing[members]]
        if len(unscored):
            tasks.append(ScoringTask(name, set_numbers[unscored], rows[unscored]))
    return tasks


class StoreFiller:
    """A pool's actor: a model that scores tasks and stores each result."""

    def __init__(
        self, model: ModelSource, store: ReferenceStore, example_sets: Any, position: PositionRule | None = None
    ) -> None:
        import ray

        self._by_token = position is not None and position.by_token
        self._scorer = LogProbScorer(model, self._by_token)
        self._store, self._position = store, position
        self._example_sets: list[StoredExamples] = ray.get(example_sets)
        self._keys = [examples.keys_under(position) for examples in self._example_sets]

    def __call__(self, tasks: list[ScoringTask]) -> list[int]:
        """The number of examples of each task that were scored here."""
        return [self._score(task) for task in tasks]

    def _score(self, task: ScoringTask) -> int:
        unscored = self._unscored(task)
        if not len(unscored):
            return 0
        examples, keys = [], []
        for number in np.unique(task.sets[unscored]).tolist():
            rows = task.rows[unscored][task.sets[unscored] == number]
            stored = self._example_sets[number]
            of_set: list[dict[str, Any]] = [
                {"prompt": prompt, "response": response} for prompt, response in stored.ids(rows)
            ]
            for example, weights in zip(of_set, stored.weights(self._position, rows) or (), strict=False):
                example["weights"] = weights
            examples += of_set
            keys.append(self._keys[number].take(pa.array(rows)))
        results = self._scorer(examples)
        tokens = [result["tokens"] for result in results] if self._by_token else None
        self._store.add(task.name, pa.concat_arrays(keys), [result["logp"] for result in results], tokens)
        return len(results)

    def _unscored(self, task: ScoringTask) -> np.ndarray:
        """Positions in the task of the examples that no other process has scored since the task was cut."""
        if not self._store.has(task.name):
            return np.arange(len(task.rows))
        places = zip(task.sets.tolist(), task.rows.tolist(), strict=True)
        keys = [self._keys[number][row].as_py() for number, row in places]
        return np.flatnonzero(np.isnan(self._store.look_up(pa.array(keys, self._keys[0].type))))


def score(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[float]:
    """Log-probs of (prompt ids, response ids) examples, summed over response tokens, from a pool of models."""
    return [float(result["logp"]) for result in _map_examples(model, examples, cluster, progress)]


def score_tokens(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[np.ndarray]:
    """Log-probs [t] of the response tokens of each example, from a pool of models."""
    results = _map_examples(model, examples, cluster, progress, by_token=True)
    return [result["tokens"] for result in results]


def _map_examples(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: ClusterConfig,
    progress: Progress,
    by_token: bool = False,
) -> list[dict[str, Any]]:
    rows = [{"prompt": list(prompt), "response": list(response)} for prompt, response in examples]
    return map_rows(
        rows,
        LogProbScorer,
        {"model": model, "by_token": by_token},
        cluster=cluster,
        batch_rows=64,
        progress=progress,
        length=lambda row: len(row["prompt"]) + len(row["response"]),
    )


def score_once(
    model: ModelSource,
    examples: Sequence[tuple[Ids, Ids]],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[float]:
    """The result of ``score``, from the store where it has it: for a model that scores the same examples again."""
    store = ReferenceStore.of(model)
    keys = content_keys(examples)
    logps = store.look_up(keys)
    missing = np.flatnonzero(np.isnan(logps))
    if len(missing):
        logps[missing] = score(model, [examples[row] for row in missing.tolist()], cluster, progress)
        missing_keys = keys.take(pa.array(missing))
        store.add(digest(missing_keys.to_pylist()), missing_keys, logps[missing].tolist())
    return [float(logp) for logp in logps]


TOKENS_PER_FORWARD = 4096
"""Token budget of a scoring forward; affects speed and memory alone."""


class LogProbScorer:
    """A pool's actor: a model that scores tokenised examples."""

    def __init__(self, model: ModelSource, by_token: bool = False) -> None:
        self._by_token = by_token
        self._model = model.load_for_inference()
        self._head = LogProbHead(self._model)
        check = CompatibilityCheck(self._head, self._model, self._model, self._model.device)
        check.require_supported_logits()
        self._packs = check.packing(max_length=0)[0] != "none"
        self._head.remove()  # other workers of this process have the same model

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with ``prompt`` and ``response`` ids -> rows with ``logp``, and ``tokens``, its terms, if asked for.

        Where rows have ``weights``, those of all response tokens, ``logp`` is the sum of the weighted terms.
        """
        import torch

        lengths = [len(row["prompt"]) + len(row["response"]) for row in rows]
        logps, tokens = torch.zeros(len(rows)), dict[int, np.ndarray]()
        packing: Packing = packing_of(self._model, max(lengths, default=0))[0] if self._packs else "none"
        self._head.install()
        for micro_batch in micro_batches(lengths, TOKENS_PER_FORWARD, ranks=1, packed=packing != "none")[0]:
            examples = [(rows[i]["prompt"], rows[i]["response"]) for i in micro_batch]
            weights = [rows[i]["weights"] for i in micro_batch] if "weights" in rows[0] else None
            inputs = collate(examples, packing, weights).to(self._model.device)
            with torch.inference_mode():
                self._head.set_targets(inputs.rows, inputs.columns, inputs.targets)
                output = self._model(**inputs.forward_kwargs())
                logps[micro_batch] = inputs.sum_per_example(output.logits, len(micro_batch)).cpu()
                if self._by_token:
                    parts = output.logits.float().cpu().split([len(response) for _, response in examples])
                    tokens |= {row: part.numpy() for row, part in zip(micro_batch, parts, strict=True)}
        self._head.remove()
        return [
            {"logp": float(logp), **({"tokens": tokens[row]} if self._by_token else {})}
            for row, logp in enumerate(logps)
        ]
