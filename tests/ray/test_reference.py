"""Reference log-probs are scored once: which changes need scoring, of which examples, and the values."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.models import TEMPLATE, make_model
from helpers.stored import rows_here, stream_here
from raydiv.commands.prepare import PreparedData, load_inputs, prepare
from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.data import reference_scorer
from raydiv.data.reference_scorer import StoreFiller, _scoring_tasks
from raydiv.data.reference_store import ReferenceStore
from raydiv.data.tokens import StoredExamples
from raydiv.model.load import ModelSource
from raydiv.model.resolve import fingerprint
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.resume import require_same_content
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

pytestmark = pytest.mark.slow

torch.set_num_threads(1)  # as a pool's actor: some tests compare bits

PAIRS, EXAMPLES = 9, 18
Weights = Callable[[int, int], Any]
"""Weights of a response's tokens, by its length and that of the shorter response of its pair."""
BATCH = {"examples": 4, "max_length": 96, "max_prompt_length": 48}


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of different lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"Tell me about {n}", "chosen": f"Sure, {n}! " * (1 + n), "rejected": f"No, not {n}." * (n % 3 + 1)}
        for n in range(PAIRS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(model: Path, data: Path, *overrides: str) -> Recipe:
    return load_recipe(
        {
            "model": {"id": str(model)},
            "data": {"train": str(data)},
            "loss": {"type": "kldo"},
            "optim": {"steps": 1},
            "batch": BATCH,
            "separation": {"prompts": None},
        },
        overrides,
    )


def prepared(recipe: Recipe) -> PreparedData:
    return prepare(recipe, ProgressDisplay(quiet=True))


def hits_and_misses(recipe: Recipe) -> tuple[int, int]:
    """Reference log-probs that were stored already, and those that were scored."""
    data = prepared(recipe)
    return data.reference_hits, data.reference_misses


def parts(cache: Path) -> dict[Path, int]:
    """Files of the reference stores, and the time when each was written."""
    return {path: path.stat().st_mtime_ns for path in (cache / "reference").rglob("*.parquet")}


def plain_logps(
    model: Path, examples: StoredExamples, precision: str = "float32", weights: Weights = lambda length, shorter: 1.0
) -> np.ndarray:
    """Log-probs of the responses by a plain forward of each example alone, of pairs that follow one another."""
    sums, lengths = [], examples.response_lengths
    for row, logps in enumerate(plain_token_logps(model, examples, precision)):
        partner = min(row ^ 1, len(lengths) - 1)
        weight = weights(len(logps), min(lengths[row], lengths[partner]))
        sums.append(float((np.asarray(weight) * logps.astype(np.float64)).sum()))
    return np.array(sums)


def plain_token_logps(model: Path, examples: StoredExamples, precision: str = "float32") -> list[np.ndarray]:
    """Log-probs of the tokens of each response by a plain forward of each example alone."""
    import torch
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, precision)).eval()
    tokens = []
    for prompt, response in examples.ids(np.arange(len(examples))):
        ids = torch.from_numpy(np.concatenate([prompt, response]))
        with torch.inference_mode():
            logps = causal(ids[None]).logits[0, :-1].float().log_softmax(-1)
        tokens.append(logps.gather(1, ids[1:, None])[len(prompt) - 1 :, 0].numpy())
        assert len(tokens[-1]) == len(response)
    return tokens


# --- scored by a pool of Ray actors ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "cache"


@pytest.fixture(scope="module")
def first(ray: None, model: Path, data: Path, cache: Path) -> PreparedData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDIV_CACHE", str(cache))
        return prepared(recipe_of(model, data))


