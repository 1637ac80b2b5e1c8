"""Adapters: training that goes on from some, and the options of LoRA that PEFT has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import make_model
from helpers.policies import changed_policy, write_policy, write_run
from raydiv.commands.prepare import load_inputs
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.model.load import ModelSource, build_policy
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError


def recipe_of(model: Path, **section: Any) -> Recipe:
    content = {"model": {"id": str(model), **section}, "loss": {"type": "dpo"}, "optim": {"steps": 1}}
    return load_recipe(content | {"data": {"train": "bundled:preference"}})


def logits_of(policy: Any) -> torch.Tensor:
    with torch.inference_mode():
        return policy(input_ids=torch.tensor([[5, 6, 7, 8]])).logits  # type: ignore[no-any-return]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run with trained adapters."""
    recipe = recipe_of(tiny_model, lora={"r": 3, "alpha": 5, "target_modules": ["q_proj", "down_proj"]})
    return write_run(tiny_model, recipe, tmp_path / "sft").path


@pytest.mark.parametrize("named", ["sft", "sft/model"])
def test_training_starts_from_the_adapter_and_is_written_as_one_of_its_base(
    named: str, run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_model, adapter=str(tmp_path / named))
    assert recipe.model.lora is not None
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (3, 5)
    assert sorted(recipe.model.lora.target_modules) == ["down_proj", "q_proj"]
    start = load_inputs(recipe, ProgressDisplay(quiet=True)).model_directory
    policy = build_policy(start, recipe.model, torch.float32).eval()
    assert {name.split(".")[-3] for name, weight in policy.named_parameters() if weight.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    merged = ModelSource.from_recipe(recipe, start)
    torch.testing.assert_close(logits_of(policy), logits_of(merged.load().eval()), rtol=0, atol=1e-5)

    second = changed_policy(start, recipe)
    written = write_policy(second, start, recipe, tmp_path / "kldo")
    assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    torch.testing.assert_close(logits_of(second), logits_of(ModelSource(written).load().eval()), rtol=0, atol=1e-5)
    assert ModelSource(written).fingerprint() != merged.fingerprint() != ModelSource(tiny_model).fingerprint()


def test_an_adapter_has_its_own_settings(run: Path, tiny_model: Path) -> None:
    for given in ({"r": 3}, {"target_modules": "all-linear"}, {"target_modules": ["down_proj", "q_proj"]}):
        assert recipe_of(tiny_model, adapter=str(run), lora=given).model.lora.r == 3  # type: ignore[union-attr]
    for given in ({"r": 4}, {"alpha": 32}, {"use_dora": True}, {"target_modules": ["q_proj"]}):
        with pytest.raises(UserError, match=r"its lora\.\w+ is .*remove model\.lora"):
            recipe_of(tiny_model, adapter=str(run), lora=given)
    with pytest.raises(UserError, match="adapter-off"):
        recipe_of(tiny_model, adapter=str(run), reference="adapter-off")


def test_a_recipe_is_read_after_its_adapter_is_gone(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, adapter=str(run))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    shutil.rmtree(run)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(UserError, match="no adapter in"):
        recipe_of(tiny_model, adapter=str(run))


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", hidden=64)
    with pytest.raises(UserError, match=r"model\.adapter: .*not the model\.id"):
        load_inputs(recipe_of(other, adapter=str(run)), ProgressDisplay(quiet=True))


def test_an_adapter_of_another_kind_is_refused(run: Path, tiny_model: Path) -> None:
    path = run / "model" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="IA3"):
        recipe_of(tiny_model, adapter=str(run))


@pytest.mark.parametrize(
    ("lora", "adapted"),
    [
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "v_proj"]}, {"k", "o", "gate", "up", "down"}),
        ({"target_modules": r".*\.layers\.1\..*\.(q|v)_proj"}, {"q", "v"}),
        ({"target_modules": ["q_proj"], "use_dora": True}, {"q"}),
    ],
)
def test_modules_are_chosen_as_peft_does(lora: dict[str, Any], adapted: set[str], tiny_model: Path) -> None:
    policy = build_policy(tiny_model, recipe_of(tiny_model, lora=lora).model, torch.float32)
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert {name.split("_proj")[0].rpartition(".")[2] for name in trained} == adapted
    assert any("lora_magnitude_vector" in name for name in trained) == lora.get("use_dora", False)


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_variants_are_written_as_they_were_trained(option: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, lora={"r": 4, "alpha": 8, option: True})
    policy = changed_policy(tiny_model, recipe)
    written = write_policy(policy, tiny_model, recipe, tmp_path / "model")
    assert json.loads((written / "adapter_config.json").read_text())[option] is True
    torch.testing.assert_close(logits_of(policy), logits_of(ModelSource(written).load().eval()), rtol=0, atol=1e-5)
    scale = 8 / 4**0.5 if option == "use_rslora" else 8 / 4
    scalings = [getattr(layer, "scaling", None) for layer in policy.modules()]
    assert {scaling["default"] for scaling in scalings if isinstance(scaling, dict)} == {scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_changes_neither_log_probs_nor_gradients_on_4_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """bitsandbytes repacks the weights of a CPU at the first evaluation, for a kernel without a backward."""
    pytest.importorskip("bitsandbytes")
    model = make_model(tmp_path / "model", hidden=64)
    recipe = recipe_of(model, lora={"r": 3, "alpha": 5}, quantization="nf4")
    policy = build_policy(model, recipe.model, dtype)
    ids = torch.tensor([[5, 6, 7, 8]])

    def logits_and_gradients() -> list[torch.Tensor]:
        policy.train().zero_grad()
        logits = policy(input_ids=ids).logits
        logits.float().logsumexp(-1).sum().backward()
        return [logits.detach(), *(weight.grad for weight in policy.parameters() if weight.requires_grad)]

    before = logits_and_gradients()
    assert all(gradient.abs().max() > 0 for gradient in before[2::2])  # lora_B is zero, and so is A's gradient
    evaluated = logits_of(policy.eval())
    for changed, expected in zip([*logits_and_gradients(), evaluated], [*before, before[0]], strict=True):
        assert torch.equal(changed, expected)
