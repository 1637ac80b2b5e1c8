"""``raydiv data build``: rows of each kind, determinism, counts, and no text in reports or messages."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.stored import indices_of, opened, recipe_of
from raydiv.commands.data_build import build_data
from raydiv.commands.data_build.card import COUNT_LABELS, BuildReport
from raydiv.commands.data_build.options import as_option
from raydiv.commands.data_build.responses import CONSTANT_REFUSAL, DECLINE_INSTRUCTION
from raydiv.config import parse_source
from raydiv.config.cluster import ClusterConfig
from raydiv.config.source import Source
from raydiv.data.bundled import bundled_file
from raydiv.data.prompt_sets import Prompt
from raydiv.data.readers import read_examples
from raydiv.data.splits import make_splits
from raydiv.evaluation.coherence import is_degenerate
from raydiv.evaluation.generate import Request
from raydiv.evaluation.refusal import is_refusal
from raydiv.model.chat import Chat, as_messages
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError

Row = dict[str, Any]
Build = Callable[..., BuildReport]

PLANTED = "PLANTED-TEXT"
CR, PREFERENCE = "compliance-refusal", "preference"

HARMFUL = [
    {"prompt": f"bad {n} {PLANTED}", "chosen": f"never {n}", "rejected": f"sure {n} {PLANTED}"} for n in range(12)
]
HARMLESS = [
    {"prompt": f"good {n} {PLANTED}", "chosen": f"answer {n} {PLANTED}", "rejected": f"worse {n}"} for n in range(12)
]


@pytest.fixture
def sources(tmp_path: Path) -> Callable[..., tuple[Source, Source]]:
    """Writes the two sources, with HARMFUL and HARMLESS as default rows."""

    def write(harmful: Sequence[object] = HARMFUL, harmless: Sequence[object] = HARMLESS) -> tuple[Source, Source]:
        for name, rows in (("harmful", harmful), ("harmless", harmless)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=f"{tmp_path}/harmful.jsonl"), Source(path=f"{tmp_path}/harmless.jsonl")

    return write


@pytest.fixture
def build(tmp_path: Path, sources: Callable[..., tuple[Source, Source]]) -> Build:
    """Builds in a new folder, with HARMFUL and HARMLESS as default rows."""
    outputs = iter(range(100))

    def run(
        harmful: Sequence[object] = HARMFUL, harmless: Sequence[object] = HARMLESS, kind: Any = CR, **options: Any
    ) -> BuildReport:
        output = tmp_path / f"out-{next(outputs)}"
        return build_data(
            *sources(harmful, harmless), output, kind=kind, display=ProgressDisplay(quiet=True), **options
        )

    return run


def rows_of(report: BuildReport) -> list[Row]:
    return [json.loads(line) for line in report.data.read_text().splitlines()]


def by_prompt(report: BuildReport) -> dict[str, Row]:
    return {json.dumps(row["prompt"]): {key: row[key] for key in row if key != "source"} for row in rows_of(report)}


def bank() -> list[str]:
    return [json.loads(line)["refusal"] for line in bundled_file("bundled:refusals").read_text().splitlines()]


# --- rows


def test_compliance_refusal_rows(build: Build, tmp_path: Path) -> None:
    report = build()
    rows = rows_of(report)
    assert len(rows) == len(HARMFUL) + len(HARMLESS)
    assert all(set(row) == {"prompt", "chosen", "rejected", "harmful", "source"} for row in rows)
    for row in rows:
        source, line = ("harmful", HARMFUL) if row["harmful"] else ("harmless", HARMLESS)
        number = int(row["prompt"].split()[1])
        assert row["source"] == f"{tmp_path}/{source}.jsonl:{number + 1}"
        assert row["prompt"] == line[number]["prompt"]
        refusal, other = ("chosen", "rejected") if row["harmful"] else ("rejected", "chosen")
        assert row[refusal] in bank()
        assert row[other] == line[number][other]


def test_preference_differs_in_harmless_rejections_alone(build: Build) -> None:
    refusing, preferring = by_prompt(build()), by_prompt(build(kind=PREFERENCE))
    assert list(refusing) == list(preferring)
    for prompt, row in refusing.items():
        assert row | {"rejected": ""} == preferring[prompt] | {"rejected": ""}
        assert (row["rejected"] == preferring[prompt]["rejected"]) == row["harmful"]
        if not row["harmful"]:
            assert preferring[prompt]["rejected"] == HARMLESS[int(row["prompt"].split()[1])]["rejected"]


def test_raydiv_reads_the_data(build: Build) -> None:
    examples = read_examples(Source(path=str(build().data)))
    assert len(examples) == 2 * len({example.pair for example in examples}) == 48
    assert Counter((example.harmful, example.aligned) for example in examples) == {
        (harmful, aligned): 12 for harmful in (True, False) for aligned in (True, False)
    }


def test_datasets_reads_the_data(build: Build) -> None:
    import datasets

    data = datasets.Dataset.from_json(str(build().data))
    assert set(data.column_names) == {"prompt", "chosen", "rejected", "harmful", "source"}
    assert len(data) == 24


def asked(words: str) -> list[Row]:
    return [{"role": "user", "content": words}]


def said(words: str) -> list[Row]:
    return [{"role": "assistant", "content": words}]


# "good" with an answer and "bad" with a compliance, in every format
HARMFUL_FORMATS: dict[str, list[Row]] = {
    "prompt and response": [{"prompt": "bad", "response": "sure"}],
    "prompt and response, labelled": [{"prompt": "bad", "response": "sure", "harmful": True}],
    "Alpaca": [{"instruction": "bad", "input": "", "output": "sure"}],
    "TRL": [{"prompt": "bad", "chosen": "no", "rejected": "sure"}],
    "TRL, conversational": [{"prompt": asked("bad"), "chosen": said("no"), "rejected": said("sure")}],
    "TRL, implicit": [{"chosen": asked("bad") + said("no"), "rejected": asked("bad") + said("sure")}],
    "own": [{"prompt": "bad", "response": "sure", "aligned": False, "harmful": True}],
    "own, two rows": [
        {"prompt": "bad", "response": "no", "aligned": True},
        {"prompt": "bad", "response": "sure", "aligned": False},
    ],
    "unpaired": [{"prompt": "bad", "completion": "sure", "label": False}],
    "KLDO authors": [{"safety": "unsafe", "prompt": "bad", "acc_responses": ["no"], "rej_responses": ["sure"]}],
}
HARMLESS_FORMATS: dict[str, list[Row]] = {
    "prompt and response": [{"prompt": "good", "response": "answer"}],
    "Alpaca": [{"instruction": "good", "input": "", "output": "answer"}],
    "Alpaca without input": [{"instruction": "good", "output": "answer"}],
    "Alpaca, no input": [{"instruction": "good", "input": None, "output": "answer", "text": "all of it"}],
    "TRL": [{"prompt": "good", "chosen": "answer", "rejected": "worse"}],
    "own": [{"prompt": "good", "response": "answer", "aligned": True, "harmful": False}],
    "unpaired": [{"prompt": "good", "completion": "answer", "label": True}],
    "KLDO authors": [{"safety": "safe", "prompt": "good", "acc_responses": ["answer"], "rej_responses": []}],
}


@pytest.mark.parametrize("name", HARMFUL_FORMATS)
def test_harmful_source_in_every_format(name: str, build: Build) -> None:
    [row] = [row for row in rows_of(build(HARMFUL_FORMATS[name], refusals="constant")) if row["harmful"]]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("bad", CONSTANT_REFUSAL, "sure")


@pytest.mark.parametrize("name", HARMLESS_FORMATS)
def test_harmless_source_in_every_format(name: str, build: Build) -> None:
    report = build(harmless=HARMLESS_FORMATS[name], refusals="constant")
    [row] = [row for row in rows_of(report) if not row["harmful"]]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("good", "answer", CONSTANT_REFUSAL)
    assert report.classes["harmless"].duplicates == 0


def test_alpaca_input_follows_the_instruction(build: Build) -> None:
    rows = rows_of(build(harmless=[{"instruction": "Count.", "input": "1 2", "output": "two"}]))
    assert [row["prompt"] for row in rows if not row["harmful"]] == ["Count.\n\n1 2"]


def test_columns_and_constants_of_a_source(tmp_path: Path, sources: Callable[..., tuple[Source, Source]]) -> None:
    harmful, harmless = sources([{"q": "bad", "a": "sure", "lang": "en"}])
    harmful = Source(path=harmful.path, columns={"prompt": "q", "completion": "a"}, constants={"label": False})
    rows = rows_of(build_data(harmful, harmless, tmp_path / "out", kind=CR))
    assert [(row["prompt"], row["rejected"]) for row in rows if row["harmful"]] == [("bad", "sure")]


def test_csv_source(tmp_path: Path, sources: Callable[..., tuple[Source, Source]]) -> None:
    _, harmless = sources()
    (tmp_path / "bad.csv").write_text("prompt,response\nbad,sure\n")
    rows = rows_of(build_data(Source(path=f"{tmp_path}/bad.csv"), harmless, tmp_path / "out", kind=CR))
    assert [row["source"] for row in rows if row["harmful"]] == [f"{tmp_path}/bad.csv:1"]


def test_conversations_make_all_rows_conversations(build: Build) -> None:
    talk = [*asked("hello"), *said("hi"), *asked("and now?")]
    rows = rows_of(build(harmless=[{"prompt": talk, "response": "answer"}], refusals="constant"))
    assert all(isinstance(row[side], list) for row in rows for side in ("prompt", "chosen", "rejected"))
    [row] = [row for row in rows if not row["harmful"]]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (talk, said("answer"), said(CONSTANT_REFUSAL))
    assert rows_of(build(harmless=[{"prompt": asked("hi"), "response": "answer"}]))[0]["prompt"].startswith(
        ("bad", "hi")
    )


# --- answers that have begun wrongly


def begun_rows(report: BuildReport) -> list[Row]:
    """The rows whose prompt ends in an assistant message, with its text as ``beginning``."""
    rows = [row for row in rows_of(report) if row["prompt"][-1]["role"] == "assistant"]
    return [row | {"beginning": row["prompt"][-1]["content"], "prompt": row["prompt"][0]["content"]} for row in rows]


@pytest.mark.parametrize("kind", [CR, PREFERENCE])
def test_recovery_begins_with_the_wrong_answer_and_goes_on_with_the_right_one(kind: str, build: Build) -> None:
    plain, report = by_prompt(build(kind=kind)), build(kind=kind, recovery=2)
    rows, begun = rows_of(report), begun_rows(report)
    assert len(rows) == len(plain) + len(begun)
    assert Counter(row["harmful"] for row in begun) == {True: 12, False: 12}
    assert [counts["recovery_rows"] for counts in report.as_json()["classes"].values()] == [12, 12]
    for row in begun:
        (chosen,), (rejected,), whole = row["chosen"], row["rejected"], plain[json.dumps(row["prompt"])]
        assert chosen["content"] == f" {whole['chosen']}"
        assert 1 <= len(row["beginning"].split()) <= 2
        wrong = row["beginning"] + rejected["content"]
        if kind == PREFERENCE and not row["harmful"]:
            assert wrong in bank()
        else:
            assert wrong == whole["rejected"]
    # the other rows are those of a build without recovery, as conversations
    others = [row for row in rows if row["prompt"][-1]["role"] == "user"]
    assert [json.dumps(row["prompt"][0]["content"]) for row in others] == list(plain)


def test_the_length_of_a_beginning_is_uniform_up_to_the_limit_and_the_last_word(build: Build) -> None:
    harmful = [{"prompt": f"bad {n}", "response": "word " * 39 + "end"} for n in range(600)]
    for limit, largest in ((5, 5), (100, 39)):
        report = build(harmful, refusals="constant", recovery=limit)
        lengths = [len(row["beginning"].split()) for row in begun_rows(report) if row["harmful"]]
        assert (min(lengths), max(lengths)) == (1, largest)
        assert sum(lengths) / 600 == pytest.approx((1 + largest) / 2, rel=0.08)


def test_an_answer_of_one_word_and_a_prompt_with_a_beginning_have_no_recovery(build: Build) -> None:
    begun = [{"prompt": [*asked("bad"), *said("well")], "response": "sure thing"}]
    report = build([*begun, {"prompt": "worse", "response": "sure"}], refusals="constant", recovery=9)
    counts = report.as_json()["classes"]["harmful"]
    assert (counts["rows"], counts["recovery_rows"]) == (2, 0)


def test_a_prompt_is_held_out_with_its_beginnings(build: Build, tiny_model: Path) -> None:
    recipe = recipe_of(tiny_model, str(build(recovery=2).data), eval=0.25)
    chat = Chat(tiny_model)
    indices = indices_of(opened(recipe, chat)[0], recipe, chat)
    splits = make_splits(recipe, indices, [])
    assert splits.eval is not None
    assert (splits.train.counts.examples, splits.eval.counts.examples) == (72, 24)
    assert splits.train.counts.pairs == 36
    begun = [example for example in read_examples(recipe.data.train[0]) if len(as_messages(example.prompt)) > 1]
    ids = chat.prompt_ids(begun[0].prompt)
    beginning = str(as_messages(begun[0].prompt)[-1]["content"])
    assert ids == [*chat.prompt_ids(as_messages(begun[0].prompt)[:-1]), *chat.text_ids(beginning)]


# --- determinism


def test_same_inputs_same_bytes(build: Build) -> None:
    first, again, other = build(prompts=5), build(prompts=5), build(prompts=5, seed=1)
    assert first.data.read_bytes() == again.data.read_bytes()
    assert first.card.read_bytes() == again.card.read_bytes()
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert by_prompt(first).keys() != by_prompt(other).keys()


@pytest.mark.parametrize("kind", [CR, PREFERENCE])
@pytest.mark.parametrize("refusals", ["bank", "own"])
def test_order_of_source_rows_does_not_matter(kind: str, refusals: str, build: Build) -> None:
    shuffled = [random.Random(0).sample(rows, len(rows)) for rows in (HARMFUL, HARMLESS)]
    first, again = (by_prompt(build(*rows, kind=kind, refusals=refusals, prompts=7)) for rows in ([], shuffled))
    assert list(first.items()) == list(again.items())


def test_refusals_depend_on_seed_and_prompt_alone(build: Build) -> None:
    whole = by_prompt(build())
    part = by_prompt(build(HARMFUL[3:5], HARMLESS[7:]))
    assert len(part) == 7
    assert all(whole[prompt] == row for prompt, row in part.items())
    other = by_prompt(build(seed=1))
    assert sum(whole[prompt]["chosen"] != other[prompt]["chosen"] for prompt in whole) > 6


def test_refusals_vary(build: Build) -> None:
    refusals = [
        row["chosen"] for row in rows_of(build([{"prompt": f"bad {n}", "response": "sure"} for n in range(200)]))
    ]
    assert len(set(refusals)) > 60


def test_classes_are_mixed_with_unequal_sources(build: Build) -> None:
    many = [{"prompt": f"good {n}", "response": "answer"} for n in range(400)]
    labels = [row["harmful"] for row in rows_of(build(harmless=many, prompts=12))]
    assert sum(label != following for label, following in pairwise(labels)) >= 6
    places = [place for place, harmful in enumerate(labels) if harmful]
    assert 6 <= sum(places) / len(places) <= 17


# --- counts


def test_number_of_prompts_of_each_class(build: Build) -> None:
    report = build(harmless=[*HARMLESS, {"prompt": "one more", "response": "answer"}], prompts=5)
    assert Counter(row["harmful"] for row in rows_of(report)) == {True: 5, False: 5}
    assert [counts.not_chosen for counts in report.classes.values()] == [7, 8]
    with pytest.raises(UserError, match=r"^prompts: 13 .*harmful.jsonl has 12"):
        build(prompts=13)


def test_fewer_prompts_are_a_subset_of_more(build: Build) -> None:
    assert by_prompt(build(prompts=3)).items() < by_prompt(build(prompts=9)).items()


def test_duplicate_prompts_are_counted_and_the_first_is_used(build: Build) -> None:
    again = [
        {"prompt": f"bad 3 {PLANTED}", "chosen": "no", "rejected": "later"},
        {"prompt": asked(f" bad 3 {PLANTED}\n"), "response": "latest"},
    ]
    report = build([*HARMFUL, *again])
    assert report.classes["harmful"].duplicates == 2
    assert report.classes["harmful"].prompts == report.classes["harmful"].rows == 12
    assert by_prompt(report) == by_prompt(build())


def test_further_responses_are_counted(build: Build) -> None:
    authors = {
        "safety": "unsafe",
        "prompt": "bad",
        "acc_responses": ["no"],
        "rej_responses": ["first", "second", "third"],
    }
    report = build([authors])
    assert [row["rejected"] for row in rows_of(report) if row["harmful"]] == ["first"]
    assert (report.classes["harmful"].duplicates, report.classes["harmful"].further_responses) == (0, 2)


def test_prompts_with_equal_responses_are_left_out(build: Build) -> None:
    report = build(harmless=[*HARMLESS, {"prompt": "good", "chosen": "so", "rejected": " so\n"}], kind=PREFERENCE)
    assert (report.classes["harmless"].same_responses, report.classes["harmless"].rows) == (1, 12)
    with pytest.raises(UserError, match=r"harmless.jsonl: no harmless prompt is left: 1 .*, 0 "):
        build(harmless=[{"prompt": "good", "chosen": "so", "rejected": "so"}], kind=PREFERENCE)


# --- errors


@pytest.fixture
def refuse(build: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The UserError of a build: one line, nothing written, and no text of the sources shown."""

    def run(*arguments: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            build(*arguments, **options)
        message = str(caught.value)
        printed = capfd.readouterr()
        assert PLANTED not in message + printed.out + printed.err
        assert "\n" not in message
        assert not list(tmp_path.glob("out-*"))
        return message

    return run


def test_prompts_in_both_sources(refuse: Callable[..., str]) -> None:
    shared = [{"prompt": asked(HARMFUL[n]["prompt"]), "response": "fine"} for n in (4, 2)]
    message = refuse(harmless=[*HARMLESS, *shared])
    assert " 2 prompts " in message
    assert re.search(r"harmful\.jsonl:3 and .*harmless\.jsonl:14", message)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "", "response": PLANTED}, "prompt must be non-empty"),
        ({"prompt": PLANTED, "response": None}, "response must be non-empty"),
        ({"instruction": PLANTED, "input": 3, "output": PLANTED}, "input must be non-empty text"),
        ({"instruction": PLANTED, "input": "", "output": " "}, "response must be non-empty"),
        ({"instruction": "", "input": PLANTED, "output": PLANTED}, "instruction must be non-empty"),
        (
            {"question": PLANTED, "answer": PLANTED},
            "unknown format: columns answer, question .*prompt, response, or instruction, input, output",
        ),
        ({"prompt": PLANTED, "response": PLANTED, "aligned": "yes"}, "aligned must be true or false"),
        ([PLANTED], "a record is a mapping"),
    ],
    ids=str,
)
@pytest.mark.parametrize("harmful", [True, False])
def test_bad_records_are_named(bad: Any, reason: str, harmful: bool, refuse: Callable[..., str]) -> None:
    rows = [*(HARMFUL if harmful else HARMLESS)[:2], bad]
    message = refuse(rows) if harmful else refuse(harmless=rows)
    assert re.search(rf"{'harmful' if harmful else 'harmless'}\.jsonl:3: .*{reason}", message)


