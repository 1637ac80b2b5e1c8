"""Whole runs on a tiny model through the real thing: Ray Data, Ray Train, ZeRO-3 workers, MLflow, the run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from helpers.models import make_model
from helpers.ranks import run_on_ranks
from helpers.small_run import recipe_of
from helpers.worker_alone import prepared, train_each
from raydiv.cli import main
from raydiv.commands.prepare import load_inputs, prepare, prepare_data
from raydiv.commands.train import Result, train
from raydiv.config import Recipe, load_recipe
from raydiv.config.loss import TYPES
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.storage import read_json

pytestmark = pytest.mark.slow

STEP_METRICS = {
    *("step", "epoch", "loss", "divergence", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds"),
    *("reward/aligned", "reward/unaligned", "reward/margin", "reward/accuracy", "logp/aligned", "logp/unaligned"),
    *("log_ratio/rms", "peak_memory_bytes", "state/kldo/log_mean"),
    *("divergence/ema", "divergence/name", "divergence/ceiling", "reward/margin/ema"),
}


@pytest.fixture(scope="module")
def run(ray: None, tiny_model: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A full fine-tune by two ZeRO-3 workers, measured before and after."""
    measured = [f"separation.prompts={files['prompts']}", f"evaluate.prompts={files['prompts']}", "evaluate.every=2"]
    measured += [
        "evaluate.depth_every=1",
        "separation.every=2",
        "evaluate.attacks=[prefill]",
        f"evaluate.pairwise_judge={tiny_model}",
    ]
    output = tmp_path_factory.mktemp("runs")
    return train(
        recipe_of(tiny_model, files, output, "full", "evaluate.max_new_tokens=8", *measured),
        ProgressDisplay(quiet=True),
    )


def records(run_directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def test_run_directory_is_complete(run: Result) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "result.json", "report.html", "model/config.json", "model/README.md"):
        assert (run.run.path / name).is_file(), name
    assert (run.run.pictures / "plane-after.png").read_bytes().startswith(b"\x89PNG")
    assert {name: len(found) for name, found in read_json(run.run.rewards).items()} == {"aligned": 3, "unaligned": 3}
    result = json.loads((run.run.path / "result.json").read_text())
    assert {"raydiv", "ray", "torch", "deepspeed", "python"} <= result["versions"].keys()
    assert result["data"]["train"]["pairs"] == 12
    assert result["metrics"]["loss"] == run.metrics["loss"]
    assert result["steps"] == {"planned": 4, "taken": 4, "ended": "all steps are done"}


