"""From records to shards, in this process: tokens, columns and places of examples, caching, and bad rows."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.models import TEMPLATE
from helpers.stored import PLANTED, indices_of, opened, recipe_of, refusal_of
from raydiv.config import Recipe
from raydiv.config.data import ChatConfig
from raydiv.data import tokenize as module
from raydiv.data.index import Index
from raydiv.data.readers import read_examples
from raydiv.data.splits import make_splits
from raydiv.data.tokenize import Tokenizer
from raydiv.data.tokens import content_key
from raydiv.model.chat import Chat
from raydiv.utils.errors import UserError

Row = dict[str, Any]
Writer = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("own_cache")

BAD = {"prompt": PLANTED, "chosen": PLANTED, "rejected": ""}


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are tokenised."""
    names, table = [], Tokenizer._table

    def recorded(self: Tokenizer, chunk: Any) -> Any:
        names.append(chunk.name)
        return table(self, chunk)

    monkeypatch.setattr(Tokenizer, "_table", recorded)
    return names


def prepared(recipe: Recipe, chat: Chat) -> list[Index]:
    train, held_out = opened(recipe, chat)
    return indices_of([*train, *held_out], recipe, chat)


def responses(index: Index, chat: Chat) -> list[str]:
    """The responses of a source."""
    return [chat.decode(ids.tolist()) for ids in index.shards.read("response_ids", index.columns["row"])]


refusal = partial(refusal_of, prepared)


def pair(n: int) -> Row:
    return {"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}", "harmful": n % 3 == 0}


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two"}]
MANY: list[Row] = [
    *(pair(n) for n in range(150)),
    {"prompt": CHAT, "completion": "yes", "label": True},
    {"prompt": "one", "response": "no " * 60, "aligned": False, "harmful": None, "pair": "p"},
    {"prompt": "one " * 60, "response": "yes", "aligned": True, "pair": 7},
    {"safety": "safe", "prompt": CHAT, "acc_responses": ["a", "b"], "rej_responses": ["c", "d", "e"]},
    *(pair(n) for n in range(150, 160)),
]


