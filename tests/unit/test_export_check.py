"""The written model is the trained one, or it is removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.policies import changed_policy, gathered_weights
from raydiv.commands.export import export
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.model.export import write_model
from raydiv.model.load import ModelSource
from raydiv.runs.directory import RunDirectory
from raydiv.training.export_check import ExportVerification, logps_of

EXAMPLES = [([7, 8, 9, 10], [11, 12, 2]), ([20, 21], [22, 23, 24, 25, 2])]


def recipe_of(model: Path, lora: bool) -> Recipe:
    section = {"id": str(model), **({"lora": {"r": 3}} if lora else {})}
    return load_recipe({"model": section, "loss": {"type": "dpo"}, "optim": {"steps": 1}})


def logps_under(policy: Any) -> torch.Tensor:
    """Log-probs from whole logits."""
    logps = []
    for prompt, response in EXAMPLES:
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        positions = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        logps.append(sum(logits[position, token] for position, token in zip(positions, response, strict=True)))
    return torch.stack(logps).detach()


def test_the_written_model_stops_where_its_responses_end(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora=False)
    policy = changed_policy(tiny_model, recipe)
    changes = recipe.data.model_copy(update={"end_of_turn": "<|user|>"})
    recipe = recipe.model_copy(update={"data": changes})
    write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", lambda _: None)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [3, 2]


@pytest.mark.parametrize("lora", [False, True])
def test_the_trained_model_is_written(lora: bool, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora)
    policy = changed_policy(tiny_model, recipe)
    verification = ExportVerification(EXAMPLES, logps_under(policy))
    write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", verification.check(recipe))
    logps = logps_of(ModelSource.from_recipe(recipe, tmp_path / "model"), EXAMPLES)
    torch.testing.assert_close(logps, verification.logps, rtol=0, atol=1e-4)
    # again, over the files of an interrupted attempt
    write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", verification.check(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("damage", ["another", "nan"])
def test_a_model_that_differs_is_removed(lora: bool, damage: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora)
    policy = changed_policy(tiny_model, recipe)
    verification, state = ExportVerification(EXAMPLES, logps_under(policy)), gathered_weights(policy)
    name = next(name for name in state if "lora_B" in name or "mlp" in name)
    state[name] = state[name] + (float("nan") if damage == "nan" else 0.3)
    with pytest.raises(RuntimeError, match="not the trained one"):
        write_model(policy, state, tiny_model, recipe, tmp_path / "model", verification.check(recipe))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [0.0, 0.5])
def test_a_merged_model_that_differs_is_removed(
    damage: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_model, lora=True)
    policy = changed_policy(tiny_model, recipe)
    verification, run = logps_under(policy), RunDirectory(tmp_path / "run")
    run.path.mkdir()
    save_recipe(recipe, run.recipe)
    write_model(policy, gathered_weights(policy), tiny_model, recipe, run.model, lambda _: None)
    save = LlamaForCausalLM.save_pretrained

    def save_damaged(model: Any, *args: Any, **options: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += damage
        save(model, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_damaged)
    if damage:
        with pytest.raises(RuntimeError, match="not the trained one: its logits"):
            export(run.path, tmp_path / "merged")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    else:
        export(run.path, tmp_path / "merged")
        logps = logps_of(ModelSource(tmp_path / "merged"), EXAMPLES)
        torch.testing.assert_close(logps, verification, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_missing_or_empty_weights_are_refused(lora: bool, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora)
    policy = changed_policy(tiny_model, recipe)
    state = gathered_weights(policy)
    name = sorted(state)[1]
    for partial in (
        {key: value for key, value in state.items() if key != name},
        state | {name: torch.zeros(0)},
        {},
    ):
        with pytest.raises(RuntimeError, match="empty or missing"):
            write_model(policy, partial, tiny_model, recipe, tmp_path / "model", lambda _: None)
    assert list(tmp_path.iterdir()) == []
