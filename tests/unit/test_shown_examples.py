"""Examples of ``raydiv data check --show-text``: which tokens are the template's, the messages' and the response's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.stored import indices_of, opened, recipe_of
from helpers.templates import FAMILIES, make_family_tokenizer
from raydiv.commands.data_check.examples import SHOWN, ShownExample, shown_examples
from raydiv.data.splits import examples_of
from raydiv.model.chat import Chat

Writer = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("own_cache")

PAIR = {"prompt": "Prune the tree?", "chosen": "In spring.", "rejected": "Trees."}


@pytest.fixture(scope="module", params=["ChatML", "Mistral", "Llama 3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_tokenizer(tmp_path_factory.mktemp("family"), FAMILIES[request.param])


def shown(directory: Path, path: Path, **data: Any) -> list[ShownExample]:
    recipe = recipe_of(directory, str(path), on_bad_row="quarantine", **data)
    chat = Chat.from_recipe(recipe, directory)
    (index,) = indices_of(opened(recipe, chat)[0], recipe, chat)
    examples = shown_examples(index, chat)
    tokens = examples_of([index]).ids(np.arange(len(index)))
    stored = {(index.where(row), bool(index.columns["aligned"][row])): tokens[row] for row in range(len(index))}
    for example in examples:
        prompt, response = stored[example.place, example.aligned]
        ids = [*prompt.tolist(), *response.tolist()]
        assert sum(len(run) for _, run in example.parts) == len(ids)
        assert text_of(example) == chat.tokenizer.decode(ids)
    return examples


def text_of(example: ShownExample, *parts: str) -> str:
    return "".join(token for part, run in example.parts for token in run if not parts or part in parts)


def test_each_token_has_its_part(family: Path, write_jsonl: Writer) -> None:
    chosen, rejected = shown(family, write_jsonl(PAIR))
    assert (chosen.aligned, rejected.aligned) == (True, False)
    for example, response in ((chosen, PAIR["chosen"]), (rejected, PAIR["rejected"])):
        assert text_of(example, "text").strip() == PAIR["prompt"]
        assert text_of(example, "trained").strip() == response
        assert text_of(example, "end of turn") == Chat(family).end_of_turn.token
        assert PAIR["prompt"] not in text_of(example, "template")


def test_messages_of_a_conversation_are_text(family: Path, write_jsonl: Writer) -> None:
    turns = ["é 日本 🙂 ok", "ok", "ok again"]
    prompt = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns, strict=True)]
    example = shown(family, write_jsonl(PAIR | {"prompt": prompt}))[0]
    assert [text.strip() for text in text_runs(example)] == turns


def text_runs(example: ShownExample) -> list[str]:
    return ["".join(run) for part, run in example.parts if part == "text"]


def test_the_first_examples_of_each_class_are_shown(family: Path, write_jsonl: Writer) -> None:
    rows = [PAIR | {"prompt": f"Tree {n}?"} for n in range(10)]
    path = write_jsonl({"bad": 1}, *rows)
    examples = shown(family, path)
    assert [(e.aligned, e.place) for e in examples] == [
        (aligned, f"{path}:{line}") for aligned in (True, False) for line in range(2, 2 + SHOWN)
    ]


def test_what_is_cut_is_told(family: Path, write_jsonl: Writer) -> None:
    row = PAIR | {"prompt": "tree " * 40, "chosen": "spring " * 40}
    example = shown(family, write_jsonl(row), batch={"examples": 2, "max_length": 80, "max_prompt_length": 60})[0]
    assert example.prompt_cut > 0
    assert example.response_cut > 0
    assert set(text_of(example, "text").split()) <= {"tree", "ree", "ee", "e"}
    assert len(text_of(example, "text")) > 20
    assert not text_of(example, "end of turn")


def test_a_rendered_prompt_is_text(family: Path, write_jsonl: Writer) -> None:
    example = shown(family, write_jsonl(PAIR), template="none")[0]
    assert text_of(example, "text").endswith(PAIR["prompt"])


def test_a_character_of_several_byte_tokens_is_shown_once(tmp_path: Path, write_jsonl: Writer) -> None:
    """As in SentencePiece vocabularies, which fall back to bytes for characters that they lack."""
    directory = make_family_tokenizer(tmp_path / "family", FAMILIES["Mistral"])
    rules = json.loads((directory / "tokenizer.json").read_text())
    pieces = [
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "\u2581",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *map(chr, range(33, 127)),
    ]
    rules["model"] = {
        "type": "BPE",
        "vocab": {piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        "merges": [],
        "byte_fallback": True,
        "unk_token": None,
    }
    rules["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    rules["decoder"] = {"type": "Sequence", "decoders": steps}
    (directory / "tokenizer.json").write_text(json.dumps(rules))
    row = PAIR | {"prompt": "so \U0001f642 now", "chosen": "\U0001f642\U0001f642 yes of course"}
    example = shown(directory, write_jsonl(row))[0]
    assert text_of(example, "text") == row["prompt"]
    assert text_of(example, "trained").strip() == row["chosen"]
