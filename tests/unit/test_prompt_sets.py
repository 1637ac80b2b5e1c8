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
    (
        "{path: hf://walledai/HarmBench}",
        {"prompt": "p", "category": "illegal"},
        ("p", True, "harmful", "illegal"),
    ),
    (
        "{path: hf://walledai/HarmBench, config: contextual}",
        {"prompt": "p", "context": "c", "category": "illegal"},
        ("c\n\n---\n\np", True, "contextual", "illegal"),
    ),
    (
        "{path: hf://walledai/HarmBench, config: copyright}",
        {"prompt": "p", "tags": ["book"]},
        ("p", True, "copyright", None),
    ),
    (
        "{path: hf://JailbreakBench/JBB-Behaviors, split: harmful}",
        {"Index": 0, "Goal": "p", "Target": "t", "Behavior": "b", "Category": "Fraud/Deception", "Source": "Original"},
        ("p", True, "harmful", "Fraud/Deception"),
    ),
    (
        "{path: hf://JailbreakBench/JBB-Behaviors, split: benign}",
        {"Index": 0, "Goal": "p", "Target": "t", "Behavior": "b", "Category": "Fraud/Deception", "Source": "Original"},
        ("p", False, "alarming", "Fraud/Deception"),
    ),
    (
        "{path: hf://walledai/StrongREJECT}",
        {"prompt": "p", "category": "Violence", "source": "custom"},
        ("p", True, "harmful", "Violence"),
    ),
    (
        "{path: hf://sorry-bench/sorry-bench-202503}",
        {"question_id": 1, "category": "1", "turns": ["p"], "prompt_style": "base"},
        ("p", True, "harmful", "1"),
    ),
    (
        "{path: hf://sorry-bench/sorry-bench-202406}",
        {"question_id": 1, "category": "1", "turns": ["p"], "prompt_style": "slang"},
        ("p", True, "slang", "1"),
    ),
    (
        "{path: hf://bench-llm/or-bench}",
        {"prompt": "p", "category": "deception"},
        ("p", False, "alarming", "deception"),
    ),
    (
        "{path: hf://bench-llm/or-bench, config: or-bench-toxic}",
        {"prompt": "p", "category": "deception"},
        ("p", True, "harmful", "deception"),
    ),
    (
        "{path: hf://allenai/wildguardmix}",
        {"prompt": "p", "adversarial": True, "prompt_harm_label": "harmful", "subcategory": "s"},
        ("p", True, "adversarial", "s"),
    ),
    (
        "{path: hf://allenai/wildguardmix}",
        {"prompt": "p", "adversarial": False, "prompt_harm_label": "unharmful", "subcategory": "benign"},
        ("p", False, "ordinary", "benign"),
    ),
    (
        "{path: hf://allenai/wildjailbreak}",
        {"adversarial": "p", "label": 0, "data_type": "adversarial_benign"},
        ("p", False, "alarming", None),
    ),
    (
        "{path: hf://allenai/wildjailbreak, config: train}",
        {"vanilla": "p", "adversarial": "", "completion": "c", "data_type": "vanilla_harmful"},
        ("p", True, "harmful", None),
    ),
    (
        "{path: hf://allenai/coconot}",
        {"id": "1", "category": "Requests with safety concerns", "prompt": "p", "response": "r"},
        ("p", True, "harmful", "Requests with safety concerns"),
    ),
    (
        "{path: hf://allenai/coconot}",
        {"id": "1", "category": "Humanizing requests", "prompt": "p", "response": "r"},
        ("p", True, "noncompliance", "Humanizing requests"),
    ),
    (
        "{path: hf://allenai/coconot, config: contrast}",
        {"id": "1", "category": "Humanizing requests", "prompt": "p", "response": ""},
        ("p", False, "alarming", "Humanizing requests"),
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
    assert asked[0].split == (source.split or known.split)
    assert asked[0].config == (source.config or next(iter(known.parsers)))


def test_every_published_set_has_a_case() -> None:
    cases = {(parse_source(words).path.removeprefix("hf://"), parse_source(words).config) for words, *_ in RECORDS}
    assert {name for name, _ in cases} | {"skg/toxigen-data"} == PUBLISHED.keys()


def test_a_source_with_columns_is_not_read_as_a_published_set(hub: Callable[..., list[Source]]) -> None:
    source = parse_source(
        "{path: hf://walledai/AdvBench, split: test, columns: {prompt: goal}, constants: {harmful: false}}"
    )
    ((same, parse),) = as_published(source)
    assert same == source
    assert parse({"x": 1}) == {"x": 1}


def test_a_set_with_a_split_for_each_label_is_read_whole(hub: Callable[..., list[Source]]) -> None:
    asked = hub([{"Goal": "p", "Behavior": "b", "Category": "c"}])
    prompts = read_prompts([parse_source("hf://JailbreakBench/JBB-Behaviors")], both=True)
    assert [prompt.harmful for prompt in prompts] == [True, False]
    assert [source.split for source in asked] == ["harmful", "benign"]
    with pytest.raises(UserError, match=r"unknown split train \(known: harmful, benign\)"):
        read_prompts([parse_source("{path: hf://JailbreakBench/JBB-Behaviors, split: train}")], both=False)


def test_prompts_without_a_label_are_left_out_and_counted(
    hub: Callable[..., list[Source]], caplog: pytest.LogCaptureFixture
) -> None:
    hub([{"prompt": "p", "prompt_harm_label": label, "adversarial": False} for label in ("harmful", None, None)])
    assert len(read_prompts([parse_source("hf://allenai/wildguardmix")], both=False)) == 1
    assert "2 prompts have no label" in caplog.text


FILES = {
    "harmbench_behaviors_text_all.csv": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Do it,standard,illegal,,,do_it\n"
        'Do it,contextual,harmful,context,"A text,\nwith lines",do_it_2\n'
        "Write it,copyright,copyright,book,,write_it\n",
        [
            ("Do it", True, "harmful", "illegal"),
            ("A text,\nwith lines\n\n---\n\nDo it", True, "contextual", "harmful"),
            ("Write it", True, "copyright", "copyright"),
        ],
    ),
    "strongreject_dataset.csv": (
        "category,source,forbidden_prompt\nViolence,custom,Do it\n",
        [("Do it", True, "harmful", "Violence")],
    ),
    "question.jsonl": (
        '{"question_id": 1, "category": "1", "turns": ["Do it"], "prompt_style": "base"}\n',
        [("Do it", True, "harmful", "1")],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_their_authors_publish_them(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_text(content)
    assert shown(read_prompts([Source(path=str(tmp_path / name))], both=False)) == expected


def test_a_behavior_is_kept_apart_from_its_context(tmp_path: Path) -> None:
    path = tmp_path / "harmbench.csv"
    path.write_text(FILES["harmbench_behaviors_text_all.csv"][0])
    parts = [(prompt.behavior, prompt.context) for prompt in read_prompts([Source(path=str(path))], both=False)]
    assert parts == [(None, None), ("Do it", "A text,\nwith lines"), (None, None)]
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "p", "harmful": true, "context": "a column of the user\'s own"}\n')
    (prompt,) = read_prompts([Source(path=str(path))], both=False)
    assert (prompt.behavior, prompt.context) == (None, None)


@pytest.mark.parametrize("harmful", [True, False])
def test_a_file_of_twins_has_the_label_of_its_option(harmful: bool, tmp_path: Path) -> None:
    path = tmp_path / "behaviors.csv"
    path.write_text("Index,Goal,Target,Behavior,Category,Source\n0,Do it,Sure,doing,Fraud,Original\n")
    source = Source(path=str(path))
    assert shown(read_prompts([with_label(source, harmful)], both=False)) == [
        ("Do it", harmful, "harmful" if harmful else "alarming", "Fraud")
    ]
    with pytest.raises(UserError, match="--harmful or --harmless"):
        read_prompts([source], both=False)


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
