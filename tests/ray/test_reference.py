"""The reference is paid once: what never pays again, what pays for exactly the examples that changed, and what is paid."""

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

from helpers.models import TEMPLATE, make_model
from helpers.stored import stream_here
from raydiv.commands.prepare import PreparedData, prepare
from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.data import reference_scorer
from raydiv.data.reference_scorer import StoreFiller, _scoring_tasks
from raydiv.data.reference_store import ReferenceStore
from raydiv.data.tokens import StoredExamples
from raydiv.model.load import ModelSource
from raydiv.model.resolve import fingerprint
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session

pytestmark = pytest.mark.slow

PAIRS, EXAMPLES = 9, 18
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
    """Pairs of lengths that differ."""
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


def paid(recipe: Recipe) -> tuple[int, int]:
    """Reference log-probs that were there, and those that were scored."""
    found = prepared(recipe)
    return found.reference_hits, found.reference_misses


def parts(cache: Path) -> dict[Path, int]:
    """Files of the reference stores, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in (cache / "reference").rglob("*.parquet")}


def live(model: Path, examples: StoredExamples, precision: str = "float32") -> np.ndarray:
    """Log-probs of the responses by a plain forward of each example alone."""
    import torch
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, precision)).eval()
    found = []
    for prompt, response in examples.ids(np.arange(len(examples))):
        ids = torch.from_numpy(np.concatenate([prompt, response]))
        with torch.inference_mode():
            logps = causal(ids[None]).logits[0, :-1].float().log_softmax(-1)
        of_response = logps.gather(1, ids[1:, None])[len(prompt) - 1 :, 0]
        assert len(of_response) == len(response)
        found.append(float(of_response.double().sum()))
    return np.array(found)


# --- paid by a pool of Ray's actors ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paid") / "cache"


@pytest.fixture(scope="module")
def first(ray: None, model: Path, data: Path, cache: Path) -> PreparedData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDIV_CACHE", str(cache))
        return prepared(recipe_of(model, data))


@pytest.fixture
def used(first: PreparedData, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in which the reference is paid, to be changed by this test alone; from here on work is done here."""
    mine = tmp_path / "cache"
    shutil.copytree(cache, mine)
    monkeypatch.setenv("RAYDIV_CACHE", str(mine))
    for module in ("raydiv.data.tokenize", "raydiv.data.reference_scorer"):
        monkeypatch.setattr(f"{module}.map_stream", stream_here)
    return mine


