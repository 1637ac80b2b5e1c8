"""The training and the held-out set: splits by prompt, pairs, mixtures, counts, and data that do not suit the loss."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.models import make_tokenizer
from helpers.stored import PLANTED, indices_of, opened, recipe_of, refusal_of
from raydiv.config import Recipe
from raydiv.config.recipe import OptimConfig
from raydiv.data.splits import Splits, make_splits
from raydiv.data.tokens import StoredExamples
from raydiv.model.chat import Chat
from raydiv.training.schedule import epoch_plan, total_steps

Row = dict[str, Any]
Writer = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("own_cache")


def splits_of(recipe: Recipe, chat: Chat) -> Splits:
    """The recipe's splits, prepared in this process."""
    train, held_out = opened(recipe, chat)
    indices = indices_of([*train, *held_out], recipe, chat)
    return make_splits(recipe, indices[: len(train)], indices[len(train) :])


def sides_of(recipe: Recipe, chat: Chat) -> list[StoredExamples]:
    """Training and held-out examples."""
    splits = splits_of(recipe, chat)
    assert splits.eval is not None
    return [splits.train.examples, splits.eval.examples]


def responses(examples: StoredExamples, chat: Chat) -> list[str]:
    return [chat.decode(ids.tolist()) for _, ids in examples.ids(np.arange(len(examples)))]


refusal = partial(refusal_of, splits_of)


def pair(prompt: Any, n: object = "") -> Row:
    return {"prompt": prompt, "chosen": f"c{n}", "rejected": f"r{n}"}


def example(prompt: Any, aligned: bool, name: str | None = None, response: str = "r") -> Row:
    return {"prompt": prompt, "response": response, "aligned": aligned, "pair": name}


