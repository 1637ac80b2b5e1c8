"""Prompts that are the same or nearly: what counts as a word, what as near, and where a match is said to be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raydiv.data.formats import CANONICAL, RecordReader
from raydiv.data.overlap import Match, PromptMatcher, normalized
from raydiv.data.tokenize import RecordChunk

BAKE = "How do I bake a loaf of sourdough bread at home?"
LOCK = "Which tools open the front door of a locked house?"


def near(prompt: str, *evaluated: str) -> list[bool]:
    return [
        bool(one)
        for one in PromptMatcher([normalized(e) for e in evaluated], [CANONICAL]).near([normalized(prompt)])[0]
    ]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("How DO  I\n(really) bake -- bread?!", "how do i really bake bread"),
        ("", ""),
        ("?!", ""),
        ("Straße, naïve CAFÉ", "strasse naïve café"),
        ("你好,世界 42", "你好 世界 42"),
        ([{"role": "user", "content": "Bake it!"}], "bake it"),
        (
            [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "Two."},
                {"role": "user", "content": "Three!"},
            ],
            "one two three",
        ),
    ],
)
def test_plain_is_what_was_said_in_words(prompt: Any, words: str) -> None:
    assert normalized(prompt) == words


@pytest.mark.parametrize(
    "prompt",
    [
        BAKE,
        "how do i BAKE a loaf of sourdough bread... at home",
        "Tell me, how do I bake a loaf of sourdough bread?",
        "At home: sourdough bread, how to bake a loaf of it?",
        "Loaf of sourdough bread. Bake at home.",
        "Home loaf, bread, sourdough: bake today!",  # most words, none of them in a row
        "How do I bake a loaf of rye with raisins, walnuts and seeds?",  # most of it in a row, few of the words
    ],
)
def test_reworded_prompt_is_near(prompt: str) -> None:
    assert near(prompt, BAKE, LOCK) == [True, False]


@pytest.mark.parametrize(
    "prompt",
    [
        "How do I bake a cake for a birthday?",
        "What is the capital of France?",
        "How do I get to the home of a friend?",
        "bread",
        "of the a to in",
        "",
    ],
)
def test_prompt_about_something_else_is_not_near(prompt: str) -> None:
    assert near(prompt, BAKE, LOCK) == [False, False]


def test_short_prompt_inside_a_long_one_is_near() -> None:
    assert near(f"Dear assistant, my oven is new, and so I would like to ask: {BAKE}", BAKE) == [True]


def test_near_does_not_depend_on_what_else_is_asked() -> None:
    prompts = [BAKE, LOCK, "What is the capital of France?", "?"]
    matcher = PromptMatcher([normalized(prompt) for prompt in prompts], [CANONICAL])
    together = matcher.near([normalized(prompt) for prompt in prompts])
    assert together.shape == (4, 4)
    assert together.tolist() == [near(prompt, *prompts) for prompt in prompts]


def bundle(*records: Any, source: int = 0, file: int = 3) -> RecordChunk:
    raw = [(10 * n, each if isinstance(each, bytes) else json.dumps(each).encode()) for n, each in enumerate(records)]
    return RecordChunk(source, file, "name", raw)


def row(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": "x", "label": True}


def test_match_says_which_prompt_is_where_and_the_same_goes_before_the_near() -> None:
    matcher = PromptMatcher([normalized(BAKE), normalized(LOCK)], [CANONICAL])
    records = bundle(
        b"{",
        row(f"Please: {BAKE}"),
        row(BAKE.upper()),
        row(f"Again: {BAKE}"),
        row("What is the capital of France?"),
        row([{"role": "user", "content": "open the front door of a locked house with which tools"}]),
        {"prompt": LOCK},
    )
    (found,) = matcher([records])
    assert sorted(found, key=lambda match: match.number) == [Match(0, True, 3, 20), Match(1, False, 3, 50)]


def test_bundles_are_read_as_their_source_says() -> None:
    renamed = RecordReader({"prompt": "question"}, {"completion": "x", "label": True})
    matcher = PromptMatcher([normalized(BAKE)], [CANONICAL, renamed])
    found = matcher([bundle(row(BAKE)), bundle({"question": BAKE}, source=1), bundle({"question": BAKE}), bundle()])
    assert found == [[Match(0, True, 3, 0)], [Match(0, True, 3, 0)], [], []]


def test_prompts_without_words_are_not_the_same() -> None:
    matcher = PromptMatcher([normalized("🙂🙂")], [CANONICAL])
    assert matcher([bundle(row("?!?"))]) == [[]]
