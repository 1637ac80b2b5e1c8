"""The written model is the trained one, or it is rejected."""

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
from raydiv.training.export_check import ExportVerification

EXAMPLES = [(list(range(7, 7 + n)), [*range(40 + n, 70 - n), 2]) for n in range(1, 13)]


def recipe_of(model: Path, lora: bool, precision: str = "fp32") -> Recipe:
    section = {"id": str(model), **({"lora": {"r": 3}} if lora else {})}
    return load_recipe(
        {"model": section, "loss": {"type": "dpo"}, "optim": {"steps": 1}, "engine": {"precision": precision}}
    )


def logps_under(policy: Any) -> torch.Tensor:
    """Log-probs [t] of the responses' tokens, from whole logits."""
    logps = []
    for prompt, response in EXAMPLES:
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
        logps.append(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return torch.cat(logps).detach()


def test_the_written_model_stops_where_its_responses_end(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora=False)
    policy = changed_policy(tiny_model, recipe)
    changes = recipe.data.model_copy(update={"end_of_turn": "<|user|>"})
    recipe = recipe.model_copy(update={"data": changes})
    write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", lambda _: None)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [3, 2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_trained_model_is_written(lora: bool, precision: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora, precision)
    policy = changed_policy(tiny_model, recipe)
    verification = ExportVerification(EXAMPLES, logps_under(policy))
    write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", verification.check(recipe))
    written = logps_under(ModelSource.from_recipe(recipe, tmp_path / "model").load_unmerged())
    torch.testing.assert_close(written, verification.logps, rtol=0, atol=1e-4)
    # again, over the files of an interrupted attempt
    write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", verification.check(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("damage", ["another", "nan", "one layer"])
def test_a_model_that_differs_is_rejected(
    lora: bool, damage: str, precision: str, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_model, lora, precision)
    policy = changed_policy(tiny_model, recipe)
    verification, state = ExportVerification(EXAMPLES, logps_under(policy)), gathered_weights(policy)
    if damage == "one layer":  # as in the base
        base = {} if lora else dict(ModelSource(tiny_model).load().named_parameters())
        for name, weight in state.items():
            if ".layers.1." in name and (name in base or "lora_B" in name):
                state[name] = base[name].detach().to(weight.dtype) if name in base else torch.zeros_like(weight)
    else:
        name = next(name for name in state if "lora_B" in name or "mlp" in name)
        state[name] = state[name] + (float("nan") if damage == "nan" else 0.3)
    with pytest.raises(RuntimeError, match=r"not the trained one.*model\.rejected"):
        write_model(policy, state, tiny_model, recipe, tmp_path / "model", verification.check(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["model.rejected"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_of_another_scale_are_rejected(precision: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora=True, precision=precision)
    policy = changed_policy(tiny_model, recipe)
    check = ExportVerification(EXAMPLES, logps_under(policy)).check(recipe)

    def check_with_half_of_alpha(directory: Path) -> None:
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))
        check(directory)

    with pytest.raises(RuntimeError, match="not the trained one"):
        write_model(policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", check_with_half_of_alpha)


def test_adapters_that_merge_into_another_model_are_rejected(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    recipe = recipe_of(tiny_model, lora=True, precision="bf16")
    policy = changed_policy(tiny_model, recipe)
    verification, delta = ExportVerification(EXAMPLES, logps_under(policy)), Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, adapter: delta(layer, adapter) / 2)
    with pytest.raises(RuntimeError, match="merged into the base are not the trained ones"):
        write_model(
            policy, gathered_weights(policy), tiny_model, recipe, tmp_path / "model", verification.check(recipe)
        )


def test_a_written_model_is_checked_on_the_device_that_holds_it(tiny_model: Path, tmp_path: Path) -> None:
    """On a GPU, 4-bit weights are loaded there: the examples must follow them."""
    recipe = recipe_of(tiny_model, lora=False)
    policy = changed_policy(tiny_model, recipe)
    verification = ExportVerification(EXAMPLES, logps_under(policy))
    devices: list[torch.device] = []

    def run_on_meta(module: Any, inputs: Any, keywords: dict[str, Any]) -> Any:
        devices.extend(value.device for value in keywords.values() if isinstance(value, torch.Tensor))
        raise StopIteration

    meta = policy.to("meta")
    meta.register_forward_pre_hook(run_on_meta, with_kwargs=True)
    with pytest.raises(StopIteration):
        verification._logps_of(meta)
    assert {device.type for device in devices} == {"meta"}


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
        merged = logps_under(ModelSource(tmp_path / "merged").load())
        torch.testing.assert_close(merged, verification, rtol=0, atol=1e-4)


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
