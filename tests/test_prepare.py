"""From examples to tokens: template and truncation, splits and pairs, token columns and KTO's derangement."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEMPLATE, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from raydiv.config import Recipe, load_recipe
from raydiv.data.prepare import _count, _pair_numbers, split_examples
from raydiv.data.sources import Example
from raydiv.data.tokens import TokenizedExamples, content_key, mismatched
from raydiv.errors import UserError
from raydiv.model.chat import Chat

BOS, EOS = 1, 2
WITH_BOS = "{{ bos_token }}" + TEMPLATE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tokenizer, which puts no BOS by itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


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
def chat(tokenizer: Path) -> Chat:
    return Chat(tokenizer)


TEXTS = ["help", "How do I bake bread?", "naïve 你好 🙂", "  spaces \n\n lines ", "x" * 200]


@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("response", TEXTS)
def test_prompt_then_response_is_the_whole_conversation(chat: Chat, prompt: str, response: str) -> None:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole = chat.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    found = chat.example(prompt, response, 1000, 2000)
    assert found.prompt == chat.prompt(prompt)
    assert found.prompt + found.response == whole
    assert (found.prompt_cut, found.response_cut) == (0, 0)


def test_text_is_one_user_turn_and_messages_keep_their_roles(chat: Chat) -> None:
    assert chat.prompt("hi") == chat.prompt([{"role": "user", "content": "hi"}])
    with_system = chat.prompt([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}])
    assert with_system[-len(chat.prompt("hi")) :] == chat.prompt("hi")
    assert len(with_system) > len(chat.prompt("hi"))


def test_prompt_without_generation_ends_with_the_users_turn(chat: Chat) -> None:
    assistant = chat.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert chat.prompt("hi") == [*chat.prompt("hi", generation=False), assistant]


@pytest.mark.parametrize("response", ["Sure.", "", "Sure.\n", "Sure.</s>"])
def test_response_ends_in_exactly_one_eos(chat: Chat, response: str) -> None:
    ids = chat.example("hi", response, 100, 200).response
    assert ids[-1] == EOS
    assert ids.count(EOS) == 1


def test_decode_leaves_special_tokens_out(chat: Chat) -> None:
    assert chat.decode(chat.example("hi", "Sure, here is how.", 100, 200).response) == "Sure, here is how."


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
    ids = Chat(request.getfixturevalue(kind), template).prompt("hi", generation)
    assert ids.count(BOS) == expected
    assert ids[:expected] == [BOS] * expected


def test_response_gets_no_bos_of_its_own(bos_tokenizer: Path) -> None:
    assert BOS not in Chat(bos_tokenizer).example("hi", "Sure.", 100, 200).response


@pytest.mark.parametrize("spare", [-3, -1, 0, 1])
def test_long_prompt_loses_its_beginning(chat: Chat, spare: int) -> None:
    whole = chat.example("one two three four", "Sure.", 1000, 2000)
    room = len(whole.prompt) + spare
    found = chat.example("one two three four", "Sure.", room, 2000)
    assert found.prompt == whole.prompt[max(0, -spare) :]
    assert found.prompt_cut == max(0, -spare)
    assert (found.response, found.response_cut) == (whole.response, 0)


@pytest.mark.parametrize("spare", [-3, -1, 0, 1])
def test_long_response_loses_its_end_and_eos(chat: Chat, spare: int) -> None:
    whole = chat.example("one", "two three four five", 1000, 2000)
    room = len(whole.prompt) + len(whole.response) + spare
    found = chat.example("one", "two three four five", len(whole.prompt), room)
    assert (found.prompt, found.prompt_cut) == (whole.prompt, 0)
    assert found.response == whole.response[: len(whole.response) + min(0, spare)]
    assert found.response_cut == max(0, -spare)
    assert (EOS in found.response) == (spare >= 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 40), st.integers(0, 40))
def test_lengths_are_never_exceeded_and_cuts_add_up(chat: Chat, longest: int, room: int, p: int, r: int) -> None:
    prompt, response = "p" * p, "r" * r
    whole = chat.example(prompt, response, 1000, 2000)
    found = chat.example(prompt, response, longest, longest + room)
    assert len(found.prompt) <= longest
    assert len(found.prompt) + len(found.response) <= longest + room
    assert len(found.prompt) + found.prompt_cut == len(whole.prompt)
    assert len(found.response) + found.response_cut == len(whole.response)
    assert found.response


def test_template_may_be_text_or_file(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(WITH_BOS)
    assert Chat(tokenizer, WITH_BOS).prompt("hi") == Chat(tokenizer, str(tmp_path / "t.jinja")).prompt("hi")


def test_unusable_tokenizers_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.template"):
        Chat(tokenizer, str(tmp_path / "gone.jinja"))
    with pytest.raises(UserError, match="no usable tokenizer"):
        Chat(tmp_path)
    make_tokenizer(tmp_path, template=None)
    with pytest.raises(UserError, match="no chat template"):
        Chat(tmp_path)
    assert Chat(tmp_path, TEMPLATE).prompt("hi") == Chat(tokenizer).prompt("hi")


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ raise_exception('no system turn') }}"])
def test_template_that_fails_is_the_users_to_change(tokenizer: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"data\.template"):
        Chat(tokenizer, template).prompt("hi")


def test_fingerprint_follows_template_and_tokenizer(tokenizer: Path, bos_tokenizer: Path) -> None:
    same = [Chat(tokenizer).fingerprint, Chat(tokenizer, TEMPLATE).fingerprint]
    assert same[0] == same[1]
    others = {Chat(tokenizer, WITH_BOS).fingerprint, Chat(bos_tokenizer).fingerprint}
    assert len(others | set(same)) == 3


def example(
    prompt: Any, response: str = "r", aligned: bool = True, pair: str | None = None, at: str = "f:1"
) -> Example:
    return Example(prompt, response, aligned, None, pair, at)


def preference_rows(prompts: int) -> list[dict[str, str]]:
    """Two rows of each prompt, far apart."""
    return [{"prompt": f"q{n % prompts}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(2 * prompts)]


def recipe_for(train: Path, share: Any, seed: int = 0) -> Recipe:
    return load_recipe(
        {
            "model": {"id": "m"},
            "loss": {"type": "kldo"},
            "optim": {"steps": 1},
            "data": {"train": str(train), "eval": share},
            "seed": seed,
        }
    )


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_split_takes_a_share_of_the_prompts_and_never_cuts_one(share: float, write_jsonl: Callable[..., Path]) -> None:
    train, held_out = split_examples(recipe_for(write_jsonl(*preference_rows(20)), share))
    prompts = [{e.prompt for e in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(share * 20)
    assert Counter(e.response for e in train + held_out) == Counter(f"{side}{n}" for side in "cr" for n in range(40))


def test_split_follows_the_seed_and_not_the_order_of_rows(write_jsonl: Callable[..., Path]) -> None:
    def held_out(rows: Sequence[dict[str, str]], seed: int) -> set[Any]:
        return {e.prompt for e in split_examples(recipe_for(write_jsonl(*rows), 0.5, seed))[1]}

    rows = preference_rows(20)
    assert held_out(rows, 0) == held_out(rows, 0) == held_out(rows[::-1], 0)
    assert held_out(rows, 0) != held_out(rows, 1)


def test_split_keeps_the_order_of_rows(write_jsonl: Callable[..., Path]) -> None:
    for side in split_examples(recipe_for(write_jsonl(*preference_rows(10)), 0.5)):
        lines = [int(e.source.rpartition(":")[2]) for e in side]
        assert lines == sorted(lines)


def test_split_into_files(write_jsonl: Callable[..., Path]) -> None:
    train, other = write_jsonl(*preference_rows(3)), write_jsonl(*preference_rows(2), name="eval.jsonl")
    assert [len(side) for side in split_examples(recipe_for(train, str(other)))] == [12, 8]
    assert [len(side) for side in split_examples(recipe_for(train, None))] == [12, 0]


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_split_with_an_empty_side_is_refused(share: float, write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"data\.eval.*5 prompts"):
        split_examples(recipe_for(write_jsonl(*preference_rows(5)), share))


def test_pairs_are_numbered_and_lone_examples_are_not() -> None:
    rows = [
        example("a", pair="x"),
        example("b"),
        example("b", pair="y"),
        example("a", aligned=False, pair="x"),
        example("c", aligned=False, pair="z"),
        example("b", aligned=False, pair="y"),
    ]
    numbers = _pair_numbers(rows)
    assert numbers[0] == numbers[3] >= 0
    assert numbers[2] == numbers[5] >= 0
    assert numbers[1] == -1
    assert len({numbers[0], numbers[2], numbers[4]}) == 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", True), ("a", True)], "2 aligned and 0 unaligned"),
        ([("a", False), ("a", False)], "0 aligned and 2 unaligned"),
        ([("a", True), ("a", False), ("a", False)], "1 aligned and 2 unaligned"),
        ([("a", True), ("PLANTED", False)], "two prompts"),
        ([([{"role": "user", "content": "PLANTED"}], True), ("a", False)], "two prompts"),
    ],
)
def test_pair_that_is_none_is_refused_with_its_line(rows: list[tuple[Any, bool]], words: str) -> None:
    given = [
        example(prompt, response="PLANTED", aligned=label, pair="p", at=f"f.jsonl:{n}")
        for n, (prompt, label) in enumerate(rows, start=1)
    ]
    with pytest.raises(UserError, match=words) as caught:
        _pair_numbers(given)
    message = str(caught.value)
    assert message.startswith("f.jsonl:")
    assert "pair p" in message
    assert "PLANTED" not in message


def test_counts_say_what_was_found_and_cut() -> None:
    rows = [
        Example("a", "r", True, True, "p", "f:1"),
        Example("a", "r", False, True, "p", "f:2"),
        Example("b", "r", True, False, None, "f:3"),
        Example("c", "r", True, None, None, "f:4"),
    ]
    tokens = TokenizedExamples.from_ids(
        [([1], [2, 3])] * 4, [e.aligned for e in rows], _pair_numbers(rows)
    )  # 4 examples of 3 tokens
    cuts = [(0, 0), (5, 0), (1, 2), (0, 3)]
    found = _count(rows, tokens, [{"prompt_cut": p, "response_cut": r} for p, r in cuts])
    assert (found.examples, found.aligned, found.unaligned, found.pairs, found.tokens) == (4, 3, 1, 1, 12)
    assert (found.harmful, found.harmless, found.unlabelled) == (2, 1, 1)
    assert (found.prompts_cut, found.responses_cut) == (2, 2)


def tokens() -> TokenizedExamples:
    """Two whole pairs, one half of a pair, one lone example."""
    ids = [([5, 6], [7]), ([5], [8, 2]), ([9], [1, 2, 3]), ([5, 6], [4, 2]), ([5], [7, 2]), ([1], [70000, 2])]
    return TokenizedExamples.from_ids(ids, [True, False, True, False, True, True], [0, 1, -1, 0, 1, 2])


def test_tokens_survive_writing(tmp_path: Path) -> None:
    before = tokens()
    before.write(tmp_path / "t.parquet")
    after = TokenizedExamples.read(tmp_path / "t.parquet")
    for row in range(len(before)):
        for ids, same in zip(before[row], after[row], strict=True):
            np.testing.assert_array_equal(ids, same)
            assert same.dtype == np.int64
    np.testing.assert_array_equal(after.aligned, before.aligned)
    np.testing.assert_array_equal(after.pair, before.pair)
    assert list(after.keys) == list(before.keys)
    assert after.fingerprint == before.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_keys_depend_on_the_ids_alone() -> None:
    one = TokenizedExamples.from_ids([([1, 2], [3])], [True], [0])
    other = TokenizedExamples.from_ids([([9], [9]), ((1, 2), (3,))], [True, False], [-1, 7])
    assert one.keys[0] == other.keys[1]
    assert content_key(np.array([1, 2], np.int32), np.array([3])) == one.keys[0]
    neighbours = [([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3], []), ([2, 1], [3]), ([1, 2], [4]), ([1, 2], [3, 0])]
    assert len({content_key(prompt, response) for prompt, response in neighbours}) == len(neighbours)


def test_lengths_pairs_and_units() -> None:
    examples = tokens()
    assert examples.lengths == [3, 3, 4, 4, 3, 3]
    assert examples.response_lengths.tolist() == [1, 2, 3, 2, 2, 2]
    assert examples.pairs.tolist() == [[0, 3], [4, 1]]
    assert sorted(map(sorted, examples.units)) == [[0, 3], [1, 4], [2], [5]]


def test_no_pairs_is_an_empty_table() -> None:
    assert TokenizedExamples.from_ids([([1], [2])], [True], [-1]).pairs.shape == (0, 2)


def test_selection_keeps_rows_together_and_finds_its_own_pairs() -> None:
    chosen = tokens().select(np.array([3, 5, 0]))
    assert [ids.tolist() for ids in chosen[0]] == [[5, 6], [4, 2]]
    assert chosen.keys == [tokens().keys[row] for row in (3, 5, 0)]
    assert chosen.pairs.tolist() == [[2, 0]]
    assert tokens().select([0, 1]).pairs.tolist() == []


def test_fingerprint_follows_ids_labels_pairs_and_order() -> None:
    ids = [([1], [2]), ([3], [4])]
    variants = [
        (ids, [True, False], [0, 0]),
        ([([1], [2]), ([3], [5])], [True, False], [0, 0]),
        (ids, [True, True], [0, 0]),
        (ids, [True, False], [-1, -1]),
        (ids[::-1], [True, False], [0, 0]),
    ]
    prints = [TokenizedExamples.from_ids(*variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(variants)
    assert TokenizedExamples.from_ids(*variants[0]).fingerprint == prints[0]


# prompt numbers of the examples, no prompt with more than half of them
prompt_numbers = st.lists(st.integers(1, 6), min_size=2, max_size=24).filter(
    lambda rows: 2 * max(Counter(rows).values()) <= len(rows)
)


def of_prompts(rows: Sequence[int]) -> TokenizedExamples:
    """One example per row: its prompt's number as prompt, a response of its own."""
    ids = [([number] * number, [100 + row, EOS]) for row, number in enumerate(rows)]
    return TokenizedExamples.from_ids(ids, [row % 2 == 0 for row in range(len(rows))], [-1] * len(rows))


