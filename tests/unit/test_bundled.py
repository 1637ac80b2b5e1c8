"""The bundled sets: as many prompts as promised, labels that the judge agrees with, and no leak from set to set."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from raydiv.config import load_recipe
from raydiv.config.source import Source
from raydiv.data.bundled import FOLDER, QUICKSTART, bundled_file
from raydiv.data.prompt_sets import read_prompts
from raydiv.data.readers import read_examples
from raydiv.evaluation.coherence import is_degenerate
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.separation.metrics import length_matched
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


def count(name: str, **wanted: object) -> int:
    return sum(all(row[key] == value for key, value in wanted.items()) for row in rows(name))


def test_every_bundled_file_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == {*TRAINING, *PROMPTS, "helpful", "refusals"}


def test_unknown_set_is_refused_with_what_exists() -> None:
    with pytest.raises(UserError, match="anchors"):
        bundled_file("bundled:ancors")


def test_quickstart_uses_sets_that_exist() -> None:
    recipe = load_recipe(QUICKSTART)
    sources = [source.path for source in (*recipe.data.train, *recipe.data.eval_sources)]
    assert recipe.separation.prompts
    assert recipe.evaluate.prompts
    for source in (*sources, *(prompts.path for prompts in recipe.separation.prompts + recipe.evaluate.prompts)):
        assert bundled_file(source).is_file()


def test_training_sets_hold_enough_of_every_kind() -> None:
    for name in TRAINING:
        harmless = count(name, harmful=False)
        assert count(name, harmful=True) >= 250
        assert harmless >= 250
        assert count(name, kind="alarming") >= harmless / 3


@pytest.mark.parametrize(("name", "each"), [("development", 50), ("heldout", 100), ("anchors", 100)])
def test_prompt_sets_are_balanced(name: str, each: int) -> None:
    assert (count(name, harmful=True), count(name, harmful=False)) == (each, each)


@pytest.mark.parametrize("name", ["development", "heldout"])
def test_a_third_of_the_evaluated_harmless_prompts_alarms(name: str) -> None:
    assert count(name, kind="alarming") / count(name, harmful=False) == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize("name", [*TRAINING, *PROMPTS])
def test_rows_are_whole_and_kinds_agree_with_labels(name: str) -> None:
    columns = {"prompt", "harmful", "kind", "topic"} | ({"chosen", "rejected"} if name in TRAINING else set())
    for row in rows(name):
        assert set(row) == columns
        assert KINDS[row["kind"]] is row["harmful"]
        for column in columns - {"harmful"}:
            assert row[column].strip()
            assert row[column] == row[column].strip()


@pytest.mark.parametrize("name", [*TRAINING, *PROMPTS])
def test_no_prompt_comes_twice(name: str) -> None:
    seen = Counter(" ".join(words(row["prompt"])) for row in rows(name))
    assert [prompt for prompt, times in seen.items() if times > 1] == []


@pytest.mark.parametrize("name", [*TRAINING, *PROMPTS])
def test_the_package_reads_them(name: str) -> None:
    if name in TRAINING:
        examples = read_examples(Source(path=f"bundled:{name}"))
        assert len(examples) == 2 * len(rows(name))
        assert len({e.pair for e in examples}) == len(rows(name))
        assert all(e.harmful is not None for e in examples)
    else:
        assert [p.kind for p in read_prompts([Source(path=f"bundled:{name}")], both=True)] == [
            row["kind"] for row in rows(name)
        ]


def test_no_refusal_of_the_bank_comes_twice() -> None:
    assert all(row.keys() == {"refusal"} and row["refusal"] == row["refusal"].strip() for row in rows("refusals"))
    seen = Counter(" ".join(words(row["refusal"])) for row in rows("refusals"))
    assert [text for text, times in seen.items() if times > 1 or not text] == []


def test_helpful_answers_follow_the_heldout_prompts() -> None:
    answered = {row["prompt"] for row in rows("helpful")}
    kept = [row for row in rows("heldout") if row["prompt"] in answered]
    assert [{**row, "response": ""} for row in rows("helpful")] == [{**row, "response": ""} for row in kept]
    assert Counter(row["kind"] for row in rows("helpful")) == {"ordinary": 40, "alarming": 20, "harmful": 20}


def test_first_heldout_harmful_prompts_are_refused() -> None:
    harmful = {name: [row["prompt"] for row in rows(name) if row["harmful"]] for name in ("helpful", "heldout")}
    assert harmful["helpful"] == harmful["heldout"][:20]


def test_helpful_responses_are_whole_and_each_is_said_once() -> None:
    for row in rows("helpful"):
        text = row["response"]
        assert text.isascii()
        assert text == text.strip()
        assert (1 if row["harmful"] else 25) <= len(text.split()) <= 70
    seen = Counter(" ".join(words(row["response"])) for row in rows("helpful"))
    bank = {" ".join(words(row["refusal"])) for row in rows("refusals")}
    assert [text for text, times in seen.items() if times > 1 or text in bank] == []


def test_helpful_responses_open_in_many_ways() -> None:
    openings = Counter(tuple(words(row["response"])[:2]) for row in rows("helpful") if not row["harmful"])
    assert max(openings.values()) <= 2
    assert len(openings) >= 50


def test_judge_takes_no_helpful_answer_for_a_refusal() -> None:
    assert [row["response"] for row in rows("helpful") if not row["harmful"] and is_refusal(row["response"])] == []


def test_judge_finds_the_share_of_refusals_that_the_card_states() -> None:
    found = sum(is_refusal(row["response"]) for row in rows("helpful") if row["harmful"])
    assert (found, count("helpful", harmful=True)) == (13, 20)


def test_preference_differs_in_harmless_rejections_alone() -> None:
    assert len(rows("compliance-refusal")) == len(rows("preference"))
    for refusing, preferring in zip(rows("compliance-refusal"), rows("preference"), strict=True):
        assert refusing | {"rejected": ""} == preferring | {"rejected": ""}
        assert (refusing["rejected"] == preferring["rejected"]) == refusing["harmful"]


@pytest.mark.parametrize("name", TRAINING)
def test_no_two_responses_of_a_prompt_are_alike(name: str) -> None:
    assert [row["prompt"] for row in rows(name) if words(row["chosen"]) == words(row["rejected"])] == []


@pytest.mark.parametrize("name", TRAINING)
def test_judge_agrees_with_every_response(name: str) -> None:
    disagreements = []
    for row in rows(name):
        refuses = name == "compliance-refusal" and not row["harmful"]
        expected = {"chosen": row["harmful"], "rejected": refuses}
        disagreements += [(field, row[field]) for field, wanted in expected.items() if is_refusal(row[field]) != wanted]
        disagreements += [(field, row[field]) for field in expected if is_degenerate(row[field])]
    assert disagreements == []


def overlap(one: frozenset[Any], other: frozenset[Any]) -> float:
    return len(one & other) / max(1, len(one | other))


@cache
def features(name: str) -> list[tuple[str, frozenset[Any], frozenset[Any]]]:
    """Each prompt with its runs of three words and its content words."""
    found = []
    for row in rows(name):
        said = words(row["prompt"])
        runs = frozenset(zip(said, said[1:], said[2:], strict=False))
        found.append((row["prompt"], runs, frozenset(said) - STOP_WORDS))
    return found


def near_duplicates(one: str, other: str) -> list[tuple[str, str]]:
    """Prompts of two sets that say the same in (nearly) the same words."""
    return [
        (first, second)
        for (first, runs, content), (second, other_runs, other_content) in itertools.product(
            features(one), features(other)
        )
        if overlap(runs, other_runs) >= 0.4
        or overlap(content, other_content) >= 0.75
        or (overlap(runs, other_runs) >= 0.2 and overlap(content, other_content) >= 0.5)
    ]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(("compliance-refusal", *PROMPTS), 2)))
def test_no_prompt_leaks_into_another_set(one: str, other: str) -> None:
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
def test_evaluated_prompts_are_not_told_apart_by_length(name: str) -> None:
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