@pytest.fixture
def unpaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be scored."""

    def scores(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded to score what is in the store")

    monkeypatch.setattr(reference_scorer, "map_stream", scores)
    monkeypatch.setattr(reference_scorer.LogProbScorer, "__init__", scores)


def test_first_time_pays_for_every_example(first: PreparedData) -> None:
    assert (first.reference_hits, first.reference_misses) == (0, EXAMPLES)


def test_stored_log_probs_are_those_of_a_plain_forward(first: PreparedData, model: Path) -> None:
    assert first.train.reference_logps is not None
    assert first.train.reference_logps.dtype == np.float32
    expected = live(model, first.train.examples)
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
def test_what_does_not_change_an_example_pays_nothing(
    changes: list[str], first: PreparedData, used: Path, unpaid: None, model: Path, data: Path
) -> None:
    before = parts(used)
    assert paid(recipe_of(model, data, *changes)) == (EXAMPLES, 0)
    assert parts(used) == before


def test_equal_model_in_another_directory_pays_nothing(
    first: PreparedData, used: Path, unpaid: None, model: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)
    assert paid(recipe_of(tmp_path / "copy", data)) == (EXAMPLES, 0)


def test_equal_rows_in_another_order_and_file_pay_nothing(
    first: PreparedData, used: Path, unpaid: None, model: Path, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()][::-1]
    (tmp_path / "again.json").write_text(json.dumps(rows))
    again = prepared(recipe_of(model, tmp_path / "again.json"))
    assert (again.reference_hits, again.reference_misses) == (EXAMPLES, 0)
    assert again.train.reference_logps is not None
    assert first.train.reference_logps is not None
    pairs = [found.reshape(-1, 2) for found in (again.train.reference_logps, first.train.reference_logps)]
    np.testing.assert_array_equal(pairs[0][::-1], pairs[1])


def test_a_changed_token_pays_for_its_example_alone_through_ray(
    first: PreparedData, cache: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "cache"
    shutil.copytree(cache, mine)
    monkeypatch.setenv("RAYDIV_CACHE", str(mine))
    edited = tmp_path / "edited.jsonl"
    edited.write_text(data.read_text().replace("No, not 7.", "No, not 6.", 1))
    again = prepared(recipe_of(model, edited))
    assert (again.reference_hits, again.reference_misses) == (EXAMPLES - 1, 1)
    assert again.train.reference_logps is not None
    np.testing.assert_allclose(again.train.reference_logps, live(model, again.train.examples), rtol=1e-5, atol=1e-5)
    added = parts(mine).keys() - {mine / path.relative_to(cache) for path in parts(cache)}
    assert [pq.read_metadata(path).num_rows for path in added] == [1]


# --- paid in this process ---


def test_shorter_length_pays_for_the_examples_that_it_cuts(
    first: PreparedData, used: Path, model: Path, data: Path
) -> None:
    shorter = 60
    cut = int((first.train.examples.lengths > shorter).sum())
    assert 0 < cut < EXAMPLES
    recipe = recipe_of(model, data, f"batch.max_length={shorter}")
    assert paid(recipe) == (EXAMPLES - cut, cut)
    assert paid(recipe) == (EXAMPLES, 0)


def test_another_template_pays_for_all(first: PreparedData, used: Path, model: Path, data: Path) -> None:
    recipe = recipe_of(model, data)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": "<s>" + TEMPLATE})})
    assert paid(other) == (0, EXAMPLES)
    assert paid(other) == paid(recipe) == (EXAMPLES, 0)


def test_template_that_says_the_same_pays_nothing(
    first: PreparedData, used: Path, unpaid: None, model: Path, data: Path
) -> None:
    recipe = recipe_of(model, data)
    same = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": TEMPLATE + "{# same #}"})})
    assert paid(same) == (EXAMPLES, 0)


def nudge_a_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_the_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("change", [nudge_a_weight, change_the_config])
def test_changed_model_pays_for_all_and_is_the_one_that_scores(
    change: Callable[[Path], None], first: PreparedData, used: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "changed")
    change(tmp_path / "changed")
    found = prepared(recipe_of(tmp_path / "changed", data))
    assert (found.reference_hits, found.reference_misses) == (0, EXAMPLES)
    assert found.train.reference_logps is not None
    assert first.train.reference_logps is not None
    expected = live(tmp_path / "changed", found.train.examples)
    np.testing.assert_allclose(found.train.reference_logps, expected, rtol=1e-5, atol=1e-5)
    assert (found.train.reference_logps != first.train.reference_logps).any()
    assert paid(recipe_of(model, data)) == (EXAMPLES, 0)


def test_another_precision_pays_for_all(first: PreparedData, used: Path, model: Path, data: Path) -> None:
    found = prepared(recipe_of(model, data, "engine.precision=bf16"))
    assert (found.reference_hits, found.reference_misses) == (0, EXAMPLES)
    assert found.train.reference_logps is not None
    expected = live(model, found.train.examples, "bfloat16")
    np.testing.assert_allclose(found.train.reference_logps, expected, rtol=2e-2)
    assert paid(recipe_of(model, data)) == (EXAMPLES, 0)


def test_kto_pays_for_its_mismatched_examples_once(first: PreparedData, used: Path, model: Path, data: Path) -> None:
    recipe = recipe_of(model, data, "loss.type=kto")
    found = prepared(recipe)
    assert (found.reference_hits, found.reference_misses) == (EXAMPLES, EXAMPLES)
    assert paid(recipe) == (2 * EXAMPLES, 0)
    assert found.train.mismatched is not None
    assert found.train.mismatched_reference_logps is not None
    expected = live(model, found.train.mismatched)
    np.testing.assert_allclose(found.train.mismatched_reference_logps, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.train.reference_logps, first.train.reference_logps)


def test_repeated_examples_are_paid_for_once(first: PreparedData, used: Path, model: Path, tmp_path: Path) -> None:
    row = {"prompt": "Twice", "response": "the same", "aligned": True}
    other = {"prompt": "Once", "response": "another", "aligned": False}
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, other, row)))
    found = prepared(recipe_of(model, tmp_path / "twice.jsonl"))
    assert (found.reference_hits, found.reference_misses) == (0, 2)
    assert found.train.reference_logps is not None
    np.testing.assert_allclose(found.train.reference_logps, live(model, found.train.examples), rtol=1e-5)
    assert found.train.reference_logps[0] == found.train.reference_logps[2]


def test_lost_part_pays_for_its_examples_alone(first: PreparedData, used: Path, model: Path, data: Path) -> None:
    before = parts(used)
    assert len(before) > 1
    lost = sorted(before)[0]
    rows = pq.read_metadata(lost).num_rows
    lost.unlink()
    found = prepared(recipe_of(model, data))
    assert (found.reference_hits, found.reference_misses) == (EXAMPLES - rows, rows)
    np.testing.assert_array_equal(found.train.reference_logps, first.train.reference_logps)
    now = parts(used)
    assert {path: now[path] for path in before if path != lost} == {p: at for p, at in before.items() if p != lost}


def test_lost_part_of_a_store_that_grew_is_paid_again(
    first: PreparedData, used: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "edited.jsonl"
    edited.write_text(data.read_text().replace("No, not 7.", "No, not 6.", 1))
    before = parts(used)
    assert paid(recipe_of(model, edited)) == (EXAMPLES - 1, 1)
    for path in before:
        path.unlink()
    assert paid(recipe_of(model, edited)) == (1, EXAMPLES - 1)
    assert paid(recipe_of(model, edited)) == (EXAMPLES, 0)


class Work:
    """The units of the whole of the data, and an empty store."""

    def __init__(self, found: PreparedData, recipe: Recipe, directory: Path) -> None:
        import ray

        self.sets = [found.train.examples]
        self.keys = self.sets[0].keys
        self.store = ReferenceStore(fingerprint(directory), recipe.engine.precision)
        everything = np.arange(len(self.keys))
        self.units = _scoring_tasks(self.sets, everything, np.ones(len(self.keys), dtype=bool), workers=2)
        self._arguments = ModelSource.of(recipe, directory), self.store, ray.put(self.sets)

    def filler(self) -> StoreFiller:
        return StoreFiller(*self._arguments)


@pytest.fixture
def work(first: PreparedData, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "empty"))
    found = Work(first, recipe_of(model, data), model)
    assert len(found.units) > 3
    assert np.isnan(found.store.look_up(found.keys)).all()
    return found


def test_two_at_the_same_units_share_them(work: Work, first: PreparedData) -> None:
    done = [0, 0]
    ones = [work.filler(), work.filler()]
    for forth, back in zip(work.units, reversed(work.units), strict=True):
        for number, unit in enumerate((forth, back)):
            done[number] += ones[number]([unit])[0]
    assert sum(done) == EXAMPLES
    assert all(done)
    np.testing.assert_array_equal(work.store.look_up(work.keys), first.train.reference_logps)


def test_unit_that_two_score_at_the_same_moment_is_one_part(
    work: Work, first: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceStore, "has", lambda self, part: False)
    for one in (work.filler(), work.filler()):
        assert sum(one(work.units)) == EXAMPLES
    assert len(parts(tmp_path / "empty")) == len(work.units)
    np.testing.assert_array_equal(work.store.look_up(work.keys), first.train.reference_logps)


def test_who_comes_later_cuts_the_same_units(work: Work) -> None:
    missing = np.ones(EXAMPLES, dtype=bool)
    done = work.units[1]
    missing[done.rows] = False
    later = _scoring_tasks(work.sets, np.arange(EXAMPLES), missing, workers=2)
    assert [unit.name for unit in later] == [unit.name for unit in work.units if unit is not done]
    assert [unit.rows.tolist() for unit in later] == [unit.rows.tolist() for unit in work.units if unit is not done]


def test_units_together_are_what_is_missing_once(work: Work) -> None:
    missing = np.arange(EXAMPLES) % 3 != 0
    rows = np.concatenate([unit.rows for unit in _scoring_tasks(work.sets, np.arange(EXAMPLES), missing, workers=2)])
    assert sorted(rows.tolist()) == np.flatnonzero(missing).tolist()


def test_store_tells_examples_that_differ_in_their_last_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path))
    store = ReferenceStore("model", "fp32")
    keys = [bytes(35) + bytes([n]) for n in range(4)]
    store.add("one", pa.array(keys[:2], pa.binary(36)), [-1.0, -2.0])
    store.add("other", pa.array(keys[2:3], pa.binary(36)), [-3.0])
    found = store.look_up(pa.array(keys[::-1], pa.binary(36)))
    np.testing.assert_array_equal(found, np.array([np.nan, -3, -2, -1], np.float32))
    assert np.isnan(ReferenceStore("model", "bf16").look_up(pa.array(keys, pa.binary(36)))).all()
    assert np.isnan(ReferenceStore("other", "fp32").look_up(pa.array(keys, pa.binary(36)))).all()


# --- what a model's fingerprint costs ---


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files whose content is read for their digest."""
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))
    names: list[str] = []
    whole = hashlib.file_digest

    def counted(content: Any, algorithm: str) -> Any:
        names.append(Path(content.name).name)
        return whole(content, algorithm)

    monkeypatch.setattr("raydiv.utils.cache.hashlib.file_digest", counted)
    return names