def test_step_metrics_are_all_there_and_gapless(run: Result) -> None:
    steps = [record for record in records(run.run.path) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert record.keys() >= STEP_METRICS
        assert record["divergence"] <= record["divergence/ceiling"] == pytest.approx(np.log(2))
        assert record["divergence/name"] == "KL(D+ || 0.5 D+ + 0.5 D-)"
    assert [record["lr"] for record in steps] == pytest.approx([3e-3, 3e-3, 2.25e-3, 7.5e-4])
    evaluated = [record["step"] for record in records(run.run.path) if "eval/loss" in record]
    assert evaluated == [0, 2, 4]


def test_training_separates_the_classes(run: Result) -> None:
    margins = [record["eval/reward/margin"] for record in records(run.run.path) if "eval/loss" in record]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > 0
    means = {name: np.mean(found) for name, found in read_json(run.run.rewards).items()}
    assert means["aligned"] - means["unaligned"] == pytest.approx(margins[-1], abs=1e-5)


def test_examples_know_their_place_in_the_data(run: Result, files: dict[str, str]) -> None:
    recipe, display = run.run.read_recipe(), ProgressDisplay(quiet=True)
    opened = load_inputs(recipe, display)
    stored = prepare_data(recipe, opened, display).train.examples
    rows = np.arange(len(stored))
    lines = Path(files["train"]).read_text().splitlines()
    for place, (prompt, _) in zip(stored.places(rows), stored.ids(rows), strict=True):
        file, _, line = opened.locate(place).rpartition(":")
        assert file.endswith("train.jsonl")
        assert json.loads(lines[int(line) - 1])["prompt"] in opened.chat.decode(prompt.tolist())


def test_depth_is_measured_from_the_policy_before_its_first_step(run: Result) -> None:
    depths = [record for record in records(run.run.path) if "eval/depth/half" in record]
    # none where the margin is not positive, as it may be after one step; the last is the written model's
    assert [record["step"] for record in depths][-3:] == [2, 3, 4]
    assert all(1 <= record["eval/depth/half"] <= 64 for record in depths)
    held_out = prepare(run.run.read_recipe(), ProgressDisplay(quiet=True)).eval
    assert held_out is not None
    kept = read_json(run.run.depth_reference)
    assert [len(values) for values in kept] == held_out.examples.response_lengths.tolist()
    np.testing.assert_allclose([sum(values) for values in kept], held_out.reference_logps, rtol=1e-5, atol=1e-4)


def test_answers_are_measured_beside_what_they_drifted_from(run: Result) -> None:
    before, after = (json.loads((run.run.evaluation / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["kl"] is None
    # an estimate of something near 0, which may fall below it
    assert after["kl"]["value"] != 0
    assert after["kl"]["answers"] == 12
    assert after["perplexity"] != before["perplexity"]
    assert {"evaluate/asr", "evaluate/asr/prefill", "evaluate/safety"} <= after["rates"].keys()
    assert after["win_rate"]["of"] == 6
    assert "win_rate" not in before
    assert run.report["data"]["evaluation_prompts_trained_on"] == {recipe_prompts(run): 0}


def recipe_prompts(run: Result) -> str:
    """The file of prompts, which both measurements take."""
    [source] = run.run.read_recipe().evaluate.prompts or []
    return source.path


def test_recipe_in_the_run_reloads_exactly(run: Result) -> None:
    recipe = load_recipe(run.run.path / "recipe.yaml")
    assert recipe.loss.terms[1].weight == 0.5
    assert load_recipe(recipe.model_dump(by_alias=True)) == recipe


def test_report_is_self_contained_and_shows_no_prompt(run: Result) -> None:
    page = (run.run.path / "report.html").read_text()
    assert page.count("<figure>") == len(list(run.run.pictures.iterdir())) == 12
    assert "http://" not in page
    assert "https://" not in page
    assert "Hurt someone" not in page
    answers = (run.run.path / "evaluation" / "after.answers.jsonl").read_text()
    # each asked directly, and the six harmful ones with a compliant opening
    assert len(answers.splitlines()) == 12 + 6
    assert "Hurt someone" not in answers


def test_mlflow_has_parameters_metrics_tags_and_artifacts(run: Result) -> None:
    from mlflow import MlflowClient

    where = run.report["mlflow"]
    client = MlflowClient(where["uri"])
    found = client.get_run(where["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["loss.skew"] == "0.5"
    assert found.data.params["loss.mix.sft.weight"] == "0.5"
    assert {"data.fingerprint", "model.fingerprint", "version.ray"} <= found.data.tags.keys()
    assert found.data.tags["divergence.name"] == "KL(D+ || 0.5 D+ + 0.5 D-)"
    assert [metric.step for metric in client.get_metric_history(where["run_id"], "loss")] == [1, 2, 3, 4]
    assert {metric.step for metric in client.get_metric_history(where["run_id"], "separation/d_b")} == {0, 2, 4}
    pictures = {path.name for path in run.run.pictures.iterdir()}
    kept = {file.path for file in client.list_artifacts(where["run_id"])}
    assert kept >= {"report.html", "result.json", "plane-before.png", *pictures}


def test_exported_model_loads_and_generates(run: Result, tmp_path: Path, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", str(run.run.path), str(tmp_path / "exported")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Mend it"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)


def test_training_into_a_run_is_refused(run: Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run.run.path / "recipe.yaml")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a run already" in message
    assert "name=" in message


def test_reference_is_paid_once(run: Result, tiny_model: Path, files: dict[str, str], tmp_path: Path) -> None:
    changed = ("loss.beta=0.3", "optim.lr=0.5", "loss.type=dpo", "cluster.num_workers=1", "seed=9")
    again = prepare(recipe_of(tiny_model, files, tmp_path, "again", *changed), ProgressDisplay(quiet=True))
    assert (again.reference_hits, again.reference_misses) == (30, 0)


def test_a_changed_token_misses_that_example_alone(
    run: Result, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    lines = Path(files["train"]).read_text().splitlines()
    lines[0] = lines[0].replace("about 0", "about zero")
    edited = files | {"train": str(tmp_path / "edited.jsonl")}
    Path(edited["train"]).write_text("\n".join(lines) + "\n")
    found = prepare(recipe_of(tiny_model, edited, tmp_path, "edited"), ProgressDisplay(quiet=True))
    assert (found.reference_hits, found.reference_misses) == (29, 1)


def test_a_changed_weight_never_hits(run: Result, tiny_model: Path, files: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    found = prepare(recipe_of(tmp_path / "other", files, tmp_path, "other"), ProgressDisplay(quiet=True))
    assert (found.reference_hits, found.reference_misses) == (0, 30)


def train_on_ranks(recipes: list[Recipe], ranks: int, folder: Path) -> list[RunDirectory]:
    """Runs that the workers make one after another, without Ray Train."""
    run_on_ranks(train_each, ranks, folder, [cloudpickle.dumps(prepared(recipe)) for recipe in recipes])
    return [RunDirectory.of(recipe) for recipe in recipes]


@pytest.mark.long
def test_lora_with_adapters_off_is_the_stored_reference(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """The two references agree, the adapter is what is saved, and its export is merged."""
    from transformers import AutoModelForCausalLM

    lora = ("model.lora.r=4", "cluster.num_workers=1", "engine.zero_stage=0")
    recipes = [
        recipe_of(tiny_model, files, tmp_path, "stored", *lora),
        recipe_of(tiny_model, files, tmp_path, "off", *lora, "model.reference=adapter-off"),
    ]
    stored, off = train_on_ranks(recipes, 1, tmp_path / "ranks")
    losses = [[r["loss"] for r in records(run.path) if "loss" in r] for run in (stored, off)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (stored.model / "adapter_model.safetensors").is_file()
    assert not (stored.model / "model.safetensors").exists()
    assert main(["export", str(stored.path), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    changed = {
        n for n, p in merged.named_parameters() if not np.array_equal(p.detach(), base.get_parameter(n).detach())
    }
    assert changed
    assert all("proj" in name for name in changed)


@pytest.mark.long
@pytest.mark.parametrize("variant", ["model.lora.use_dora=false", "model.lora.use_dora=true"])
def test_training_goes_on_from_the_adapters_of_a_run(
    variant: str, ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """The policy starts as its reference, which is the model with the first run's adapters, under ZeRO-3."""
    changes = ("engine.zero_stage=3", "evaluate.every=null", "data.eval=null")
    first = recipe_of(tiny_model, files, tmp_path, "first", *changes, "model.lora.r=4", variant)
    (first_run,) = train_on_ranks([first], 2, tmp_path / "first ranks")
    second = recipe_of(tiny_model, files, tmp_path, "second", *changes, f"model.adapter={first_run.path}")
    found = prepare(second.model_copy(update={"name": "before"}), ProgressDisplay(quiet=True))
    assert (found.reference_hits, found.reference_misses) == (0, 24)
    (run,) = train_on_ranks([second], 2, tmp_path / "second ranks")
    steps = [record for record in records(run.path) if "loss" in record]
    assert abs(steps[0]["log_ratio/max"]) < 1e-4 < abs(steps[-1]["log_ratio/max"])
    again = prepare(second.model_copy(update={"name": "again"}), ProgressDisplay(quiet=True))
    assert (again.reference_hits, again.reference_misses) == (24, 0)
    assert main(["export", str(run.path), str(tmp_path / "merged")]) == 0


@pytest.mark.long
def test_target_margin_stops_early_and_says_so(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    stopping = ("optim.steps=30", "optim.lr=0.02", "optim.target_margin=0.3", "cluster.num_workers=1")
    result = train(recipe_of(tiny_model, files, tmp_path, "stopped", *stopping), ProgressDisplay(quiet=True))
    steps = [record for record in records(result.run.path) if "loss" in record]
    margins = [record["reward/margin/ema"] for record in steps]
    assert len(steps) < 30
    assert margins[-1] >= 0.3 > max(margins[:-1])
    assert records(result.run.path)[-1].keys() >= {"eval/loss"}
    ended = "the margin is at optim.target_margin"
    assert result.report["steps"] == {"planned": 30, "taken": len(steps), "ended": ended}
    assert f"stopped after {len(steps)} of 30 updates" in result.run.report.read_text()


def short(loss: str, model: Path, files: dict[str, str], folder: Path, *more: str) -> Recipe:
    changes = (f"loss.type={loss}", "loss.mix=null", "optim.steps=2", "cluster.num_workers=1", "engine.zero_stage=0")
    made: Recipe = recipe_of(model, files, folder, loss, *changes, *more)
    return made


@pytest.mark.parametrize(
    "position",
    ["{kind: decay, rate: 0.9}", "{kind: first, tokens: 2, weight: 0.2}", "{kind: common-length, weight: 0.5}"],
)
def test_policy_and_reference_have_the_same_weights_of_positions(
    position: str, ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """At the first step the policy is the reference: every log-ratio is 0, by the stored ones and with adapters off."""
    changes = (f"loss.position={position}", "loss.mix=null", "optim.steps=2", "engine.zero_stage=0")
    lora = ("model.lora.r=4", "model.reference=adapter-off")
    recipes = [
        recipe_of(tiny_model, files, tmp_path, name, *changes, *more) for name, more in (("stored", ()), ("off", lora))
    ]
    for run in train_on_ranks(recipes, 1, tmp_path / "ranks"):
        assert_starts_at_the_reference(run)


def assert_starts_at_the_reference(run: RunDirectory) -> None:
    steps = [record for record in records(run.path) if "loss" in record]
    assert abs(steps[0]["log_ratio/max"]) < 1e-4
    assert abs(steps[1]["log_ratio/max"]) > 1e-3


def test_rules_by_token_start_at_the_reference(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """With mismatched examples, and for a loss that has no reference otherwise."""
    other = make_model(tmp_path / "other", seed=1)
    constrained = "loss.position={kind: constrained, betas: [0.5, 2, 0.1]}"
    rewarded = f"loss.position={{kind: rewarded, model: {other}, temperature: 3}}"
    cells = [("kto", constrained), ("sft", constrained), ("dpo", rewarded)]
    recipes = [short(loss, tiny_model, files, tmp_path, position) for loss, position in cells]
    for run in train_on_ranks(recipes, 1, tmp_path / "ranks"):
        assert_starts_at_the_reference(run)


def test_objectives_train_with_mismatched_examples_and_without_a_reference(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    assert_train(["kto", "sft"], tiny_model, files, tmp_path)


@pytest.mark.long
def test_every_objective_trains(ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path) -> None:
    assert_train(TYPES, tiny_model, files, tmp_path)


def assert_train(losses: Sequence[str], model: Path, files: dict[str, str], folder: Path) -> None:
    for run in train_on_ranks([short(name, model, files, folder) for name in losses], 1, folder / "ranks"):
        assert run.stage.read().end_reason == "all steps are done", run.path
        assert run.metrics.steps_taken() == 2
        assert all(np.isfinite(line["loss"]) for line in run.metrics.read() if "loss" in line)


def test_more_workers_than_cpus_are_refused(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raydiv.config import save_recipe

    save_recipe(recipe_of(tiny_model, files, tmp_path, "many", "cluster.num_workers=64"), tmp_path / "many.yaml")
    assert main(["train", str(tmp_path / "many.yaml")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("model and data")]
    assert len(errors) == 1
    assert "cluster.num_workers: 64 workers" in errors[0]
    assert not (tmp_path / "many" / "recipe.yaml").exists()