def test_lines_that_are_not_json_are_named(tmp_path: Path, sources: Callable[..., tuple[Source, Source]]) -> None:
    harmful, harmless = sources()
    with Path(harmful.path).open("a") as lines:
        lines.write(f"{{{PLANTED}\n")
    with pytest.raises(UserError, match=r"harmful\.jsonl:13: not JSON") as caught:
        build_data(harmful, harmless, tmp_path / "out", kind=CR)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    ("harmful", "harmless", "options", "message"),
    [
        (
            [HARMFUL[0], {"prompt": PLANTED, "completion": "no", "label": True}],
            HARMLESS,
            {},
            "harmful.*:2: no compliant",
        ),
        (HARMFUL, [{"prompt": PLANTED, "completion": "no", "label": False}], {}, "harmless.*:1: no good answer"),
        ([{"prompt": PLANTED, "response": "sure"}], HARMLESS, {"refusals": "own"}, "harmful.*:1: no refusal"),
        (HARMFUL, [{"prompt": PLANTED, "response": "so"}], {"kind": PREFERENCE}, "harmless.*:1: no worse answer"),
    ],
    ids=["compliance", "good answer", "refusal", "worse answer"],
)
def test_missing_responses(
    harmful: list[Row], harmless: list[Row], options: Row, message: str, refuse: Callable[..., str]
) -> None:
    error = refuse(harmful, harmless, **options)
    assert re.search(message, error)
    assert re.search(r"1 of \d+ harm(ful|less) prompts", error)


