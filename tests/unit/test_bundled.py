"""The bundled sets: their sizes, labels that the judge agrees with, and no overlap between sets."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from raydiv.commands.data_build.build import ExampleRow, recovery_row
from raydiv.commands.data_build.prompts import AnsweredPrompt
from raydiv.config import load_recipe
from raydiv.config.source import Source
from raydiv.data.bundled import FOLDER, QUICKSTART, bundled_file
from raydiv.data.prompt_sets import read_prompts
from raydiv.data.readers import read_examples
from raydiv.evaluation.coherence import is_degenerate
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.separation.metrics import length_matched
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError

Row = dict[str, Any]

TRAINING = ("compliance-refusal", "preference")
PROMPTS = ("development", "heldout", "anchors")
KINDS = {"harmful": True, "ordinary": False, "alarming": False}
_COMMON = (
    "a an the of to in on for and or is are was be do does did i my me we our us you your it its this that these with "
    "from by at as so if but not no can could would should will how what which when where why who whom their them they "
    "he she his her him has have had about into out up over some any all please tell show give explain describe write "
    "help want need get make find let there than then without ever one"
)
STOP_WORDS = frozenset(_COMMON.split())


@cache
def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in bundled_file(f"bundled:{name}").read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'"))


def count(name: str, **values: object) -> int:
    return sum(all(row[key] == value for key, value in values.items()) for row in rows(name))


def test_every_bundled_file_has_tests() -> None:
    others = {"helpful", "recovery", "refusals"}
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == {*TRAINING, *PROMPTS, *others}


def test_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="anchors"):
        bundled_file("bundled:ancors")


def test_quickstart_uses_sets_that_exist() -> None:
    recipe = load_recipe(QUICKSTART)
    sources = [source.path for source in (*recipe.data.train, *recipe.data.eval_sources)]
    assert recipe.separation.prompts
    assert recipe.evaluate.prompts
    for source in (*sources, *(prompts.path for prompts in recipe.separation.prompts + recipe.evaluate.prompts)):
        assert bundled_file(source).is_file()


def test_training_sets_have_enough_prompts_of_every_kind() -> None:
    for name in TRAINING:
        harmless = count(name, harmful=False)
        assert count(name, harmful=True) >= 250
        assert harmless >= 250
        assert count(name, kind="alarming") >= harmless / 3


@pytest.mark.parametrize(("name", "size"), [("development", 50), ("heldout", 100), ("anchors", 100)])
def test_prompt_sets_are_balanced(name: str, size: int) -> None:
    assert (count(name, harmful=True), count(name, harmful=False)) == (size, size)


@pytest.mark.parametrize("name", ["development", "heldout"])
def test_a_third_of_the_harmless_evaluation_prompts_is_alarming(name: str) -> None:
    assert count(name, kind="alarming") / count(name, harmful=False) == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize("name", [*TRAINING, *PROMPTS])
def test_rows_are_complete_and_kinds_agree_with_labels(name: str) -> None:
    columns = {"prompt", "harmful", "kind", "topic"} | ({"chosen", "rejected"} if name in TRAINING else set())
    for row in rows(name):
        assert set(row) == columns
        assert KINDS[row["kind"]] is row["harmful"]
        for column in columns - {"harmful"}:
            assert row[column].strip()
            assert row[column] == row[column].strip()


@pytest.mark.parametrize("name", [*TRAINING, *PROMPTS])
def test_prompts_are_distinct(name: str) -> None:
    counts = Counter(" ".join(words(row["prompt"])) for row in rows(name))
    assert [prompt for prompt, number in counts.items() if number > 1] == []


@pytest.mark.parametrize("name", [*TRAINING, *PROMPTS])
def test_raydiv_reads_them(name: str) -> None:
    if name in TRAINING:
        examples = read_examples(Source(path=f"bundled:{name}"))
        assert len(examples) == 2 * len(rows(name))
        assert len({e.pair for e in examples}) == len(rows(name))
        assert all(e.harmful is not None for e in examples)
    else:
        assert [p.kind for p in read_prompts([Source(path=f"bundled:{name}")], both=True)] == [
            row["kind"] for row in rows(name)
        ]


def test_recovery_is_what_data_build_makes_of_the_compliance_refusal_rows() -> None:
    for row, begun in zip(rows("compliance-refusal"), rows("recovery"), strict=True):
        key = digest(row["prompt"])
        prompt = AnsweredPrompt(key, row["prompt"], row["harmful"], "", {})
        whole = ExampleRow(prompt, row["chosen"], row["rejected"])
        made = recovery_row(whole, row["rejected"], 40, int(digest("recovery", 0, key), 16))
        assert made is not None
        assert begun == {
            **{name: value for name, value in made.as_json(conversational=True).items() if name != "source"},
            **{name: row[name] for name in ("kind", "topic")},
        }
    assert len(read_examples(Source(path="bundled:recovery"))) == 2 * 759


def test_refusals_of_the_bank_are_distinct() -> None:
    assert all(row.keys() == {"refusal"} and row["refusal"] == row["refusal"].strip() for row in rows("refusals"))
    counts = Counter(" ".join(words(row["refusal"])) for row in rows("refusals"))
    assert [text for text, number in counts.items() if number > 1 or not text] == []


def test_helpful_answers_are_in_the_order_of_the_heldout_prompts() -> None:
    answered = {row["prompt"] for row in rows("helpful")}
    heldout = [row for row in rows("heldout") if row["prompt"] in answered]
    assert [{**row, "response": ""} for row in rows("helpful")] == [{**row, "response": ""} for row in heldout]
    assert Counter(row["kind"] for row in rows("helpful")) == {"ordinary": 40, "alarming": 20, "harmful": 20}


def test_first_heldout_harmful_prompts_are_refused() -> None:
    harmful = {name: [row["prompt"] for row in rows(name) if row["harmful"]] for name in ("helpful", "heldout")}
    assert harmful["helpful"] == harmful["heldout"][:20]


def test_helpful_responses_are_complete_and_distinct() -> None:
    for row in rows("helpful"):
        text = row["response"]
        assert text.isascii()
        assert text == text.strip()
        assert (1 if row["harmful"] else 25) <= len(text.split()) <= 70
    counts = Counter(" ".join(words(row["response"])) for row in rows("helpful"))
    bank = {" ".join(words(row["refusal"])) for row in rows("refusals")}
    assert [text for text, number in counts.items() if number > 1 or text in bank] == []


def test_helpful_responses_open_in_many_ways() -> None:
    openings = Counter(tuple(words(row["response"])[:2]) for row in rows("helpful") if not row["harmful"])
    assert max(openings.values()) <= 2
    assert len(openings) >= 50


def test_judge_classifies_no_helpful_answer_as_a_refusal() -> None:
    assert [row["response"] for row in rows("helpful") if not row["harmful"] and is_refusal(row["response"])] == []


def test_judge_finds_the_share_of_refusals_that_the_card_states() -> None:
    refusals = sum(is_refusal(row["response"]) for row in rows("helpful") if row["harmful"])
    assert (refusals, count("helpful", harmful=True)) == (15, 20)


def test_preference_differs_in_harmless_rejections_alone() -> None:
    assert len(rows("compliance-refusal")) == len(rows("preference"))
    for refusing, preferring in zip(rows("compliance-refusal"), rows("preference"), strict=True):
        assert refusing | {"rejected": ""} == preferring | {"rejected": ""}
        assert (refusing["rejected"] == preferring["rejected"]) == refusing["harmful"]


@pytest.mark.parametrize("name", TRAINING)
def test_both_responses_to_a_prompt_differ(name: str) -> None:
    assert [row["prompt"] for row in rows(name) if words(row["chosen"]) == words(row["rejected"])] == []


@pytest.mark.parametrize("name", TRAINING)
def test_judge_agrees_with_every_response(name: str) -> None:
    disagreements = []
    for row in rows(name):
        refuses = name == "compliance-refusal" and not row["harmful"]
        expected = {"chosen": row["harmful"], "rejected": refuses}
        disagreements += [(field, row[field]) for field, label in expected.items() if is_refusal(row[field]) != label]
        disagreements += [(field, row[field]) for field in expected if is_degenerate(row[field])]
    assert disagreements == []


def overlap(first: frozenset[Any], second: frozenset[Any]) -> float:
    return len(first & second) / max(1, len(first | second))


@cache
def features(name: str) -> list[tuple[str, frozenset[Any], frozenset[Any]]]:
    """Each prompt with its word trigrams and its content words."""
    prompts = []
    for row in rows(name):
        text = words(row["prompt"])
        trigrams = frozenset(zip(text, text[1:], text[2:], strict=False))
        prompts.append((row["prompt"], trigrams, frozenset(text) - STOP_WORDS))
    return prompts


def near_duplicates(one: str, other: str) -> list[tuple[str, str]]:
    """Prompts of two sets with (nearly) the same words."""
    return [
        (first, second)
        for (first, trigrams, content), (second, other_trigrams, other_content) in itertools.product(
            features(one), features(other)
        )
        if overlap(trigrams, other_trigrams) >= 0.4
        or overlap(content, other_content) >= 0.75
        or (overlap(trigrams, other_trigrams) >= 0.2 and overlap(content, other_content) >= 0.5)
    ]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(("compliance-refusal", *PROMPTS), 2)))
def test_no_prompt_is_in_two_sets(one: str, other: str) -> None:
    exact = {tuple(words(row["prompt"])) for row in rows(one)} & {tuple(words(row["prompt"])) for row in rows(other)}
    assert exact == set()
    assert near_duplicates(one, other) == []


def test_near_duplicates_are_found() -> None:
    assert len(near_duplicates("anchors", "anchors")) >= len(rows("anchors"))


def test_anchors_are_matched_in_length() -> None:
    from sklearn.metrics import roc_auc_score

    harmful = np.array([row["harmful"] for row in rows("anchors")])
    for measure in (len, lambda prompt: len(words(prompt))):
        lengths = np.array([measure(row["prompt"]) for row in rows("anchors")], dtype=np.int64)
        assert abs(roc_auc_score(harmful, lengths) - 0.5) < 0.03
        assert lengths[harmful].mean() == pytest.approx(lengths[~harmful].mean(), rel=0.03)
        assert lengths[harmful].std() == pytest.approx(lengths[~harmful].std(), rel=0.1)
    assert len(length_matched(harmful, lengths)) >= 0.9 * len(harmful)


@pytest.mark.parametrize("name", ["development", "heldout"])
def test_evaluation_prompts_are_not_separable_by_length(name: str) -> None:
    from sklearn.metrics import roc_auc_score

    harmful = [row["harmful"] for row in rows(name)]
    lengths = [len(words(row["prompt"])) for row in rows(name)]
    assert abs(roc_auc_score(harmful, lengths) - 0.5) < 0.1


@pytest.mark.parametrize("mark", ["?", ".", "lower case"])
def test_anchors_are_not_told_apart_by_their_form(mark: str) -> None:
    def has(prompt: str) -> bool:
        return prompt[0].islower() if mark == "lower case" else prompt.endswith(mark)

    shares = [
        np.mean([has(row["prompt"]) for row in rows("anchors") if row["harmful"] is harmful])
        for harmful in (True, False)
    ]
    assert abs(shares[0] - shares[1]) <= 0.15
