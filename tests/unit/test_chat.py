"""Chat: template, BOS and EOS, truncation, and many examples tokenised as each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import TEMPLATE, make_tokenizer
from raydiv.config.data import ChatConfig
from raydiv.model.chat import Chat
from raydiv.utils.errors import UserError

BOS, EOS = 1, 2
WITH_BOS = "{{ bos_token }}" + TEMPLATE


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, putting a BOS before every text."""
    folder = tmp_path_factory.mktemp("bos-tokenizer")
    make_tokenizer(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return folder


@pytest.fixture(scope="module")
def bos_chat(bos_tokenizer: Path) -> Chat:
    return Chat(bos_tokenizer)


TEXTS = ["help", "How do I bake bread?", "naïve 你好 🙂", "  spaces \n\n lines ", "x" * 200]


@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("response", TEXTS)
def test_prompt_then_response_is_the_whole_conversation(chat: Chat, prompt: str, response: str) -> None:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole = chat.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    found = chat.tokenize_one(prompt, response, 1000, 2000)
    assert found.prompt == chat.prompt_ids(prompt)
    assert found.prompt + found.response == whole
    assert (found.prompt_cut, found.response_cut) == (0, 0)


def test_text_is_one_user_turn_and_messages_keep_their_roles(chat: Chat) -> None:
    assert chat.prompt_ids("hi") == chat.prompt_ids([{"role": "user", "content": "hi"}])
    with_system = chat.prompt_ids([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}])
    assert with_system[-len(chat.prompt_ids("hi")) :] == chat.prompt_ids("hi")
    assert len(with_system) > len(chat.prompt_ids("hi"))


def test_prompt_without_generation_ends_with_the_users_turn(chat: Chat) -> None:
    assistant = chat.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert chat.prompt_ids("hi") == [*chat.prompt_ids("hi", generation=False), assistant]


@pytest.mark.parametrize("response", ["Sure.", "", "Sure.\n", "Sure.</s>"])
def test_response_ends_in_exactly_one_eos(chat: Chat, response: str) -> None:
    ids = chat.tokenize_one("hi", response, 100, 200).response
    assert ids[-1] == EOS
    assert ids.count(EOS) == 1


def test_decode_leaves_special_tokens_out(chat: Chat) -> None:
    assert chat.decode(chat.tokenize_one("hi", "Sure, here is how.", 100, 200).response) == "Sure, here is how."


@pytest.mark.parametrize(
    ("kind", "template", "expected"),
    [
        ("tokenizer", TEMPLATE, 0),
        ("tokenizer", WITH_BOS, 1),
        ("bos_tokenizer", TEMPLATE, 1),
        ("bos_tokenizer", WITH_BOS, 1),
    ],
    ids=["neither", "template", "tokenizer", "both"],
)
@pytest.mark.parametrize("generation", [True, False])
def test_bos_comes_once_where_tokenizer_or_template_puts_one(
    kind: str, template: str, expected: int, generation: bool, request: pytest.FixtureRequest
) -> None:
    ids = Chat(request.getfixturevalue(kind), ChatConfig(template=template)).prompt_ids("hi", generation)
    assert ids.count(BOS) == expected
    assert ids[:expected] == [BOS] * expected


def test_response_gets_no_bos_of_its_own(bos_tokenizer: Path) -> None:
    assert BOS not in Chat(bos_tokenizer).tokenize_one("hi", "Sure.", 100, 200).response


@pytest.mark.parametrize("spare", [-3, -1, 0, 1])
def test_long_prompt_loses_its_beginning(chat: Chat, spare: int) -> None:
    whole = chat.tokenize_one("one two three four", "Sure.", 1000, 2000)
    room = len(whole.prompt) + spare
    found = chat.tokenize_one("one two three four", "Sure.", room, 2000)
    assert found.prompt == whole.prompt[max(0, -spare) :]
    assert found.prompt_cut == max(0, -spare)
    assert (found.response, found.response_cut) == (whole.response, 0)


@pytest.mark.parametrize("spare", [-3, -1, 0, 1])
def test_long_response_loses_its_end_and_eos(chat: Chat, spare: int) -> None:
    whole = chat.tokenize_one("one", "two three four five", 1000, 2000)
    room = len(whole.prompt) + len(whole.response) + spare
    found = chat.tokenize_one("one", "two three four five", len(whole.prompt), room)
    assert (found.prompt, found.prompt_cut) == (whole.prompt, 0)
    assert found.response == whole.response[: len(whole.response) + min(0, spare)]
    assert found.response_cut == max(0, -spare)
    assert (EOS in found.response) == (spare >= 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 40), st.integers(0, 40))
def test_lengths_are_never_exceeded_and_cuts_add_up(chat: Chat, longest: int, room: int, p: int, r: int) -> None:
    prompt, response = "p" * p, "r" * r
    whole = chat.tokenize_one(prompt, response, 1000, 2000)
    found = chat.tokenize_one(prompt, response, longest, longest + room)
    assert len(found.prompt) <= longest
    assert len(found.prompt) + len(found.response) <= longest + room
    assert len(found.prompt) + found.prompt_cut == len(whole.prompt)
    assert len(found.response) + found.response_cut == len(whole.response)
    assert found.response


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 20), st.integers(0, 60))
def test_truncated_prompt_keeps_its_bos_once_within_the_length(bos_chat: Chat, longest: int, room: int, p: int) -> None:
    whole = bos_chat.prompt_ids("pq" * p)
    found = bos_chat.tokenize_one("pq" * p, "Sure.", longest, longest + room)
    assert found.prompt[0] == BOS
    assert found.prompt.count(BOS) == 1
    assert len(found.prompt) == min(len(whole), longest)
    assert found.prompt[1:] == whole[len(whole) - len(found.prompt) + 1 :]
    assert found.prompt_cut == len(whole) - len(found.prompt)