@pytest.mark.parametrize("harmful", [True, False])
def test_swapped_sources(harmful: bool, refuse: Callable[..., str]) -> None:
    wrong = [{"prompt": PLANTED, "response": "so", "harmful": not harmful}]
    message = refuse(wrong) if harmful else refuse(harmless=wrong)
    assert f":1: is labelled {'harmless' if harmful else 'harmful'}" in message


@pytest.mark.parametrize("harmful", [True, False])
def test_empty_sources(harmful: bool, refuse: Callable[..., str]) -> None:
    assert "holds no prompts" in (refuse([]) if harmful else refuse(harmless=[]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cr"}, "^kind: .*'cr' .*compliance-refusal, preference"),
        ({"worse": "own"}, "^worse: .* compliance-refusal"),
        ({"worse": "model:x"}, "^worse: .* compliance-refusal"),
        ({"worse": "mine", "kind": PREFERENCE}, "^worse: .*'mine' .*own, model:ID"),
        ({"prompts": 0}, "prompts: must be at least 1, found 0"),
        ({"template": "{{ x }}"}, "^template: .*refusals or worse: model:ID"),
        ({"max_new_tokens": 9}, "^max_new_tokens: .*refusals or worse: model:ID"),
        ({"max_new_tokens": 0, "refusals": "model:x"}, "max_new_tokens: must be at least 1"),
        ({"refusals": "bnak"}, "^refusals: bnak: .*known: bank, constant, own, model:ID"),
        ({"refusals": "model:gone/away"}, "gone/away"),
        ({"refusals": "bundled:bank"}, "bundled:bank: unknown .*refusals"),
    ],
    ids=str,
)
def test_invalid_options(
    options: Row, message: str, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.search(message, refuse(**options))


def test_weights_are_refused(tmp_path: Path, sources: Callable[..., tuple[Source, Source]]) -> None:
    harmful, harmless = sources()
    with pytest.raises(UserError, match=r"harmless\.jsonl: weight "):
        build_data(harmful, Source(path=harmless.path, weight=2), tmp_path / "out", kind=CR)


def test_output_must_be_empty(tmp_path: Path, sources: Callable[..., tuple[Source, Source]]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert build_data(*sources(), output, kind=CR).data == output / "data.jsonl"
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "data.jsonl"]
    before = (output / "data.jsonl").read_bytes()
    for path in (output, output / "README.md"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            build_data(*sources(), path, kind=CR, seed=1)
    assert (output / "data.jsonl").read_bytes() == before


# --- refusals


def test_constant_refusal(build: Build) -> None:
    rows = rows_of(build(refusals="constant"))
    assert {row["chosen" if row["harmful"] else "rejected"] for row in rows} == {CONSTANT_REFUSAL}
    assert is_refusal(CONSTANT_REFUSAL)


def test_own_refusals_for_harmful_prompts_and_the_bank_for_harmless_ones(build: Build) -> None:
    for row in rows_of(build(refusals="own")):
        if row["harmful"]:
            assert row["chosen"] == f"never {row['prompt'].split()[1]}"
        else:
            assert row["rejected"] in bank()


def test_refusals_of_a_source(build: Build, write_jsonl: Callable[..., Path]) -> None:
    refusals = write_jsonl({"refusal": "not today"}, {"refusal": "nor tomorrow"}, name="refusals.jsonl")
    report = build(refusals=str(refusals))
    rows = rows_of(report)
    assert {row["chosen" if row["harmful"] else "rejected"] for row in rows} == {"not today", "nor tomorrow"}
    assert f"one of 2 (`{refusals}`)" in report.card.read_text()


def test_bad_sources_of_refusals(refuse: Callable[..., str], write_jsonl: Callable[..., Path]) -> None:
    wrong = write_jsonl({"refusal": "no"}, {"text": PLANTED}, name="wrong.jsonl")
    assert f"refusals: {wrong}:2: refusal must be non-empty text" in refuse(refusals=str(wrong))
    empty = write_jsonl(name="empty.jsonl")
    assert refuse(refusals=str(empty)).startswith(f"refusals: {empty}: ")


def openings(words: int) -> Counter[str]:
    return Counter(" ".join(re.findall(r"[\w']+", line.lower())[:words]) for line in bank())


def test_bank_is_varied() -> None:
    lines = bank()
    assert len(lines) >= 60
    assert len({" ".join(re.findall(r"\w+", line.lower())) for line in lines}) == len(lines)
    assert all(line == line.strip() and line[-1] in ".?!" for line in lines)
    assert len(openings(2)) >= 0.6 * len(lines)
    assert openings(2).most_common(1)[0][1] <= 0.1 * len(lines)
    assert len(openings(3)) >= 0.8 * len(lines)


def test_bank_has_all_lengths() -> None:
    lengths = [len(line.split()) for line in bank()]
    sentences = Counter(len(re.findall(r"[.?!](?:\s|$)", line)) for line in bank())
    assert set(sentences) == {1, 2, 3}
    assert sentences[2] >= 10
    assert sum(length <= 5 for length in lengths) >= 8
    assert sum(length >= 20 for length in lengths) >= 8


def test_string_judge_finds_most_of_the_bank() -> None:
    # the rest are refusals that the rules do not recognise, so that no model learns the rules alone
    share = sum(map(is_refusal, bank())) / len(bank())
    assert 0.7 <= share <= 0.9
    assert not any(map(is_degenerate, bank()))


# --- the card


def test_card_quotes_no_text(build: Build) -> None:
    for options in ({}, {"kind": PREFERENCE}, {"refusals": "own"}, {"refusals": "constant"}):
        report = build(**options)  # type: ignore[arg-type]
        card, as_json = report.card.read_text(), json.dumps(report.as_json())
        for text in (PLANTED, CONSTANT_REFUSAL, *bank(), *(row["rejected"] for row in HARMLESS)):
            assert text not in card
            assert text not in as_json


def test_card_names_sources_and_counts(build: Build, tmp_path: Path) -> None:
    report = build([*HARMFUL, HARMFUL[0]], prompts=10, seed=7)
    card = report.card.read_text()
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "other"
    assert metadata["configs"][0]["data_files"] == "data.jsonl"
    for name in ("harmful", "harmless"):
        path = tmp_path / f"{name}.jsonl"
        assert f"`{path}` | `{sha256(path.read_bytes()).hexdigest()}`" in body
    assert sha256(report.data.read_bytes()).hexdigest() == report.fingerprint
    for text in (report.fingerprint, "seed 7", "raydiv 0.", "data: {train: OUTPUT/data.jsonl}", "one of 85"):
        assert text in body
    assert f"| {COUNT_LABELS['rows']} | 10 | 10 |" in body
    assert f"| {COUNT_LABELS['duplicates']} | 1 | 0 |" in body
    assert "| harmful rejected | 3 | 3 | 0% |" in body
    assert "Known limits" in body


def test_lengths_by_class_and_side(build: Build) -> None:
    harmless = [{"prompt": f"good {n}", "response": "word " * n} for n in range(1, 12)]
    side = build(harmless=harmless).sides["harmless chosen"]
    assert (side.median_words, side.p90_words) == (6, 10)


def test_report_is_json(build: Build) -> None:
    report = build()
    content = json.loads(json.dumps(report.as_json()))
    assert content["data"] == str(report.data)
    assert content["classes"]["harmful"]["rows"] == 12
    assert set(content["sides"]) == {"harmful chosen", "harmful rejected", "harmless chosen", "harmless rejected"}


def test_command_on_the_card_repeats_the_build(build: Build, tmp_path: Path) -> None:
    report = build(kind=PREFERENCE, prompts=6, recovery=4, seed=3, refusals="constant")
    words = shlex.split(next(line for line in report.card.read_text().splitlines() if line.startswith("raydiv data")))
    assert words[:3] == ["raydiv", "data", "build"]
    options = dict(zip((word.removeprefix("--") for word in words[3::2]), words[4::2], strict=True))
    again = build_data(
        parse_source(options["harmful"]),
        parse_source(options["harmless"]),
        tmp_path / "again",
        kind=options["kind"],  # type: ignore[arg-type]
        refusals=options["refusals"],
        worse=options["worse"],
        prompts=int(options["prompts"]),
        recovery=int(options["recovery"]),
        seed=int(options["seed"]),
    )
    assert again.fingerprint == report.fingerprint
    assert set(options) == {
        "harmful", "harmless", "kind", "refusals", "worse", "prompts", "recovery", "seed", "output"
    }  # fmt: skip


@pytest.mark.parametrize(
    "section",
    [
        {"path": "a b.jsonl"},
        {"path": "hf://org/name", "split": "test", "config": "en", "revision": "main"},
        {"path": "x.csv", "columns": {"prompt": "a question"}, "constants": {"label": True}},
    ],
    ids=str,
)
def test_source_as_a_command_line_option(section: Row) -> None:
    assert parse_source(as_option(Source(**section))) == Source(**section)
    assert parse_source("{path: x.csv, columns: {prompt: q}}") == Source(path="x.csv", columns={"prompt": "q"})


@pytest.mark.parametrize("words", ["{path: [", "{pth: x}", "{path: x, revision: main}", "{path: x, weight: -1}"])
def test_invalid_source_option(words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        parse_source(words)
    assert "\n" not in str(caught.value)


def test_a_build_without_model_does_not_load_torch(build: Build, tmp_path: Path) -> None:
    build()
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from raydiv.config import parse_source\nfrom raydiv.commands.data_build import build_data\n"
        f"build_data(parse_source('{tmp_path}/harmful.jsonl'), parse_source('{tmp_path}/harmless.jsonl'), "
        f"Path('{tmp_path}/new'), kind='compliance-refusal')\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


# --- models


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Callable[..., list[tuple[list[Prompt], int]]]:
    """Replaces a model's generation by a function of the prompt; returns the calls."""
    from raydiv.evaluation import generate
    from raydiv.evaluation.generate import GeneratedAnswer

    @contextlib.contextmanager
    def session(cluster: ClusterConfig) -> Iterator[None]:
        yield

    def patch(answer: Callable[[Prompt], str], tokens: int = 3) -> list[tuple[list[Prompt], int]]:
        calls: list[tuple[list[Request], int]] = []

        def fake(model: Any, prompts: list[Request], limit: int, cluster: Any, update: Any) -> list[GeneratedAnswer]:
            calls.append((prompts, limit))
            return [GeneratedAnswer(answer(prompt), [1], [1] * tokens) for prompt in prompts]

        monkeypatch.setattr(generate, "generate", fake)
        monkeypatch.setattr("raydiv.commands.data_build.responses.ray_session", session)
        return calls

    return patch


def test_a_models_refusals(build: Build, answering: Callable[..., Any], tiny_model: Path) -> None:
    def refuse_even_ones(prompt: Request) -> str:
        number = int(str(prompt.prompt[-1]["content"]).split()[1])  # type: ignore[index]
        return f" I can't help with number {number}.\n" if number % 2 == 0 else "Sure, here it is."

    calls = answering(refuse_even_ones)
    report = build(refusals=f"model:{tiny_model}")
    [(prompts, limit)] = calls
    assert (len(prompts), limit) == (24, 256)
    user_turn = prompts[0].prompt[1]["content"]  # type: ignore[index]
    assert prompts[0].prompt == [{"role": "system", "content": DECLINE_INSTRUCTION}, *asked(str(user_turn))]
    for row in rows_of(report):
        number = int(row["prompt"].split()[1])
        refusal = row["chosen" if row["harmful"] else "rejected"]
        assert refusal == f"I can't help with number {number}." if number % 2 == 0 else refusal in bank()
    assert report.refusals_replaced == 12
    assert re.search(r"; 12 that .* were replaced by one of 85", report.card.read_text())


def test_only_harmful_prompts_are_refused_in_preference_data(
    build: Build, answering: Callable[..., Any], tiny_model: Path
) -> None:
    calls = answering(lambda prompt: "I won't.")
    build(kind=PREFERENCE, refusals=f"model:{tiny_model}")
    [(prompts, _)] = calls
    assert {str(prompt.prompt[-1]["content"]).split()[0] for prompt in prompts} == {"bad"}


def test_decline_instruction_is_appended_to_a_system_turn(
    build: Build, answering: Callable[..., Any], tiny_model: Path
) -> None:
    calls = answering(lambda prompt: "I won't.")
    talk = [{"role": "system", "content": "Be brief."}, *asked("good")]
    build(harmless=[{"prompt": talk, "response": "answer"}], refusals=f"model:{tiny_model}")
    [request] = [prompt.prompt for prompt in calls[0][0] if "good" in str(prompt.prompt)]
    assert request == [{"role": "system", "content": f"Be brief.\n\n{DECLINE_INSTRUCTION}"}, *asked("good")]


def test_a_models_worse_answers(build: Build, answering: Callable[..., Any], tiny_model: Path) -> None:
    answers = {0: f"answer 0  {PLANTED} ", 1: " \n", 2: "a\0b"}
    calls = answering(lambda prompt: answers.get(int(str(prompt.prompt).split()[1]), "hardly"), tokens=5)
    report = build(kind=PREFERENCE, worse=f"model:{tiny_model}", max_new_tokens=5)
    [(prompts, limit)] = calls
    assert (len(prompts), limit) == (12, 5)
    assert all(isinstance(prompt.prompt, str) and prompt.prompt.startswith("good") for prompt in prompts)
    assert {row["rejected"] for row in rows_of(report) if not row["harmful"]} == {"hardly"}
    harmless = report.classes["harmless"]
    assert (harmless.rows, harmless.same_responses, harmless.unusable_answers) == (9, 1, 2)
    assert report.answers_cut == 12
    card = report.card.read_text()
    assert f"| {COUNT_LABELS['same_responses']} | 0 | 1 |" in card
    assert "- 12 answers of models " in card
    assert PLANTED not in card


def test_a_bad_template_is_reported_before_sources_are_read(build: Build, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template"):
        build([], refusals=f"model:{tiny_model}", template="{% for")


@pytest.mark.slow
@pytest.mark.long
def test_degenerate_answers_of_a_real_model_are_replaced_and_counted(build: Build, tiny_model: Path) -> None:
    model = f"model:{tiny_model}"
    # an untrained model repeats the last token; with this template, that is a token of the turn
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    report = build(
        HARMFUL[:2], HARMLESS[:3], kind=PREFERENCE, refusals=model, worse=model, max_new_tokens=6, template=bare
    )
    rows = rows_of(report)
    assert len(rows) == 5
    assert report.refusals_replaced == 2
    assert report.answers_cut == 5
    assert all(row["chosen"] in bank() for row in rows if row["harmful"])
    assert all(row["rejected"] not in (*bank(), row["chosen"]) for row in rows if not row["harmful"])
    card = report.card.read_text()
    assert re.search(rf"answers of `{re.escape(model)}`, .* 6 tokens\); 2 that string rules", card)
    assert "a model's answer is worse than the source's" in card