def test_weights_are_read_for_their_fingerprint_once(model: Path, tmp_path: Path, digested: list[str]) -> None:
    mine = tmp_path / "model"
    shutil.copytree(model, mine)
    before = fingerprint(mine)
    assert sorted(digested) == ["config.json", "model.safetensors"]
    digested.clear()
    assert fingerprint(mine) == before
    assert digested == []

    weights = mine / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    assert fingerprint(mine) == before
    assert digested == ["model.safetensors"]
    digested.clear()

    at = weights.stat().st_mtime_ns
    with weights.open("ab") as file:
        file.write(b"x")
    os.utime(weights, ns=(at, at))
    assert fingerprint(mine) != before
    assert digested == ["model.safetensors"]


def test_fingerprint_knows_content_and_not_the_directory(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other" / "notes.txt").write_text("x")
    assert fingerprint(tmp_path / "other") == fingerprint(model)
    nudge_a_weight(tmp_path / "other")
    assert fingerprint(tmp_path / "other") != fingerprint(model)


def test_blob_of_the_hub_is_known_by_its_name(model: Path, tmp_path: Path, digested: list[str]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        content = (model / file).read_bytes()
        # large files go by their SHA-256 there, small ones by git's 40 digits
        name = hashlib.sha256(content).hexdigest() if file.endswith(".safetensors") else "0" * 40
        (blobs / name).write_bytes(content)
        (snapshot / file).symlink_to(blobs / name)
    found = fingerprint(snapshot)
    assert digested == ["0" * 40]
    assert found == fingerprint(model)


# --- two processes, each with a Ray of its own ---

PREPARE = """
import json, sys
from raydiv import load_recipe
from raydiv.commands.prepare import prepare
from raydiv.runs.progress import ProgressDisplay
found = prepare(load_recipe(sys.argv[1]), ProgressDisplay(quiet=True))
print(json.dumps(found.summary() | {"logps": found.train.reference_logps.tolist()}))
"""


@pytest.mark.long
def test_two_processes_at_once_share_the_work(first: PreparedData, model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(model, data).model_dump(mode="json", by_alias=True)))
    environment = os.environ | {"RAYDIV_CACHE": str(tmp_path / "cache")}
    environment.pop("RAY_ADDRESS", None)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    printed = [one.communicate() for one in running]
    assert [one.returncode for one in running] == [0, 0], [errors[-2000:] for _, errors in printed]
    summaries = [json.loads(output.splitlines()[-1]) for output, _ in printed]
    for summary in summaries:
        assert summary["fingerprint"] == first.train.examples.fingerprint
        assert summary["reference"]["hits"] + summary["reference"]["misses"] == EXAMPLES
        np.testing.assert_allclose(summary["logps"], first.train.reference_logps, rtol=1e-5)
    assert sum(summary["reference"]["misses"] for summary in summaries) >= EXAMPLES
    rows = [pq.read_metadata(path).num_rows for path in parts(tmp_path / "cache")]
    assert sum(rows) == EXAMPLES  # a unit that both scored is one part


def test_texts_beside_the_data_are_scored_once_too(
    tiny_model: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydiv.data import reference_scorer
    from raydiv.data.tokens import content_keys
    from raydiv.model.load import ModelSource

    asked: list[int] = []

    def score(model: Any, examples: Any, cluster: Any, progress: Any) -> list[float]:
        asked.append(len(examples))
        return [-float(len(response)) for _, response in examples]

    monkeypatch.setattr(reference_scorer, "score", score)
    model, first = ModelSource(tiny_model), [([3, 4], [5, 6]), ([3], [4]), ([3, 4], [5])]
    once = lambda examples, of=model: reference_scorer.score_once(of, examples, ClusterConfig())  # noqa: E731
    assert once(first) == [-2, -1, -1]
    assert once([([9], [9, 9, 9]), *first]) == [-3, -2, -1, -1]
    assert once(first[::-1]) == [-1, -1, -2]
    assert once(first, ModelSource(tiny_model, precision="bf16")) == [-2, -1, -1]
    assert asked == [3, 1, 3]
    # the same entries as those of the data
    assert len(set(content_keys(first).to_pylist())) == 3