def test_prompt_of_one_token_is_its_last_and_not_the_bos(bos_chat: Chat) -> None:
    assert bos_chat.tokenize_one("one two", "Sure.", 1, 10).prompt == bos_chat.prompt_ids("one two")[-1:]


SYSTEM = {"role": "system", "content": "Be kind."}
PROMPTS: list[Any] = [
    *TEXTS,
    [{"role": "user", "content": "help"}],
    [SYSTEM, {"role": "user", "content": "help"}],
    [SYSTEM, {"role": "user", "content": "help"}, {"role": "assistant", "content": "how?"}, SYSTEM | {"role": "user"}],
    '[{"role": "user", "content": "help"}]',
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PROMPTS), st.sampled_from(["", "Sure.", "Sure.</s>", "no " * 30])), min_size=1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_examples_together_are_each_as_it_is_alone(
    chat: Chat, bos_chat: Chat, rows: list[tuple[Any, str]], longest: int, room: int, bos: bool
) -> None:
    tokenizer = bos_chat if bos else chat
    together = tokenizer.tokenize([p for p, _ in rows], [r for _, r in rows], longest, longest + room)
    assert together == [tokenizer.tokenize_one(prompt, response, longest, longest + room) for prompt, response in rows]


def test_different_prompts_are_not_mistaken_for_equal_ones(chat: Chat) -> None:
    found = chat.tokenize(PROMPTS, ["r"] * len(PROMPTS), 1000, 2000)
    # the first messages prompt alone says what a text says
    assert [one.prompt for one in found] == [chat.prompt_ids(prompt) for prompt in PROMPTS]
    assert len({tuple(one.prompt) for one in found}) == len(PROMPTS) - 1


def test_no_examples_are_none(chat: Chat) -> None:
    assert chat.tokenize([], [], 10, 20) == []


def test_template_may_be_text_or_file(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(WITH_BOS)
    text, file = (ChatConfig(template=template) for template in (WITH_BOS, str(tmp_path / "t.jinja")))
    assert Chat(tokenizer, text).prompt_ids("hi") == Chat(tokenizer, file).prompt_ids("hi")


def test_unusable_tokenizers_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jinja"):
        ChatConfig(template=str(tmp_path / "gone.jinja"))
    with pytest.raises(UserError, match=r"data\.template: gone: .*default"):
        Chat(tokenizer, ChatConfig(template="gone"))
    with pytest.raises(UserError, match="no usable tokenizer"):
        Chat(tmp_path)
    make_tokenizer(tmp_path, template=None)
    with pytest.raises(UserError, match="no chat template"):
        Chat(tmp_path)
    assert Chat(tmp_path, ChatConfig(template=TEMPLATE)).prompt_ids("hi") == Chat(tokenizer).prompt_ids("hi")


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ raise_exception('no system turn') }}"])
def test_template_that_fails_is_the_users_to_change(tokenizer: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"data\.template"):
        Chat(tokenizer, ChatConfig(template=template)).prompt_ids("hi")


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE


def test_template_that_fails_on_a_prompt_says_so_to_who_asked(tokenizer: Path) -> None:
    """A prompt alone is the user's to change; among examples it makes a bad row, which the caller finds."""
    chat = Chat(tokenizer, ChatConfig(template=NO_SYSTEM))
    prompts: list[Any] = ["hi", [SYSTEM, {"role": "user", "content": "hi"}]]
    with pytest.raises(UserError, match=r"data\.template: .*role system"):
        chat.prompt_ids(prompts[1])
    with pytest.raises(ValueError, match="role system"):
        chat.tokenize(prompts, ["yes", "no"], 100, 200)
    assert chat.tokenize(prompts[:1], ["yes"], 100, 200) == [Chat(tokenizer).tokenize_one("hi", "yes", 100, 200)]


def test_fingerprint_follows_template_and_tokenizer(tokenizer: Path, bos_tokenizer: Path) -> None:
    same = [Chat(tokenizer).fingerprint, Chat(tokenizer, ChatConfig(template=TEMPLATE)).fingerprint]
    assert same[0] == same[1]
    others = {Chat(tokenizer, ChatConfig(template=WITH_BOS)).fingerprint, Chat(bos_tokenizer).fingerprint}
    assert len(others | set(same)) == 3


def test_what_a_template_raises_is_said_without_the_prompt(tokenizer: Path) -> None:
    told = "{% if m['content'] == 'SECRET' %}{{ raise_exception(m['content']) }}{% endif %}x"
    telling = "{% for m in messages %}" + told + "{% endfor %}"
    chat = Chat(tokenizer, ChatConfig(template=telling))
    with pytest.raises(ValueError, match="the chat template fails: TemplateError") as caught:
        chat.tokenize(["SECRET"], ["r"], 10, 20)
    assert "SECRET" not in str(caught.value)