@pytest.fixture
def copied_cache(first: PreparedData, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache with all reference log-probs, for one test; what is missing is scored in this process."""
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    monkeypatch.setenv("RAYDIV_CACHE", str(copy))
    monkeypatch.setattr("raydiv.data.tokenize.map_stream", stream_here)
    monkeypatch.setattr("raydiv.data.reference_scorer.map_rows_unordered", rows_here)
    return copy


@pytest.fixture
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded for scoring."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded to score what is in the store")

    monkeypatch.setattr(reference_scorer, "map_rows_unordered", load)
    monkeypatch.setattr(reference_scorer.LogProbScorer, "__init__", load)


def test_every_example_is_scored_at_first(first: PreparedData) -> None:
    assert (first.reference_hits, first.reference_misses) == (0, EXAMPLES)


def test_stored_log_probs_are_those_of_a_plain_forward(first: PreparedData, model: Path) -> None:
    assert first.train.reference_logps is not None
    assert first.train.reference_logps.dtype == np.float32
    expected = plain_logps(model, first.train.examples)
    assert len(np.unique(expected)) == EXAMPLES
    np.testing.assert_allclose(first.train.reference_logps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        ["loss.beta=0.7"],
        ["optim.lr=0.5", "optim.steps=9", "optim.warmup=3"],
        ["loss.type=dpo"],
        ["loss.type=ipo", "loss.mix={sft: {weight: 1.0}}"],
        ["output_dir=elsewhere", "name=another"],
        ["cluster.num_workers=2"],
        ["seed=5"],
        ["batch.examples=2", "batch.tokens_per_microbatch=64"],
        ["data.eval=0.3", "seed=2"],
        ["model.lora={r: 2}"],
        ["data.on_bad_row=quarantine"],
    ],
    ids=lambda changes: changes[0],
)
def test_changes_that_leave_examples_alone_need_no_scoring(
    changes: list[str], first: PreparedData, copied_cache: Path, no_scoring: None, model: Path, data: Path
) -> None:
    before = parts(copied_cache)
    assert hits_and_misses(recipe_of(model, data, *changes)) == (EXAMPLES, 0)
    assert parts(copied_cache) == before


@pytest.mark.parametrize(
    ("position", "weights"),
    [
        ("{kind: decay, rate: 0.5}", lambda length, shorter: 0.5 ** np.arange(length)),
        ("{kind: first, tokens: 3, weight: 0.2}", lambda length, shorter: [0.2] * 3 + [1.0] * (length - 3)),
        ("{kind: common-length, weight: 0.3}", lambda length, shorter: [1.0] * shorter + [0.3] * (length - shorter)),
    ],
)
def test_weights_of_positions_have_entries_of_their_own(
    position: str, weights: Weights, first: PreparedData, copied_cache: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(model, data, f"loss.position={position}")
    found = prepared(recipe)
    assert (found.reference_hits, found.reference_misses) == (0, EXAMPLES)
    expected = plain_logps(model, found.train.examples, weights=weights)
    np.testing.assert_allclose(found.train.reference_logps, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - first.train.reference_logps).max() > 1
    assert hits_and_misses(recipe) == (EXAMPLES, 0)
    assert hits_and_misses(recipe_of(model, data)) == (EXAMPLES, 0)
    # a partner of one token changes the weights of a response where they depend on it
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["rejected"] = "N"
    (tmp_path / "edited.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edited = recipe_of(model, tmp_path / "edited.jsonl", f"loss.position={position}")
    assert hits_and_misses(edited) == ((EXAMPLES - 2, 2) if "common" in position else (EXAMPLES - 1, 1))


def test_rewards_of_another_model_weigh_aligned_tokens(
    first: PreparedData, copied_cache: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", tied=False, seed=3)
    recipe = recipe_of(model, data, f"loss.position={{kind: rewarded, model: {other}, temperature: -2}}")
    found = prepare(recipe, ProgressDisplay())
    # aligned examples are scored by both models
    assert (found.reference_hits, found.reference_misses) == (0, EXAMPLES + PAIRS)
    examples = found.train.examples
    reference, rewards = plain_token_logps(model, examples), plain_token_logps(other, examples)
    expected = [
        np.exp((theirs - ours) / 2) if aligned else np.ones_like(ours)
        for ours, theirs, aligned in zip(reference, rewards, examples.aligned, strict=True)
    ]
    assert max(weights.max() for weights in expected) > 1.2
    assert found.train.token_values is not None
    for row, weights in enumerate(found.train.token_values.at(np.arange(EXAMPLES))):
        np.testing.assert_allclose(weights, expected[row], rtol=1e-4)
    sums = [float((w * logps).sum()) for w, logps in zip(expected, reference, strict=True)]
    np.testing.assert_allclose(found.train.reference_logps, sums, rtol=1e-5, atol=1e-4)
    aligned = np.concatenate([expected[row] for row in np.flatnonzero(examples.aligned)])
    low, median, high = np.quantile(aligned, (0.05, 0.5, 0.95))
    assert f"aligned tokens: {low:.2g} to {high:.2g} (5% to 95%), median {median:.2g}" in capsys.readouterr().err

    # other temperatures, and a constraint, take the same entries
    assert hits_and_misses(recipe_of(model, data, "loss.position={kind: constrained, betas: [1]}")) == (EXAMPLES, 0)
    steep = recipe_of(model, data, f"loss.position={{kind: rewarded, model: {other}, temperature: 0.001}}")
    with pytest.raises(
        UserError, match=r"loss.position.temperature: 0.001 gives a token a weight of .*set one further"
    ):
        prepared(steep)


def test_a_reward_model_of_another_vocabulary_is_refused(
    first: PreparedData, copied_cache: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))
    rewarded = recipe_of(model, data, f"loss.position={{kind: rewarded, model: {other}, temperature: 1}}")
    with pytest.raises(UserError, match=r"^loss.position.model: .*: its embedding has 290 rows, and the data needs"):
        prepared(rewarded)
    tokenizer = other / "tokenizer.json"
    renamed = json.loads(tokenizer.read_text())
    vocabulary = renamed["model"]["vocab"]
    vocabulary |= {"a": vocabulary["b"], "b": vocabulary["a"]}
    tokenizer.write_text(json.dumps(renamed))
    with pytest.raises(UserError, match=r"^loss.position.model: .* has another id than model.id for 2 tokens, such as"):
        prepared(rewarded)
    # another vocabulary does not concern the base model, whose evaluation takes no rewards
    load_inputs(rewarded, ProgressDisplay(quiet=True))
    nowhere = recipe_of(model, data, "loss.position={kind: rewarded, model: ./nowhere, temperature: 1}")
    with pytest.raises(UserError, match=r"^loss.position.model: ./nowhere: not a local directory"):
        prepared(nowhere)
    (other / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^loss.position.model: .*safetensors is missing"):
        prepared(rewarded)


def test_rewards_are_of_the_model_that_a_run_trained(
    first: PreparedData, copied_cache: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "run" / "model", seed=3)
    recipe = recipe_of(model, data, f"loss.position={{kind: rewarded, model: {tmp_path / 'run'}, temperature: 2}}")
    found = prepared(recipe)
    assert found.reward_directory == tmp_path / "run" / "model"
    assert found.fingerprints["rewards"] == ModelSource(found.reward_directory).fingerprint()
    assert found.fingerprints["rewards"] != found.fingerprints["model"]
    run = RunDirectory(tmp_path / "resumed")
    run.create(recipe, found.fingerprints)
    with pytest.raises(UserError, match=r"^loss.position.model: the content has changed since"):
        require_same_content(run, found.fingerprints | {"rewards": "0" * 64})


def test_rewards_need_aligned_examples(model: Path, tmp_path: Path, copied_cache: Path) -> None:
    rows = [{"prompt": f"Row {n}", "completion": "Yes.", "label": False} for n in range(6)]
    (tmp_path / "unaligned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    position = f"loss.position={{kind: rewarded, model: {model}, temperature: 1}}"
    with pytest.raises(UserError, match=r"loss.position.kind: rewarded has no effect: .* has no aligned examples"):
        prepared(recipe_of(model, tmp_path / "unaligned.jsonl", position, "loss.type=npo"))


def test_common_length_without_pairs_is_refused(model: Path, tmp_path: Path, copied_cache: Path) -> None:
    rows = [{"prompt": f"Row {n}", "completion": "Yes.", "label": n % 2 == 0} for n in range(6)]
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"loss.position.kind: common-length has no effect: .* has no pairs"):
        prepared(recipe_of(model, tmp_path / "alone.jsonl", "loss.position={kind: common-length, weight: 0.5}"))


def test_equal_model_in_another_directory_needs_no_scoring(
    first: PreparedData, copied_cache: Path, no_scoring: None, model: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)
    assert hits_and_misses(recipe_of(tmp_path / "copy", data)) == (EXAMPLES, 0)


def test_equal_rows_in_another_order_and_file_need_no_scoring(
    first: PreparedData, copied_cache: Path, no_scoring: None, model: Path, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()][::-1]
    (tmp_path / "again.json").write_text(json.dumps(rows))
    again = prepared(recipe_of(model, tmp_path / "again.json"))
    assert (again.reference_hits, again.reference_misses) == (EXAMPLES, 0)
    assert again.train.reference_logps is not None
    assert first.train.reference_logps is not None
    pairs = [logps.reshape(-1, 2) for logps in (again.train.reference_logps, first.train.reference_logps)]
    np.testing.assert_array_equal(pairs[0][::-1], pairs[1])


def test_a_changed_token_needs_scoring_of_its_example_alone_through_ray(
    first: PreparedData, cache: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    monkeypatch.setenv("RAYDIV_CACHE", str(copy))
    edited = tmp_path / "edited.jsonl"
    edited.write_text(data.read_text().replace("No, not 7.", "No, not 6.", 1))
    again = prepared(recipe_of(model, edited))
    assert (again.reference_hits, again.reference_misses) == (EXAMPLES - 1, 1)
    assert again.train.reference_logps is not None
    np.testing.assert_allclose(
        again.train.reference_logps, plain_logps(model, again.train.examples), rtol=1e-5, atol=1e-5
    )
    added = parts(copy).keys() - {copy / path.relative_to(cache) for path in parts(cache)}
    assert [pq.read_metadata(path).num_rows for path in added] == [1]


# --- scored in this process ---


def test_shorter_length_needs_scoring_of_truncated_examples(
    first: PreparedData, copied_cache: Path, model: Path, data: Path
) -> None:
    shorter = 60
    truncated = int((first.train.examples.lengths > shorter).sum())
    assert 0 < truncated < EXAMPLES
    recipe = recipe_of(model, data, f"batch.max_length={shorter}")
    assert hits_and_misses(recipe) == (EXAMPLES - truncated, truncated)
    assert hits_and_misses(recipe) == (EXAMPLES, 0)


def test_another_template_needs_scoring_of_all(
    first: PreparedData, copied_cache: Path, model: Path, data: Path
) -> None:
    recipe = recipe_of(model, data)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": "<s>" + TEMPLATE})})
    assert hits_and_misses(other) == (0, EXAMPLES)
    assert hits_and_misses(other) == hits_and_misses(recipe) == (EXAMPLES, 0)


def test_equivalent_template_needs_no_scoring(
    first: PreparedData, copied_cache: Path, no_scoring: None, model: Path, data: Path
) -> None:
    recipe = recipe_of(model, data)
    same = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": TEMPLATE + "{# same #}"})})
    assert hits_and_misses(same) == (EXAMPLES, 0)


def nudge_a_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_the_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("change", [nudge_a_weight, change_the_config])
def test_changed_model_scores_all(
    change: Callable[[Path], None], first: PreparedData, copied_cache: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "changed")
    change(tmp_path / "changed")
    again = prepared(recipe_of(tmp_path / "changed", data))
    assert (again.reference_hits, again.reference_misses) == (0, EXAMPLES)
    assert again.train.reference_logps is not None
    assert first.train.reference_logps is not None
    expected = plain_logps(tmp_path / "changed", again.train.examples)
    np.testing.assert_allclose(again.train.reference_logps, expected, rtol=1e-5, atol=1e-5)
    assert (again.train.reference_logps != first.train.reference_logps).any()
    assert hits_and_misses(recipe_of(model, data)) == (EXAMPLES, 0)


def test_another_precision_needs_scoring_of_all(
    first: PreparedData, copied_cache: Path, model: Path, data: Path
) -> None:
    again = prepared(recipe_of(model, data, "engine.precision=bf16"))
    assert (again.reference_hits, again.reference_misses) == (0, EXAMPLES)
    assert again.train.reference_logps is not None
    expected = plain_logps(model, again.train.examples, "bfloat16")
    np.testing.assert_allclose(again.train.reference_logps, expected, rtol=2e-2)
    assert hits_and_misses(recipe_of(model, data)) == (EXAMPLES, 0)


def test_ktos_mismatched_examples_are_scored_once(
    first: PreparedData, copied_cache: Path, model: Path, data: Path
) -> None:
    recipe = recipe_of(model, data, "loss.type=kto")
    again = prepared(recipe)
    assert (again.reference_hits, again.reference_misses) == (EXAMPLES, EXAMPLES)
    assert hits_and_misses(recipe) == (2 * EXAMPLES, 0)
    assert again.train.mismatched is not None
    assert again.train.mismatched_reference_logps is not None
    expected = plain_logps(model, again.train.mismatched)
    np.testing.assert_allclose(again.train.mismatched_reference_logps, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(again.train.reference_logps, first.train.reference_logps)


def test_repeated_examples_are_scored_once(
    first: PreparedData, copied_cache: Path, model: Path, tmp_path: Path
) -> None:
    row = {"prompt": "Twice", "response": "the same", "aligned": True}
    other = {"prompt": "Once", "response": "another", "aligned": False}
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, other, row)))
    again = prepared(recipe_of(model, tmp_path / "twice.jsonl"))
    assert (again.reference_hits, again.reference_misses) == (0, 2)
    assert again.train.reference_logps is not None
    np.testing.assert_allclose(again.train.reference_logps, plain_logps(model, again.train.examples), rtol=1e-5)
    assert again.train.reference_logps[0] == again.train.reference_logps[2]


def test_lost_part_needs_scoring_of_its_examples_alone(
    first: PreparedData, copied_cache: Path, model: Path, data: Path
) -> None:
    before = parts(copied_cache)
    assert len(before) > 1
    lost = sorted(before)[0]
    rows = pq.read_metadata(lost).num_rows
    lost.unlink()
    again = prepared(recipe_of(model, data))
    assert (again.reference_hits, again.reference_misses) == (EXAMPLES - rows, rows)
    np.testing.assert_array_equal(again.train.reference_logps, first.train.reference_logps)
    after = parts(copied_cache)
    assert {path: after[path] for path in before if path != lost} == {p: t for p, t in before.items() if p != lost}


def test_lost_parts_of_a_store_that_grew_are_scored_again(
    first: PreparedData, copied_cache: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "edited.jsonl"
    edited.write_text(data.read_text().replace("No, not 7.", "No, not 6.", 1))
    before = parts(copied_cache)
    assert hits_and_misses(recipe_of(model, edited)) == (EXAMPLES - 1, 1)
    for path in before:
        path.unlink()
    assert hits_and_misses(recipe_of(model, edited)) == (1, EXAMPLES - 1)
    assert hits_and_misses(recipe_of(model, edited)) == (EXAMPLES, 0)


class Work:
    """The scoring tasks of all data, and an empty store."""

    def __init__(self, data: PreparedData, recipe: Recipe, directory: Path) -> None:
        import ray

        self.sets = [data.train.examples]
        self.keys = self.sets[0].keys
        self.store = ReferenceStore(fingerprint(directory), recipe.engine.precision)
        everything = np.arange(len(self.keys))
        self.tasks = _scoring_tasks(self.sets, everything, np.ones(len(self.keys), dtype=bool), workers=2)
        self._arguments = ModelSource.from_recipe(recipe, directory), self.store, ray.put(self.sets)

    def filler(self) -> StoreFiller:
        return StoreFiller(*self._arguments)


@pytest.fixture
def work(first: PreparedData, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "empty"))
    work = Work(first, recipe_of(model, data), model)
    assert len(work.tasks) > 3
    assert np.isnan(work.store.look_up(work.keys)).all()
    return work


def test_two_fillers_share_tasks(work: Work, first: PreparedData) -> None:
    done = [0, 0]
    fillers = [work.filler(), work.filler()]
    for pair in zip(work.tasks, reversed(work.tasks), strict=True):
        for number, task in enumerate(pair):
            done[number] += fillers[number]([task])[0]
    assert sum(done) == EXAMPLES
    assert all(done)
    np.testing.assert_array_equal(work.store.look_up(work.keys), first.train.reference_logps)


def test_task_that_two_fillers_score_at_once_is_one_part(
    work: Work, first: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceStore, "has", lambda self, part: False)
    for filler in (work.filler(), work.filler()):
        assert sum(filler(work.tasks)) == EXAMPLES
    assert len(parts(tmp_path / "empty")) == len(work.tasks)
    np.testing.assert_array_equal(work.store.look_up(work.keys), first.train.reference_logps)


def test_a_later_process_cuts_the_same_tasks(work: Work) -> None:
    missing = np.ones(EXAMPLES, dtype=bool)
    done = work.tasks[1]
    missing[done.rows] = False
    later = _scoring_tasks(work.sets, np.arange(EXAMPLES), missing, workers=2)
    assert [task.name for task in later] == [task.name for task in work.tasks if task is not done]
    assert [task.rows.tolist() for task in later] == [task.rows.tolist() for task in work.tasks if task is not done]


def test_tasks_contain_each_missing_example_once(work: Work) -> None:
    missing = np.arange(EXAMPLES) % 3 != 0
    rows = np.concatenate([task.rows for task in _scoring_tasks(work.sets, np.arange(EXAMPLES), missing, workers=2)])
    assert sorted(rows.tolist()) == np.flatnonzero(missing).tolist()


def test_store_distinguishes_keys_that_differ_in_their_last_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path))
    store = ReferenceStore("model", "fp32")
    keys = [bytes(35) + bytes([n]) for n in range(4)]
    store.add("one", pa.array(keys[:2], pa.binary(36)), [-1.0, -2.0])
    store.add("other", pa.array(keys[2:3], pa.binary(36)), [-3.0])
    logps = store.look_up(pa.array(keys[::-1], pa.binary(36)))
    np.testing.assert_array_equal(logps, np.array([np.nan, -3, -2, -1], np.float32))
    assert np.isnan(ReferenceStore("model", "bf16").look_up(pa.array(keys, pa.binary(36)))).all()
    assert np.isnan(ReferenceStore("other", "fp32").look_up(pa.array(keys, pa.binary(36)))).all()


# --- the cost of a model's fingerprint ---


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files whose content is read for their digest."""
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))
    names: list[str] = []
    file_digest = hashlib.file_digest

    def recorded(content: Any, algorithm: str) -> Any:
        names.append(Path(content.name).name)
        return file_digest(content, algorithm)

    monkeypatch.setattr("raydiv.utils.cache.hashlib.file_digest", recorded)
    return names


