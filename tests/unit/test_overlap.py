"""Equal and near prompts: normalization, the measure of nearness, and the places of matches."""

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
    matcher = PromptMatcher([normalized(text) for text in evaluated], [CANONICAL])
    return matcher.near([normalized(prompt)])[0].tolist()


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
def test_normalized(prompt: Any, words: str) -> None:
    assert normalized(prompt) == words


@pytest.mark.parametrize(
    "prompt",
    [
        BAKE,
        "how do i BAKE a loaf of sourdough bread... at home",
        "Tell me, how do I bake a loaf of sourdough bread?",
        "At home: sourdough bread, how to bake a loaf of it?",
        "Loaf of sourdough bread. Bake at home.",
        "Home loaf, bread, sourdough: bake today!",  # most words, no common trigram
        "How do I bake a loaf of rye with raisins, walnuts and seeds?",  # most trigrams, few of the words
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
def test_prompt_on_another_topic_is_not_near(prompt: str) -> None:
    assert near(prompt, BAKE, LOCK) == [False, False]


def test_short_prompt_inside_a_long_one_is_near() -> None:
    assert near(f"Dear assistant, my oven is new, and so I would like to ask: {BAKE}", BAKE) == [True]


def test_near_does_not_depend_on_other_prompts() -> None:
    prompts = [BAKE, LOCK, "What is the capital of France?", "?"]
    matcher = PromptMatcher([normalized(prompt) for prompt in prompts], [CANONICAL])
    together = matcher.near([normalized(prompt) for prompt in prompts])
    assert together.shape == (4, 4)
    assert together.tolist() == [near(prompt, *prompts) for prompt in prompts]


def chunk(*records: Any, source: int = 0, file: int = 3) -> RecordChunk:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return RecordChunk(source, file, "name", [(10 * number, line) for number, line in enumerate(lines)])


def row(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": "x", "label": True}


def test_match_has_number_and_position_and_an_equal_prompt_comes_before_a_near_one() -> None:
    matcher = PromptMatcher([normalized(BAKE), normalized(LOCK)], [CANONICAL])
    records = chunk(
        b"{",
        row(f"Please: {BAKE}"),
        row(BAKE.upper()),
        row(f"Again: {BAKE}"),
        row("What is the capital of France?"),
        row([{"role": "user", "content": "open the front door of a locked house with which tools"}]),
        {"prompt": LOCK},
    )
    (matches,) = matcher([records])
    assert sorted(matches, key=lambda match: match.number) == [Match(0, True, 3, 20), Match(1, False, 3, 50)]


def test_chunks_are_read_by_the_reader_of_their_source() -> None:
    renamed = RecordReader({"prompt": "question"}, {"completion": "x", "label": True})
    matcher = PromptMatcher([normalized(BAKE)], [CANONICAL, renamed])
    matches = matcher([chunk(row(BAKE)), chunk({"question": BAKE}, source=1), chunk({"question": BAKE}), chunk()])
    assert matches == [[Match(0, True, 3, 0)], [Match(0, True, 3, 0)], [], []]


def test_prompts_without_words_match_nothing() -> None:
    matcher = PromptMatcher([normalized("🙂🙂")], [CANONICAL])
    assert matcher([chunk(row("?!?"))]) == [[]]