def preference_rows(prompts: int) -> list[Row]:
    """Two rows of each prompt, ``prompts`` rows apart."""
    return [pair(f"q{n % prompts}", n) for n in range(2 * prompts)]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_split_takes_a_fraction_of_the_prompts_and_splits_none(
    share: float, tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    sides = sides_of(recipe_of(tokenizer, str(write_jsonl(*preference_rows(20))), eval=share), chat)
    prompts = [set(side.prompt_keys.tolist()) for side in sides]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(share * 20)
    counts = Counter(response for side in sides for response in responses(side, chat))
    assert counts == Counter(f"{side}{n}" for side in "cr" for n in range(40))


def test_split_depends_on_the_seed_and_not_on_the_order_of_rows(
    tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    def held_out(rows: Sequence[Row], seed: int) -> set[bytes]:
        recipe = recipe_of(tokenizer, str(write_jsonl(*rows)), eval=0.5, seed=seed)
        return set(sides_of(recipe, chat)[1].prompt_keys.tolist())

    rows = preference_rows(20)
    assert held_out(rows, 0) == held_out(rows, 0) == held_out(rows[::-1], 0)
    assert held_out(rows, 0) != held_out(rows, 1)


def test_split_depends_on_the_text_and_not_on_its_tokens(
    tokenizer: Path, chat: Chat, write_jsonl: Writer, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_tokenizer(other, "{% for m in messages %}{{ '<s>' + m['content'] }}{% endfor %}")
    data = str(write_jsonl(*preference_rows(20)))
    first = sides_of(recipe_of(tokenizer, data, eval=0.5), chat)
    second = sides_of(recipe_of(other, data, eval=0.5), Chat(other))
    for side, other_side in zip(first, second, strict=True):
        assert responses(side, chat) == responses(other_side, chat)
        assert side.prompt_keys.tolist() != other_side.prompt_keys.tolist()


def test_split_keeps_the_order_of_rows(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    for side in sides_of(recipe_of(tokenizer, str(write_jsonl(*preference_rows(10))), eval=0.5), chat):
        numbers = [int(response[1:]) for response in responses(side, chat)]
        assert numbers == sorted(numbers)
        assert len(numbers) == 20


def test_split_keeps_pairs_whole(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    for side in sides_of(recipe_of(tokenizer, str(write_jsonl(*preference_rows(10))), eval=0.3), chat):
        texts = responses(side, chat)
        assert (side.units >= 0).all()
        assert [(texts[good], texts[bad]) for good, bad in side.units] == [
            (f"c{texts[good][1:]}", f"r{texts[good][1:]}") for good, _ in side.units
        ]


def test_split_by_prompt_holds_across_sources(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    first = write_jsonl(*[pair(f"q{n}", f"a{n}") for n in range(20)], name="a.jsonl")
    second = write_jsonl(*[example(f"q{n}", n % 2 == 0, response=f"b{n}") for n in range(5, 25)], name="b.jsonl")
    sides = sides_of(recipe_of(tokenizer, [str(first), str(second)], eval=0.4), chat)
    prompts = [set(side.prompt_keys.tolist()) for side in sides]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(0.4 * 25)
    for side in sides:
        texts = responses(side, chat)
        # all examples of a prompt are on one side, those of the other source too
        numbers = [
            {int(text[2:]) for text in texts if text[1] == "a"},
            {int(text[1:]) for text in texts if text[0] == "b"},
        ]
        both = set(range(5, 20))
        assert numbers[0] & both == numbers[1] & both
        assert side.source.tolist() == [int(text[0] == "b") for text in texts]
        assert set(side.source.tolist()) == {0, 1}


def test_held_out_sources_are_not_split(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    train, other = write_jsonl(*preference_rows(3)), write_jsonl(*preference_rows(2), name="eval.jsonl")
    sides = sides_of(recipe_of(tokenizer, str(train), eval=str(other)), chat)
    assert [len(side) for side in sides] == [12, 8]
    without_eval = splits_of(recipe_of(tokenizer, str(train)), chat)
    assert without_eval.eval is None
    assert len(without_eval.train.examples) == 12
    assert without_eval.shared_prompts == 0


def test_prompts_in_train_and_eval_are_counted(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    train = write_jsonl(*[pair(f"q{n % 6}", n) for n in range(12)])
    asked = [{"role": "user", "content": "q1"}]
    others = [
        write_jsonl(pair("q1"), pair("q1", 1), pair("q5"), pair("new"), name="a.jsonl"),
        write_jsonl(pair("q5"), pair("q2"), pair(asked), name="b.jsonl"),
    ]
    splits = splits_of(recipe_of(tokenizer, str(train), eval=[str(path) for path in others]), chat)
    assert splits.shared_prompts == 3  # q1, q5 and q2, in whatever number of rows
    assert splits_of(recipe_of(tokenizer, str(train), eval=0.5), chat).shared_prompts == 0


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_split_with_an_empty_side_is_refused(share: float, tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    message = refusal(recipe_of(tokenizer, str(write_jsonl(*preference_rows(5))), eval=share), chat)
    assert message.startswith(f"data.eval: {share} of 5 prompts")


def test_pairs_and_single_examples_are_units(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    rows = [
        example("a", True, "x"),
        example("b", True),
        example("b", True, "y"),
        example("a", False, "x"),
        example("c", False, "z"),
        example("b", False, "y"),
    ]
    examples = splits_of(recipe_of(tokenizer, str(write_jsonl(*rows))), chat).train.examples
    assert examples.units.tolist() == [[0, 3], [1, -1], [2, 5], [4, -1]]


@pytest.mark.parametrize(
    ("rows", "words", "lines"),
    [
        ([("a", True), ("a", True)], "2 aligned and 0 unaligned", [2, 3]),
        ([("a", False), ("a", False)], "0 aligned and 2 unaligned", [2, 3]),
        ([("a", True), ("a", False), ("a", False)], "1 aligned and 2 unaligned", [2, 3, 4]),
        ([("a", True), (PLANTED, False)], "two prompts", [2, 3]),
        ([([{"role": "user", "content": PLANTED}], True), ("a", False)], "two prompts", [2, 3]),
    ],
)
def test_invalid_pair_is_refused_with_its_lines(
    rows: list[tuple[Any, bool]], words: str, lines: list[int], tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    pair_rows = [example(prompt, label, "PLANTED-TEXT", PLANTED) for prompt, label in rows]
    path = write_jsonl(example("other", True), *pair_rows, example("other", False))
    message = refusal(recipe_of(tokenizer, str(path)), chat)
    assert message.startswith(", ".join(f"{path}:{line}" for line in lines) + ": one pair with")
    assert words in message


def test_equal_pair_names_in_different_sources_are_different_pairs(
    tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    paths = [
        write_jsonl(
            example(f"{name}", True, "p", f"{name}0"), example(f"{name}", False, "p", f"{name}1"), name=f"{name}.jsonl"
        )
        for name in "abc"
    ]
    # the first source again, and two preference files, whose pairs are named by line
    paths += [paths[0], write_jsonl(pair("d", "d"), name="d.jsonl"), write_jsonl(pair("e", "e"), name="e.jsonl")]
    examples = splits_of(recipe_of(tokenizer, [str(path) for path in paths]), chat).train.examples
    assert examples.units.tolist() == [[n, n + 1] for n in range(0, 12, 2)]
    assert responses(examples, chat) == ["a0", "a1", "b0", "b1", "c0", "c1", "a0", "a1", "cd", "rd", "ce", "re"]
    assert examples.source.tolist() == [n // 2 for n in range(12)]


def test_pair_across_files_of_one_source_is_one(
    tokenizer: Path, chat: Chat, write_jsonl: Writer, tmp_path: Path
) -> None:
    write_jsonl(example("a", True, "p"), name="part-1.jsonl")
    write_jsonl(example("a", False, "p"), name="part-2.jsonl")
    examples = splits_of(recipe_of(tokenizer, str(tmp_path / "part-*.jsonl"), loss="dpo"), chat).train.examples
    assert examples.units.tolist() == [[0, 1]]


def test_columns_and_constants_apply_to_one_source(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    good = write_jsonl({"question": "a", "answer": "yes"}, name="good.jsonl")
    bad = write_jsonl({"ask": "a", "response": "no"}, name="bad.jsonl")
    recipe = recipe_of(
        tokenizer,
        [
            {"path": str(good), "constants": {"aligned": True}},
            {"path": str(bad), "columns": {"prompt": "ask"}, "constants": {"aligned": False, "harmful": True}},
        ],
        columns={"prompt": "question", "response": "answer"},
    )
    train = splits_of(recipe, chat).train
    assert responses(train.examples, chat) == ["yes", "no"]
    assert train.examples.aligned.tolist() == [True, False]
    assert (train.counts.harmful, train.counts.unlabelled) == (1, 1)


def test_counts_of_examples_and_truncation(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    rows = [
        example("a" * 40, True, "p") | {"harmful": True},
        example("a" * 40, False, "p") | {"harmful": True},
        example("b", True) | {"harmful": False},
        example("c", True, response="x" * 90),
    ]
    batch = {"max_prompt_length": 20, "max_length": 30}
    train = splits_of(recipe_of(tokenizer, str(write_jsonl(*rows)), batch=batch), chat).train
    counts = train.counts
    assert (counts.examples, counts.aligned, counts.unaligned, counts.pairs) == (4, 3, 1, 1)
    assert (counts.harmful, counts.harmless, counts.unlabelled) == (2, 1, 1)
    assert (counts.prompts_cut, counts.responses_cut) == (2, 1)
    ids = train.examples.ids(np.arange(4))
    assert counts.tokens == sum(len(prompt) + len(response) for prompt, response in ids)
    assert [len(prompt) for prompt, _ in ids[:2]] == [20, 20]
    assert len(ids[3][0]) + len(ids[3][1]) == 30


def test_counts_of_both_sides_add_up(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    rows = [pair(f"q{n % 7}", n) | {"harmful": n % 7 < 3} for n in range(20)]
    path = str(write_jsonl(*rows))
    whole, split = splits_of(recipe_of(tokenizer, path), chat), splits_of(recipe_of(tokenizer, path, eval=0.4), chat)
    assert split.eval is not None
    for name in ("examples", "aligned", "unaligned", "pairs", "harmful", "harmless", "unlabelled", "tokens"):
        parts = [getattr(side.counts, name) for side in (split.train, split.eval)]
        assert sum(parts) == getattr(whole.train.counts, name), name
        assert all(parts) or name == "unlabelled"


@pytest.mark.parametrize(
    ("label", "loss", "words"),
    [
        (True, "kldo", "no unaligned example, and the loss kldo"),
        (True, "fdo", "aligned examples alone: sft)"),
        (False, "kldo", "no aligned example, and the loss kldo"),
        (False, "fdo", "unaligned examples alone: npo)"),
        (True, "npo", "no unaligned example, and the loss npo"),
        (False, "sft", "no aligned example, and the loss sft"),
    ],
)
def test_one_class_is_refused_if_the_loss_needs_the_other(
    label: bool, loss: str, words: str, tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    path = write_jsonl(*[example(f"q{n}", label, response=PLANTED) for n in range(3)])
    message = refusal(recipe_of(tokenizer, str(path), loss), chat)
    assert message.startswith(f"data.train: {path}: no ")
    assert words in message


def test_aligned_examples_alone_are_enough_for_sft(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    path = write_jsonl(*[example(f"q{n}", True) for n in range(3)])
    assert splits_of(recipe_of(tokenizer, str(path), "sft"), chat).train.counts.aligned == 3


def test_unaligned_examples_alone_are_enough_for_npo(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    path = write_jsonl(*[example(f"q{n}", False) for n in range(3)])
    assert splits_of(recipe_of(tokenizer, str(path), "npo"), chat).train.counts.unaligned == 3


def test_paired_loss_refuses_examples_without_a_partner(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    path = write_jsonl(*[example(f"q{n}", n % 2 == 0, response=PLANTED) for n in range(4)], pair("p"))
    message = refusal(recipe_of(tokenizer, str(path), "dpo"), chat)
    assert message.startswith(f"data.train: {path}: 4 of 6 examples ")
    assert "the loss dpo " in message
    assert "kldo" in message
    assert "aot-unpaired" in message
    assert "rdpo" not in message


def test_sources_of_a_mixture_are_named_and_checked_together(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    paths = [
        write_jsonl(*[example(f"q{n}", label) for n in range(2)], name=f"{label}.jsonl") for label in (True, False)
    ]
    both = [str(path) for path in paths]
    assert splits_of(recipe_of(tokenizer, both), chat).train.counts.aligned == 2
    assert refusal(recipe_of(tokenizer, both, "dpo"), chat).startswith(f"data.train: {both[0]}, {both[1]}: 4 of 4")


@pytest.mark.parametrize("held_out", ["share", "sources"])
def test_held_out_examples_must_fit_the_loss_too(
    held_out: str, tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    rows = [pair(f"q{n}") for n in range(4)]
    lone = [example(f"other {n}", n % 2 == 0) for n in range(4)]
    if held_out == "sources":
        train, other = write_jsonl(*rows), write_jsonl(*lone, name="eval.jsonl")
        recipe, name = recipe_of(tokenizer, str(train), "simpo", eval=str(other)), f"data.eval: {other}: 4 of 4"
    else:  # all prompts aligned but one
        train = write_jsonl(*[example(f"q{n}", True) for n in range(9)], example("q9", False))
        recipe, name = recipe_of(tokenizer, str(train), eval=0.5), ": no unaligned example"
    assert name in refusal(recipe, chat)


SPELLINGS: dict[str, tuple[Any, Any]] = {"safe/unsafe": ("safe", "unsafe"), "1/0": (1, 0), "true/false": (True, False)}


def authors(safety: Any, n: int, prompt: str = PLANTED) -> Row:
    return {"safety": safety, "prompt": f"{prompt} {n}", "acc_responses": [f"a{n}"], "rej_responses": [f"r{n}"]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.permutations(sorted(SPELLINGS)),
    rare=st.lists(st.booleans(), min_size=3, max_size=12).filter(lambda rare: 0 < sum(rare) < len(rare) / 2),
)
def test_rows_of_the_rarer_spelling_of_safety_are_bad_rows(
    names: list[str], rare: list[bool], tokenizer: Path, chat: Chat, write_jsonl: Writer
) -> None:
    rows = [authors(SPELLINGS[names[is_rare]][n % 2], n) for n, is_rare in enumerate(rare)]
    path = write_jsonl(*rows, name=f"{uuid.uuid4()}.jsonl")
    splits = splits_of(recipe_of(tokenizer, str(path), on_bad_row="quarantine"), chat)
    assert sorted(splits.bad.places) == [(str(path), n) for n, is_rare in enumerate(rare, start=1) if is_rare]
    assert all(names[0] in reason and names[1] in reason and PLANTED not in reason for reason in splits.bad.reasons)
    good = [n for n, is_rare in enumerate(rare) if not is_rare]
    assert responses(splits.train.examples, chat) == [f"{side}{n}" for n in good for side in "ar"]
    assert splits.train.counts.pairs == len(good)
    assert splits.train.counts.harmful == 2 * sum(n % 2 for n in good)
    message = refusal(recipe_of(tokenizer, str(path)), chat)
    assert message.startswith(f"{path}:{splits.bad.places[0][1]}: safety is spelled")
    assert (f"and {sum(rare) - 1} more bad row" in message) == (sum(rare) > 1)


def test_sources_may_spell_safety_differently(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    paths = [
        write_jsonl(*[authors(value, n) for n, value in enumerate(values)], name=f"{number}.jsonl")
        for number, values in enumerate(SPELLINGS.values())
    ]
    splits = splits_of(recipe_of(tokenizer, [str(path) for path in paths]), chat)
    assert (splits.train.counts.harmful, splits.train.counts.harmless) == (6, 6)
    assert not splits.bad


def test_rarer_spelling_is_located_in_its_file(
    tokenizer: Path, chat: Chat, write_jsonl: Writer, tmp_path: Path
) -> None:
    write_jsonl(authors("safe", 0), authors("unsafe", 1), name="part-1.jsonl")
    write_jsonl(authors(1, 2), authors("safe", 3), authors(0, 4), name="part-2.jsonl")
    (tmp_path / "part-3.json").write_text(json.dumps([authors("safe", n) for n in range(5, 9)] + [authors("true", 9)]))
    splits = splits_of(recipe_of(tokenizer, str(tmp_path / "part-*"), on_bad_row="quarantine"), chat)
    second, third = str(tmp_path / "part-2.jsonl"), str(tmp_path / "part-3.json")
    assert sorted(splits.bad.places) == [(second, 1), (second, 3), (third, 5)]


def test_bad_rows_of_all_sources_are_listed(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    good = [pair(f"q{n}", n) for n in range(3)]
    train = write_jsonl(good[0], {"prompt": PLANTED}, *good[1:])
    other = write_jsonl(pair("new"), pair("newer"), pair("newest") | {"chosen": ""}, name="eval.jsonl")
    splits = splits_of(recipe_of(tokenizer, str(train), eval=str(other), on_bad_row="quarantine"), chat)
    lines = list(splits.bad.as_json())
    assert [(line["file"], line["line"]) for line in lines] == [(str(train), 2), (str(other), 3)]
    assert "chosen must be non-empty text" in lines[1]["reason"]
    assert PLANTED not in json.dumps(lines)
    assert len(splits.train.examples) == 6
    assert splits.eval is not None
    assert len(splits.eval.examples) == 4


def test_weights_apply_to_each_source_after_a_split(tokenizer: Path, chat: Chat, write_jsonl: Writer) -> None:
    first = write_jsonl(*[pair(f"q{n}", n) for n in range(20)], name="a.jsonl")
    second = write_jsonl(*[example(f"p{n}", n % 2 == 0) for n in range(20)], name="b.jsonl")
    mixture = [str(first), {"path": str(second), "weight": 2}]
    recipe = recipe_of(tokenizer, mixture, eval=0.3, batch={"examples": 6})
    examples = splits_of(recipe, chat).train.examples
    epochs = epoch_plan(recipe, examples)
    passes = Counter(row for step in range(epochs.steps_in(1)) for row in epochs.step(step).rows.tolist())
    assert [passes[row] for row in range(len(examples))] == (1 + examples.source).tolist()
    assert set(examples.source.tolist()) == {0, 1}
    # 3 units a step, since some are pairs
    units = sum(2 if examples.source[unit[0]] else 1 for unit in examples.units)
    assert epochs.steps_in(1) == -(-units // 3)
    recipe.optim = OptimConfig(epochs=1.5)
    assert total_steps(recipe, epochs.steps_in) == round(1.5 * epochs.steps_in(1))
