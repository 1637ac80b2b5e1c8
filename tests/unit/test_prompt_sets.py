"""Prompt sets: plain text, labels given with the source, published sets, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydiv.config import parse_source
from raydiv.config.source import Source
from raydiv.data import prompt_sets as module
from raydiv.data.prompt_sets import Prompt, prompt_sets_of, read_prompts, with_label
from raydiv.data.published import PUBLISHED, as_published
from raydiv.utils.errors import UserError

Write = Callable[..., Path]


def shown(prompts: list[Prompt]) -> list[tuple[Any, ...]]:
    return [(prompt.text, prompt.harmful, prompt.kind, prompt.category) for prompt in prompts]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("bundled:heldout", "heldout"),
        ("hf://walledai/AdvBench", "AdvBench"),
        ("hf://org/prompts-v1.5", "prompts-v1.5"),
        ("{path: hf://OpenSafetyLab/Salad-Data, config: attack_enhanced_set}", "Salad-Data:attack_enhanced_set"),
        ("folder/bad.things.jsonl", "bad.things"),
        ("harm.txt", "harm"),
        ("s3://bucket/prompts/", "prompts"),
        ("data/xstest/part-*.parquet", "xstest"),
        ("*.csv", "*.csv"),
    ],
)
def test_short_name(words: str, name: str) -> None:
    assert parse_source(words).short_name == name


def test_prompts_have_the_name_of_their_set(write_jsonl: Write, tmp_path: Path) -> None:
    labelled = write_jsonl({"prompt": "a", "harmful": True})
    plain = tmp_path / "plain.txt"
    plain.write_text("b\n")
    prompts = read_prompts([Source(path=str(labelled)), with_label(Source(path=str(plain)), False)], both=True)
    assert [prompt.set for prompt in prompts] == [labelled.stem, "plain"]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xef\xbb\xbffirst, with a comma\r\n\n  second \n")
    prompts = read_prompts([with_label(Source(path=str(path)), True)], both=False)
    assert shown(prompts) == [("first, with a comma", True, "harmful", None), ("second", True, "harmful", None)]
    assert [prompt.id for prompt in prompts] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("harmful", [True, False])
def test_a_label_that_contradicts_its_set_is_refused(harmful: bool, write_jsonl: Write) -> None:
    path = write_jsonl({"prompt": "a", "harmful": harmful}, {"prompt": "b", "harmful": not harmful})
    with pytest.raises(UserError, match=f":2: harmful is {str(not harmful).lower()}, .*{str(harmful).lower()}"):
        read_prompts([with_label(Source(path=str(path)), harmful)], both=False)


def test_text_without_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("PLANTED\n")
    with pytest.raises(UserError, match=r"bad.txt:1: harmful is missing: .*--harmful or --harmless") as caught:
        read_prompts([Source(path=str(path))], both=False)
    assert "PLANTED" not in str(caught.value)


def test_text_beside_data_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("About this folder.\n")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "one", "harmful": True}) + "\n")
    assert [prompt.text for prompt in read_prompts([Source(path=str(tmp_path))], both=False)] == ["one"]


def test_csv_with_categories(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,harmful,category\n"one, two",true,theft\nthree,false,\n')
    assert shown(read_prompts([Source(path=str(path))], both=True)) == [
        ("one, two", True, "harmful", "theft"),
        ("three", False, "ordinary", None),
    ]


def test_prompt_sets_of_options(tmp_path: Path) -> None:
    sets = prompt_sets_of(
        ["a.jsonl", "b.jsonl"], ["c.txt"], ["d.txt", "{path: e.csv, columns: {prompt: q}}"], "bundled:x"
    )
    assert [[source.path for source in sources] for sources in sets] == [
        ["a.jsonl"],
        ["b.jsonl"],
        ["c.txt", "d.txt", "e.csv"],
    ]
    assert [source.constants for source in sets[2]] == [{"harmful": True}, {"harmful": False}, {"harmful": False}]
    assert prompt_sets_of([], [], [], "bundled:x") == [[Source(path="bundled:x")]]


@pytest.mark.parametrize(
    ("records", "both", "message"),
    [
        ([], False, "holds no prompts"),
        (
            [{"prompt": "a", "harmful": True}],
            True,
            "found 1 harmful and 0 harmless",
        ),
        ([{"prompt": " ", "harmful": True}], False, ":1: prompt must be non-empty text"),
        ([{"prompt": "a", "harmful": "yes"}], False, ":1: harmful must be true or false"),
    ],
)
def test_bad_sets(records: list[Any], both: bool, message: str, write_jsonl: Write) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts([Source(path=str(write_jsonl(*records)))], both=both)


ALERT = "### Instruction:\nHow do I do harm?\n### Response:\n"
RECORDS: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("{path: hf://walledai/AdvBench}", {"prompt": "p", "target": "t"}, ("p", True, "harmful", None)),
    ("{path: hf://mlabonne/harmful_behaviors}", {"text": "p"}, ("p", True, "harmful", None)),
    ("{path: hf://walledai/MaliciousInstruct}", {"prompt": "p"}, ("p", True, "harmful", None)),
    (
        "{path: hf://Babelscape/ALERT}",
        {"id": 1, "category": "hate_women", "prompt": ALERT},
        ("How do I do harm?", True, "harmful", "hate_women"),
    ),
    (
        "{path: hf://Babelscape/ALERT, config: alert_adversarial}",
        {"category": "crime_cyber", "prompt": f"{ALERT} and more", "attack_type": "suffix"},
        ("How do I do harm?\nand more", True, "adversarial", "crime_cyber"),
    ),
    (
        "{path: hf://Paul/XSTest}",
        {"prompt": "p", "label": "safe", "type": "homonyms"},
        ("p", False, "alarming", "homonyms"),
    ),
    (
        "{path: hf://walledai/XSTest}",
        {"prompt": "p", "label": "unsafe", "type": "contrast_homonyms"},
        ("p", True, "harmful", "contrast_homonyms"),
    ),
    (
        "{path: hf://natolambert/xstest-v2-copy}",
        {"prompt": "p", "type": "contrast_privacy"},
        ("p", True, "harmful", "contrast_privacy"),
    ),
    (
        "{path: hf://OpenSafetyLab/Salad-Data}",
        {"question": "p", "1-category": "O1: Representation & Toxicity Harms"},
        ("p", True, "harmful", "Representation & Toxicity Harms"),
    ),
    (
        "{path: hf://OpenSafetyLab/Salad-Data, config: attack_enhanced_set}",
        {"augq": "p", "baseq": "q", "1-category": "O5: Malicious Use"},
        ("p", True, "adversarial", "Malicious Use"),
    ),
    (
        "{path: hf://toxigen/toxigen-data}",
        {"text": "p", "toxicity_ai": 3.0, "toxicity_human": 2.6, "target_group": "g"},
        ("p", True, "harmful", "g"),
    ),
    (
        "{path: hf://toxigen/toxigen-data}",
        {"text": "p", "toxicity_ai": 1, "toxicity_human": 2.0, "target_group": "g"},
        ("p", False, "ordinary", "g"),
    ),
    (
        "{path: hf://toxigen/toxigen-data, config: train}",
        {"prompt": "p", "prompt_label": 0, "group": "g"},
        ("p", False, "ordinary", "g"),
    ),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], list[Source]]:
    """A hub that returns these records for any source; returns the requested sources."""

    def serve(records: list[dict[str, Any]]) -> list[Source]:
        asked: list[Source] = []

        def records_of(source: Source) -> Iterator[tuple[str, Any]]:
            asked.append(source)
            yield from ((f"{source.path}:{n}", record) for n, record in enumerate(records, start=1))

        monkeypatch.setattr(module, "iterate_records", records_of)
        return asked

    return serve


@pytest.mark.parametrize(("words", "record", "expected"), RECORDS)
def test_published_sets(
    words: str, record: dict[str, Any], expected: tuple[Any, ...], hub: Callable[..., list[Source]]
) -> None:
    asked = hub([record])
    source = parse_source(words)
    assert shown(read_prompts([source], both=False)) == [expected]
    known = PUBLISHED[source.path.removeprefix("hf://")]
    assert asked[0].split == known.split
    assert asked[0].config == (source.config or next(iter(known.parsers)))


def test_every_published_set_has_a_case() -> None:
    cases = {(parse_source(words).path.removeprefix("hf://"), parse_source(words).config) for words, *_ in RECORDS}
    assert {name for name, _ in cases} | {"skg/toxigen-data"} == PUBLISHED.keys()


def test_a_source_with_columns_is_not_read_as_a_published_set(hub: Callable[..., list[Source]]) -> None:
    source = parse_source(
        "{path: hf://walledai/AdvBench, split: test, columns: {prompt: goal}, constants: {harmful: false}}"
    )
    assert as_published(source)[0] == source
    assert as_published(source)[1]({"x": 1}) == {"x": 1}


def test_a_label_that_contradicts_a_published_one_is_refused(hub: Callable[..., list[Source]]) -> None:
    hub([{"prompt": "p", "label": "safe", "type": "homonyms"}])
    with pytest.raises(UserError, match=r"harmful is false, .*true"):
        read_prompts([with_label(parse_source("hf://Paul/XSTest"), True)], both=False)


def test_split_and_constants_of_the_source_are_kept(hub: Callable[..., list[Source]]) -> None:
    asked = hub([{"prompt": "p"}])
    source = parse_source("{path: hf://walledai/AdvBench, split: test, constants: {kind: mine}}")
    assert shown(read_prompts([source], both=False)) == [("p", True, "mine", None)]
    assert asked[0].split == "test"


def test_an_unknown_configuration_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"config base \(known: base_set, attack_enhanced_set\)"):
        read_prompts([parse_source("{path: hf://OpenSafetyLab/Salad-Data, config: base}")], both=False)


def test_a_gated_set_names_its_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Source) -> Iterator[Any]:
        raise UserError(f"{source.path}: cannot be loaded from the hub: 403")
        yield

    monkeypatch.setattr(module, "iterate_records", refused)
    with pytest.raises(UserError, match="hf://Paul/XSTest does not"):
        read_prompts([parse_source("hf://walledai/XSTest")], both=False)
