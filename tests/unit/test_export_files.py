"""The files of an export: tokenizer, config, dtype, card and adapter as the base has them, and upload to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from helpers.models import make_model
from helpers.policies import write_run
from raydiv.commands.export import export
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.config.loss import PositionConfig
from raydiv.model.export import _keep_config_of_base, push
from raydiv.model.load import ModelSource
from raydiv.runs.directory import RunDirectory
from raydiv.utils.compat import make_readable_by_transformers_4
from raydiv.utils.errors import UserError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base from the hub, as transformers 4 writes it: in bf16, with the template in the tokenizer's config."""

    def download(name: str, revision: str | None, **_: Any) -> str:
        assert (name, revision) == ("org/base", "c0ffee")
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    directory = make_model(tmp_path / "models--org--base" / "snapshots" / "c0ffee")
    model = ModelSource(directory).load().to(torch.bfloat16)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["dtype"]
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16", "own_key": [1, 2]}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    template = directory / "chat_template.jinja"
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.read_text()}
    template.unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return directory


def trained(base: Path, folder: Path, lora: bool = True, **data: Any) -> Path:
    """A run directory whose model is the base with changed weights."""
    model = {"id": str(base), **({"lora": {"r": 3}} if lora else {})}
    sections = {"model": model, "loss": {"type": "dpo"}, "optim": {"steps": 1}, "data": data}
    recipe: Recipe = load_recipe(sections)
    run = write_run(base, recipe, folder)
    run.result.write_text(json.dumps({"base_dtype": ModelSource(base).stored_dtype()}))
    return run.path


def test_tokenizer_and_config_are_those_of_the_base(base: Path, tmp_path: Path) -> None:
    exported = export(trained(base, tmp_path / "run"), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (exported / name).read_bytes() == (base / name).read_bytes()
    written, own = (json.loads((folder / "config.json").read_text()) for folder in (exported, base))
    assert written == own


@pytest.mark.parametrize("lora", [True, False])
def test_a_generation_config_that_does_not_fit_together_stops_no_export(lora: bool, base: Path, tmp_path: Path) -> None:
    own = {"do_sample": False, "temperature": 0.3, "eos_token_id": [2, 7]}
    (base / "generation_config.json").write_text(json.dumps(own))
    exported = export(trained(base, tmp_path / "run", lora, end_of_turn="<|user|>"), tmp_path / "out")
    assert json.loads((exported / "generation_config.json").read_text()) == own | {"eos_token_id": [3, 2, 7]}


def test_a_template_of_the_recipe_replaces_that_of_the_base(base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    exported = export(trained(base, tmp_path / "run", template=template), tmp_path / "out")
    assert (exported / "chat_template.jinja").read_text() == template
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == template
    assert tokenizer | {"chat_template": 0} == json.loads((base / "tokenizer_config.json").read_text()) | {
        "chat_template": 0
    }


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("asked", "written"), [(None, "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_weights_have_the_dtype_of_the_base_or_the_one_asked_for(
    lora: bool, asked: str | None, written: str, base: Path, tmp_path: Path
) -> None:
    exported = export(trained(base, tmp_path / "run", lora), tmp_path / "out", dtype=asked)
    assert {str(weight.dtype) for weight in load_file(exported / "model.safetensors").values()} == {f"torch.{written}"}
    assert json.loads((exported / "config.json").read_text())["torch_dtype"] == written


def test_an_adapter_has_no_dtype_of_its_own(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype"):
        export(trained(base, tmp_path / "run"), tmp_path / "out", adapter=True, dtype="bf16")


def test_an_adapter_names_the_hub_id_and_the_commit_of_its_base(base: Path, tmp_path: Path) -> None:
    exported = export(trained(base, tmp_path / "run"), tmp_path / "out", adapter=True)
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "c0ffee")
    assert ModelSource(exported).base_directory() == base.resolve()


def test_an_adapter_of_a_local_base_names_its_directory(tiny_model: Path, tmp_path: Path) -> None:
    exported = export(trained(tiny_model, tmp_path / "run"), tmp_path / "out", adapter=True)
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny_model), None)


def test_the_card_has_metadata_that_the_hub_accepts(base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", train="hf://org/data", template_options={"enable_thinking": False})
    local = ModelCard.load(export(run, tmp_path / "out") / "README.md")
    assert local.data.base_model is None
    assert local.data.datasets == ["org/data"]
    assert (local.data.library_name, local.data.pipeline_tag) == ("transformers", "text-generation")
    assert '{"enable_thinking": false}' in local.content
    assert "what tokens count" not in local.content
    assert "a response ends with: `</s>" in local.content
    recipe = RunDirectory(run).read_recipe()
    position = PositionConfig(kind="decay", rate=0.9)
    named = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"id": "org/base"}),
            "loss": recipe.loss.model_copy(update={"position": position}),
        }
    )
    save_recipe(named, RunDirectory(run).recipe)
    card = ModelCard.load(export(run, tmp_path / "named") / "README.md")
    assert card.data.base_model == "org/base"
    assert '- what tokens count: `{"kind": "decay", "rate": 0.9}`' in card.content


