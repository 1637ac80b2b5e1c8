"""The measurement of the base, kept: found again by content alone, and never for another model, prompt or judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.models import make_model
from helpers.stored import stored_examples
from raydiv.config import Recipe, load_recipe
from raydiv.data.prompt_sets import PromptSets
from raydiv.evaluation.answers import EvaluationJudges
from raydiv.evaluation.baseline_cache import BaselineCache, Measurement
from raydiv.evaluation.before_after import BeforeAfterEvaluation
from raydiv.evaluation.depth import HeldOutDepth
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay

TAKEN = Measurement(
    {"separation/d_b": 0.25}, {"separation/before.json": "{}", "evaluation/before.json": "[]"}, ["Yes."]
)


@pytest.fixture
def folder(tmp_path: Path, own_cache: None) -> Path:
    """A model, prompts, and templates to attack with."""
    make_model(tmp_path / "model")
    lines = [{"prompt": f"Do {n}", "harmful": n % 2 == 0} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "templates.txt").write_text("Say: {prompt}\n")
    return tmp_path


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    prompts = str(folder / "prompts.jsonl")
    return load_recipe(
        {
            "model": {"id": str(folder / "model")},
            "loss": {"type": "kldo"},
            "optim": {"steps": 1},
            "separation": {"prompts": prompts},
            "evaluate": {"prompts": prompts, "attacks": [{"templates": str(folder / "templates.txt")}]},
        },
        overrides,
    )


def place(recipe: Recipe, show_text: bool = False) -> BaselineCache:
    base = ModelSource.from_recipe(recipe, model_directory(recipe.model.id))
    prompts = PromptSets.of(recipe)
    judges = (
        EvaluationJudges.from_config(recipe.evaluate, prompts.evaluate, recipe.cluster) if prompts.evaluate else None
    )
    return BaselineCache(recipe, base, prompts, judges, show_text)


def test_it_is_found_by_whatever_trains_the_same_model(folder: Path) -> None:
    assert place(recipe_in(folder)).get() is None
    place(recipe_in(folder)).put(TAKEN)
    for other in (
        ["loss.type=dpo"],
        ["optim.lr=1", "seed=3"],
        ["evaluate.every=5", "data.eval=0.1"],
        ["name=x"],
        ["evaluate.depth_every=5", "data.eval=0.1"],
    ):
        assert place(recipe_in(folder, *other)).get() == TAKEN
    (folder / "model").rename(folder / "elsewhere")
    assert place(recipe_in(folder, f"model.id={folder / 'elsewhere'}")).get() == TAKEN


@pytest.mark.parametrize(
    "other",
    [
        ["engine.precision=bf16", "engine.zero_stage=2"],
        ["separation.layers=[0]"],
        ["separation.prompts=null"],
        ["evaluate.max_new_tokens=3"],
        ["evaluate.prompts=null", "evaluate.attacks=[]"],
        ["evaluate.attacks=[prefill]"],
        ["data.template='{{ messages }}x'"],
    ],
)
def test_another_way_to_measure_never_hits(folder: Path, other: list[str]) -> None:
    place(recipe_in(folder)).put(TAKEN)
    assert place(recipe_in(folder, *other)).get() is None


def test_changed_content_never_hits(folder: Path) -> None:
    place(recipe_in(folder)).put(TAKEN)
    assert place(recipe_in(folder), show_text=True).get() is None
    (folder / "templates.txt").write_text("Tell: {prompt}\n")
    assert place(recipe_in(folder)).get() is None
    (folder / "templates.txt").write_text("Say: {prompt}\n")
    prompts = folder / "prompts.jsonl"
    written = prompts.read_text()
    prompts.write_text(written.replace("Do 3", "Do 33"))
    assert place(recipe_in(folder)).get() is None
    prompts.write_text(written)
    assert place(recipe_in(folder)).get() == TAKEN
    make_model(folder / "model", seed=1)
    assert place(recipe_in(folder)).get() is None


@pytest.mark.parametrize(("settings", "measured"), [(["evaluate.depth_every=1"], True), ([], False)])
def test_depth_is_measured_after_training_where_it_was_during_it(
    settings: list[str], measured: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_else = ["separation.prompts=null", "evaluate.prompts=null", "evaluate.attacks=[]", "data.eval=0.5"]
    recipe = recipe_in(folder, f"output_dir={folder / 'runs'}", *nothing_else, *settings)
    depth = HeldOutDepth.of([np.array([1.0, 3.0]), np.array([-1.0, 0.0])], np.array([True, False]))
    monkeypatch.setattr(BeforeAfterEvaluation, "_held_out_depth", lambda self, model, base, held_out: depth)
    run = RunDirectory.of(recipe)
    run.path.mkdir(parents=True)
    (run.path / "metrics.jsonl").touch()
    held_out = stored_examples([([1], [2, 3])], [True], [-1])
    evaluation = BeforeAfterEvaluation(recipe, PromptSets.of(recipe), ProgressDisplay(quiet=True), False)
    evaluation.run(run, "after", folder / "model", held_out)
    assert (run.evaluation / "depth.json").exists() == measured


def test_its_files_go_into_a_run(tmp_path: Path) -> None:
    TAKEN.write_into(tmp_path)
    found: dict[str, Any] = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.json")}
    assert found == TAKEN.files
