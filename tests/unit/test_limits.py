"""Limits of a model that a recipe, a tokenizer or data may exceed, found before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from helpers.models import make_model, make_tokenizer
from helpers.stored import indices_of, opened, recipe_of
from raydiv.commands.plan.forecast import plan
from raydiv.commands.prepare import load_inputs
from raydiv.config import Recipe
from raydiv.model import resolve
from raydiv.model.chat import Chat
from raydiv.model.limits import LEARNED, generation_config_problem, maximum_positions, require_room_for_answers
from raydiv.model.resolve import model_directory, weight_files
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError

PAIR = {"prompt": "How?", "chosen": "So.", "rejected": "No."}

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A model with learned positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tokenizer(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def recipe(write_jsonl: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(model: Path, max_length: int = 60) -> Recipe:
        batch = {"examples": 2, "max_length": max_length, "max_prompt_length": 30}
        return recipe_of(model, str(write_jsonl(PAIR)), batch=batch)

    return make


def load(recipe: Recipe) -> list[str]:
    """The lines that loading the inputs prints."""
    lines: list[str] = []
    display = ProgressDisplay(quiet=True)
    display.print = lines.append  # type: ignore[method-assign, assignment]
    load_inputs(recipe, display)
    return lines


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_examples_longer_than_learned_positions_are_refused(gpt2: Path, recipe: Callable[..., Recipe]) -> None:
    load(recipe(gpt2, 64))
    for check in (load, plan):
        with pytest.raises(UserError, match=r"batch\.max_length: 65, .* 64; set batch\.max_length=64"):
            check(recipe(gpt2, 65))


def test_answers_longer_than_learned_positions_are_refused(gpt2: Path, model: Path) -> None:
    chat, config = Chat(gpt2), AutoConfig.from_pretrained(gpt2)
    room = 64 - len(chat.prompt_ids("How?"))
    require_room_for_answers(room, config, chat, ["How?", "Why"])
    require_room_for_answers(10**6, AutoConfig.from_pretrained(model), Chat(model), ["How?"])
    with pytest.raises(UserError, match=rf"evaluate\.max_new_tokens: {room + 1} after a prompt of {64 - room} tokens"):
        require_room_for_answers(room + 1, config, chat, ["How?"])


def test_examples_longer_than_rotary_positions_are_noted(model: Path, recipe: Callable[..., Recipe]) -> None:
    edit(model / "config.json", max_position_embeddings=50)
    assert any("max_position_embeddings 50" in line for line in load(recipe(model)))
    assert any("max_position_embeddings 50" in note for note in plan(recipe(model)).notes())
    assert not load(recipe(model, 50))


@pytest.mark.parametrize(
    ("kind", "options", "positions", "learned"),
    [
        ("llama", {}, 2048, False),
        ("gemma3_text", {}, 131072, False),
        ("gpt_neox", {}, 2048, False),
        ("nemotron_h", {}, 4096, False),
        ("falcon", {"alibi": True}, None, False),
        ("bloom", {}, None, False),
        ("gpt2", {}, 1024, True),
        ("opt", {}, 2048, True),
        ("mpt", {"max_seq_len": 32}, 32, True),
    ],
)
def test_positions_by_the_config(kind: str, options: dict[str, Any], positions: int | None, learned: bool) -> None:
    config = AutoConfig.for_model(kind, **options)
    assert maximum_positions(config) == positions
    assert (kind in LEARNED) == learned


def test_control_tokens_beyond_the_embedding_are_refused(model: Path, recipe: Callable[..., Recipe]) -> None:
    chat = Chat(model)
    edit(model / "config.json", vocab_size=chat.end_of_turn.id)
    with pytest.raises(
        UserError, match=r"data\.end_of_turn: the token </s> has the id 2, and the model's embedding has 2 rows"
    ):
        load(recipe(model))


def test_a_tokenizer_larger_than_the_embedding_is_noted_and_its_tokens_are_refused_in_data(
    model: Path, recipe: Callable[..., Recipe], write_jsonl: Callable[..., Path]
) -> None:
    chat = Chat(model)
    rows = len(chat.tokenizer) - 1
    edit(model / "config.json", vocab_size=rows)
    last = chat.tokenizer.convert_ids_to_tokens(rows)
    assert any("1 tokens more than the embedding" in line for line in load(recipe(model)))
    path = write_jsonl(PAIR, PAIR | {"chosen": f"Well {chat.tokenizer.convert_tokens_to_string([last])}"})
    data = recipe_of(model, str(path))
    (index,) = indices_of(opened(data, chat)[0], data, chat)
    index.require_rows(rows + 1)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: holds the token id {rows}"):
        index.require_rows(rows)


def test_an_inconsistent_generation_config_is_noted(model: Path, recipe: Callable[..., Recipe]) -> None:
    assert generation_config_problem(model) is None
    edit(model / "generation_config.json", do_sample=False, temperature=0.3)
    assert any("temperature" in line for line in load(recipe(model)))


# --- weights ---


def test_only_the_files_of_the_index_are_weights(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    other = {"weight_map": {"a": "consolidated.safetensors"}}
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps(other))
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "consolidated.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert len(weight_files(tmp_path)) == 3


def test_only_the_files_of_the_index_are_downloaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"weight_map": {"a": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str], revision: str | None) -> str:
        assert (name, revision) == ("org/name", "main")
        assert "original/*" in ignore_patterns
        asked.append(allow_patterns)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_directory("org/name", "main") == model.resolve()
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert [pattern for pattern in asked[1] if "safetensors" in pattern] == ["model.safetensors"]
    (model / "model.safetensors.index.json").unlink()
    resolve.model_directory("org/name", "main")
    assert "*.safetensors" in asked[3]