class Hub:
    """Replaces the hub's client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        if name.startswith("other/"):
            raise PermissionError("403 Forbidden")
        self.calls.append(("create", name, private))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_an_export_is_pushed_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    (tmp_path / "model.safetensors").write_text("weights")
    assert push(tmp_path, "org/aligned") == "https://huggingface.co/org/aligned"
    assert hub.calls == [("create", "org/aligned", True), ("upload", "org/aligned", ["model.safetensors"])]
    with pytest.raises(UserError, match=r"--push-to other/x: .*403 Forbidden.*HF_TOKEN"):
        push(tmp_path, "other/x")


def test_the_config_of_a_part_of_the_base_is_that_part_s(base: Path, tmp_path: Path) -> None:
    whole = {"model_type": "two_parts", "architectures": ["TwoParts"], "text_config": {}}
    part = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name, written in (("whole", whole), ("part", part)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(written))
    (tmp_path / "whole" / "preprocessor_config.json").write_text("{}")
    _keep_config_of_base(tmp_path / "part", tmp_path / "whole")
    assert json.loads((tmp_path / "part" / "config.json").read_text()) == part
    (tmp_path / "part" / "config.json").write_text(json.dumps(whole | {"dtype": "float32"}))
    _keep_config_of_base(tmp_path / "part", tmp_path / "whole")
    assert json.loads((tmp_path / "part" / "config.json").read_text()) == whole | {"torch_dtype": "float32"}
    assert (tmp_path / "part" / "preprocessor_config.json").is_file()


def test_custom_code_of_the_base_goes_with_the_export(base: Path, tmp_path: Path) -> None:
    (base / "configuration_own.py").write_text("# code")
    assert (export(trained(base, tmp_path / "run"), tmp_path / "out") / "configuration_own.py").is_file()


def test_rope_of_other_families_is_converted(tmp_path: Path) -> None:
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "phi": (
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.4},
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.4},
        ),
        "gpt_neox": (
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
            {"rope_theta": 1e4, "rope_scaling": None, "rotary_emb_base": 1e4, "rotary_pct": 1.0},
        ),
        "gemma3_text": (
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    }
    for kind, (rope, expected) in kinds.items():
        config = {"model_type": kind, "rope_parameters": rope}
        (tmp_path / "config.json").write_text(json.dumps(config))
        make_readable_by_transformers_4(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == config | expected


def test_files_of_transformers_5_are_made_readable_by_4(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    plain = {"rope_theta": 1e6, "rope_type": "default"}
    (tmp_path / "config.json").write_text(
        json.dumps({"rope_parameters": rope, "text_config": {"rope_parameters": plain}})
    )
    tokenizer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for _ in range(2):
        make_readable_by_transformers_4(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["rope_theta"] == 5e5
        assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
        assert config["text_config"] == {"rope_parameters": plain, "rope_theta": 1e6, "rope_scaling": None}
        assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": ["<a>"],
        }