@settings(max_examples=60, deadline=None)
@given(prompt_numbers)
def test_mismatched_gives_every_prompt_the_response_of_another(rows: list[int]) -> None:
    examples = of_prompts(rows)
    derangement = mismatched(examples, max_length=100)
    owner = {100 + row: number for row, number in enumerate(rows)}
    assert [prompt.tolist() for prompt in derangement.prompt_ids] == [prompt.tolist() for prompt in examples.prompt_ids]
    donors = [int(response[0]) for response in derangement.response_ids]
    assert sorted(donors) == sorted(owner)
    assert all(owner[donor] != number for donor, number in zip(donors, rows, strict=True))
    assert derangement.keys == [content_key(*derangement[row]) for row in range(len(rows))]
    assert len(derangement.pairs) == 0


@settings(max_examples=60, deadline=None)
@given(prompt_numbers.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(range(len(rows))))))
def test_mismatched_does_not_depend_on_the_order_of_rows(case: tuple[list[int], list[int]]) -> None:
    rows, order = case
    examples = of_prompts(rows)
    straight = mismatched(examples, max_length=100)
    shuffled = mismatched(examples.select(order), max_length=100)
    assert [straight.keys[row] for row in order] == shuffled.keys


def test_mismatched_responses_are_cut_to_the_length() -> None:
    examples = TokenizedExamples.from_ids([([1] * 6, [7, EOS]), ([2], [8] * 8 + [EOS])], [True, False], [-1, -1])
    derangement = mismatched(examples, max_length=8)
    assert [response.tolist() for response in derangement.response_ids] == [[8, 8], [7, EOS]]


@pytest.mark.parametrize("rows", [[1], [1, 1], [1, 1, 2], [3, 1, 3, 3, 2]])
def test_mismatched_is_refused_when_one_prompt_dominates(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{max(Counter(rows).values())} of {len(rows)}"):
        mismatched(of_prompts(rows), max_length=100)