@pytest.mark.parametrize("chunk_records", [7, 1000])
def test_shards_hold_the_tokens_and_labels_of_every_example(
    chunk_records: int, tokenizer: Path, chat: Chat, write_jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", chunk_records)
    recipe = recipe_of(tokenizer, str(write_jsonl(*MANY)), batch={"max_prompt_length": 40, "max_length": 60})
    (index,) = prepared(recipe, chat)
    examples = read_examples(recipe.data.train[0])
    assert len(index) == len(examples)
    expected = [chat.tokenize_one(e.prompt, e.response, 40, 60) for e in examples]
    rows = index.columns["row"]
    assert [ids.tolist() for ids in index.shards.read("prompt_ids", rows)] == [tokens.prompt for tokens in expected]
    assert [ids.tolist() for ids in index.shards.read("response_ids", rows)] == [tokens.response for tokens in expected]
    columns = {name: column.tolist() for name, column in index.columns.items()}
    assert columns["prompt_length"] == [len(tokens.prompt) for tokens in expected]
    assert columns["response_length"] == [len(tokens.response) for tokens in expected]
    assert columns["prompt_cut"] == [tokens.prompt_cut for tokens in expected]
    assert columns["response_cut"] == [tokens.response_cut for tokens in expected]
    assert columns["aligned"] == [e.aligned for e in examples]
    assert columns["harmful"] == [-1 if e.harmful is None else int(e.harmful) for e in examples]
    assert columns["prompt_key"] == [content_key(tokens.prompt).rstrip(b"\0") for tokens in expected]
    assert columns["response_key"] == [content_key(tokens.response).rstrip(b"\0") for tokens in expected]
    assert [index.where(row) for row in range(len(index))] == [e.source for e in examples]
    assert [e.pair is None for e in examples] == [number < 0 for number in columns["pair"]]
    names: dict[int, set[str | None]] = {}
    for example, number in zip(examples, columns["pair"], strict=True):
        names.setdefault(number, set()).add(example.pair)
    assert all(len(members) == 1 for members in names.values())
    assert len(names) == len({e.pair for e in examples})


def test_rows_with_equal_prompts_have_equal_keys(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    rows = [pair(1), pair(2), pair(1) | {"chosen": "other"}, pair(1) | {"prompt": [{"role": "user", "content": "q"}]}]
    (index,) = prepared(recipe_of(tokenizer, str(write_jsonl(*rows))), chat)
    for name in ("prompt_text", "prompt_key"):
        keys = index.columns[name].tolist()
        assert keys[0] == keys[1] == keys[4] == keys[5]
        assert len({keys[0], keys[2], keys[6]}) == 3


def test_files_of_a_source_are_concatenated(
    tokenizer: Path, chat: Chat, write_jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 2)
    write_jsonl(*[pair(n) for n in range(5)], name="part-1.jsonl")
    (tmp_path / "part-2.json").write_text(json.dumps([pair(n) for n in range(5, 8)]))
    (index,) = prepared(recipe_of(tokenizer, str(tmp_path / "part-*")), chat)
    assert responses(index, chat) == [f"{side} {n}" for n in range(8) for side in ("yes", "no")]
    assert index.columns["file"].tolist() == [0] * 10 + [1] * 6
    assert index.where(15) == f"{tmp_path / 'part-2.json'}:3"


def test_nothing_is_tokenised_twice(tokenizer: Path, chat: Chat, write_jsonl: Writer, tokenized: list[str]) -> None:
    first, second = write_jsonl(pair(0), pair(1)), write_jsonl(pair(2), name="other.jsonl")
    before = prepared(recipe_of(tokenizer, [str(first), str(second), str(first)]), chat)
    assert [len(index) for index in before] == [4, 2, 4]
    after = prepared(recipe_of(tokenizer, [str(first), str(second)], eval=str(second), seed=3), chat)
    assert len(tokenized) == 2
    for index, expected in zip(after, [before[0], before[1], before[1]], strict=True):
        assert all((index.columns[name] == expected.columns[name]).all() for name in expected.columns)
        assert index.shards.uris == expected.shards.uris


@pytest.mark.parametrize("chunk_records", [2, 1000])
def test_first_bad_row_is_an_error_before_and_after_preparation(
    chunk_records: int, tokenizer: Path, chat: Chat, write_jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", chunk_records)
    path = write_jsonl(pair(0), pair(1), pair(2), BAD, pair(4), pair(5), BAD, pair(7))
    recipe = recipe_of(tokenizer, str(path))
    assert refusal(recipe, chat).startswith(f"{path}:4: rejected must be non-empty text")
    assert not opened(recipe, chat)[0][0].ready
    (index,) = prepared(recipe_of(tokenizer, str(path), on_bad_row="quarantine"), chat)
    assert index.bad.places == [(str(path), 4), (str(path), 7)]
    assert len(index) == 12
    message = refusal(recipe, chat)
    assert message.startswith(f"{path}:4: rejected must be non-empty text")
    assert "and 1 more bad row" in message
    assert "data.on_bad_row=quarantine" in message


def test_a_chunk_of_bad_rows_alone_is_left_out(
    tokenizer: Path, chat: Chat, write_jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 2)
    path = write_jsonl(pair(0), pair(1), BAD, BAD, pair(4))
    (index,) = prepared(recipe_of(tokenizer, str(path), on_bad_row="quarantine"), chat)
    assert [line for _, line in index.bad.places] == [3, 4]
    assert responses(index, chat) == ["yes 0", "no 0", "yes 1", "no 1", "yes 4", "no 4"]


@pytest.mark.parametrize("on_bad_row", ["error", "quarantine"])
def test_a_source_of_bad_rows_alone_is_refused(
    on_bad_row: str, tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    path = write_jsonl(BAD, BAD, BAD)
    recipe = recipe_of(tokenizer, str(path), on_bad_row=on_bad_row)
    if on_bad_row == "error":
        assert refusal(recipe, chat).startswith(f"{path}:1: rejected")
        return
    (index,) = prepared(recipe, chat)
    assert index.bad.places == [(str(path), line) for line in (1, 2, 3)]
    with pytest.raises(UserError, match=f"{path}: every row is bad"):
        make_splits(recipe, [index], [])


def test_template_that_fails_on_a_prompt_makes_a_bad_row(tokenizer: Path, write_jsonl: Writer) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    chat = Chat(tokenizer, ChatConfig(template=no_system))
    path = write_jsonl(pair(0), pair(1) | {"prompt": CHAT}, BAD, pair(3))
    (index,) = prepared(recipe_of(tokenizer, str(path), template=no_system, on_bad_row="quarantine"), chat)
    assert index.bad.places == [(str(path), 2), (str(path), 3)]
    assert "role system" in index.bad.reasons[0]
    assert responses(index, chat) == ["yes 0", "no 0", "yes 3", "no 3"]
    assert refusal(recipe_of(tokenizer, str(path), template=no_system), chat).startswith(f"{path}:2: ")


def test_source_without_records_is_refused(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    empty, good = write_jsonl(name="empty.jsonl"), write_jsonl(pair(0))
    for sources in ([empty], [good, empty], [empty, good]):
        assert refusal(recipe_of(tokenizer, [str(path) for path in sources]), chat) == f"{empty}: holds no examples"


def test_first_record_must_be_an_example(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    good, bad = write_jsonl(pair(0), BAD), write_jsonl(BAD, pair(0), name="bad.jsonl")
    first, second = opened(recipe_of(tokenizer, [str(good), str(bad)]), chat)[0]
    first.require_example(quarantine=False)
    second.require_example(quarantine=True)
    with pytest.raises(UserError) as caught:
        second.require_example(quarantine=False)
    assert str(caught.value).startswith(f"{bad}:1: rejected must be")
    assert PLANTED not in str(caught.value)


def test_chat_can_be_pickled(chat: Chat) -> None:
    unpickled = pickle.loads(pickle.dumps(chat))
    assert unpickled.fingerprint == chat.fingerprint
    assert unpickled.tokenize_one("naïve 你好", "yes", 30, 40) == chat.tokenize_one("naïve 你好", "yes", 30, 40)