def test_weights_are_read_for_their_fingerprint_once(model: Path, tmp_path: Path, digested: list[str]) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    before = fingerprint(copy)
    assert sorted(digested) == ["config.json", "model.safetensors"]
    digested.clear()
    assert fingerprint(copy) == before
    assert digested == []

    weights = copy / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    assert fingerprint(copy) == before
    assert digested == ["model.safetensors"]
    digested.clear()

    modified = weights.stat().st_mtime_ns
    with weights.open("ab") as file:
        file.write(b"x")
    os.utime(weights, ns=(modified, modified))
    assert fingerprint(copy) != before
    assert digested == ["model.safetensors"]


def test_fingerprint_depends_on_the_content_and_not_on_the_directory(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other" / "notes.txt").write_text("x")
    assert fingerprint(tmp_path / "other") == fingerprint(model)
    nudge_a_weight(tmp_path / "other")
    assert fingerprint(tmp_path / "other") != fingerprint(model)


def test_name_of_a_hub_blob_is_its_digest(model: Path, tmp_path: Path, digested: list[str]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        content = (model / file).read_bytes()
        # large files are named by their SHA-256, small ones by git's 40 digits
        name = hashlib.sha256(content).hexdigest() if file.endswith(".safetensors") else "0" * 40
        (blobs / name).write_bytes(content)
        (snapshot / file).symlink_to(blobs / name)
    of_snapshot = fingerprint(snapshot)
    assert digested == ["0" * 40]
    assert of_snapshot == fingerprint(model)


# --- two processes, each with a Ray of its own ---

PREPARE = """
import json, sys
from raydiv import load_recipe
from raydiv.commands.prepare import prepare
from raydiv.runs.progress import ProgressDisplay
data = prepare(load_recipe(sys.argv[1]), ProgressDisplay(quiet=True))
print(json.dumps(data.summary() | {"logps": data.train.reference_logps.tolist()}))
"""


@pytest.mark.long
def test_two_processes_at_once_share_the_work(first: PreparedData, model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(model, data).model_dump(mode="json", by_alias=True)))
    environment = os.environ | {"RAYDIV_CACHE": str(tmp_path / "cache")}
    environment.pop("RAY_ADDRESS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    printed = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [errors[-2000:] for _, errors in printed]
    summaries = [json.loads(output.splitlines()[-1]) for output, _ in printed]
    for summary in summaries:
        assert summary["fingerprint"] == first.train.examples.fingerprint
        assert summary["reference"]["hits"] + summary["reference"]["misses"] == EXAMPLES
        np.testing.assert_allclose(summary["logps"], first.train.reference_logps, rtol=1e-5)
    rows = [pq.read_metadata(path).num_rows for path in parts(tmp_path / "cache")]
    # a task that both scored is one part; what one stored before the other looked is scored once
    assert EXAMPLES <= sum(rows) <= sum(summary["reference"]["misses"] for summary in summaries)


def test_score_once_stores_its_results(tiny_model: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from raydiv.data.tokens import content_keys

    scored: list[int] = []

    def score(model: Any, examples: Any, cluster: Any, progress: Any) -> list[float]:
        scored.append(len(examples))
        return [-float(len(response)) for _, response in examples]

    monkeypatch.setattr(reference_scorer, "score", score)
    model, first = ModelSource(tiny_model), [([3, 4], [5, 6]), ([3], [4]), ([3, 4], [5])]
    once = lambda examples, of=model: reference_scorer.score_once(of, examples, ClusterConfig())  # noqa: E731
    assert once(first) == [-2, -1, -1]
    assert once([([9], [9, 9, 9]), *first]) == [-3, -2, -1, -1]
    assert once(first[::-1]) == [-1, -1, -2]
    assert once(first, ModelSource(tiny_model, precision="bf16")) == [-2, -1, -1]
    assert scored == [3, 1, 3]
    # with the keys of the data's entries
    assert len(set(content_keys(first).to_pylist())) == 3
