"""Sources of examples: every format from every kind of file, and messages about bad rows and files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydiv.config.source import KINDS, Source
from raydiv.data.formats import Example
from raydiv.data.prompt_sets import read_prompts
from raydiv.data.readers import READERS, file_chunks, read_chunk
from raydiv.data.readers import read_examples as read_source
from raydiv.data.sources import files_of
from raydiv.utils.errors import UserError

Row = dict[str, Any]
Writer = Callable[[Path, list[Row]], Path]

PLANTED = "PLANTED-TEXT"


def read_examples(path: str) -> list[Example]:
    return read_source(Source(path=path))


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


OWN = [
    {"prompt": "one", "response": "yes", "aligned": True, "harmful": False, "pair": "p", "source": "s"},
    {"prompt": "one", "response": "no", "aligned": False, "harmful": False, "pair": "p", "source": "s"},
]
PREFERENCE = [
    {"prompt": "one", "chosen": "yes", "rejected": "no", "harmful": True},
    {"prompt": "two", "chosen": "go", "rejected": "stop", "harmful": False},
]
UNPAIRED = [
    {"prompt": "one", "completion": "yes", "label": True},
    {"prompt": "two", "completion": "no", "label": False},
]
AUTHORS = [
    {"safety": "safe", "prompt": "one", "acc_responses": ["yes", "sure"], "rej_responses": ["no"]},
    {"safety": "unsafe", "prompt": "two", "acc_responses": ["never"], "rej_responses": ["first", "second", "third"]},
]
# (prompt, response, aligned, harmful)
FORMATS: dict[str, tuple[list[Row], list[tuple[Any, str, bool, bool | None]]]] = {
    "own": (OWN, [("one", "yes", True, False), ("one", "no", False, False)]),
    "own, conversational": (
        [
            {"prompt": asked("one"), "response": said("yes"), "aligned": True},
            {"prompt": CHAT, "response": said("no"), "aligned": False},
        ],
        [(asked("one"), "yes", True, None), (CHAT, "no", False, None)],
    ),
    "preference": (
        PREFERENCE,
        [
            ("one", "yes", True, True),
            ("one", "no", False, True),
            ("two", "go", True, False),
            ("two", "stop", False, False),
        ],
    ),
    "preference, conversational": (
        [{"prompt": CHAT, "chosen": said("go"), "rejected": said("stop")}],
        [(CHAT, "go", True, None), (CHAT, "stop", False, None)],
    ),
    "unpaired": (UNPAIRED, [("one", "yes", True, None), ("two", "no", False, None)]),
    "unpaired, conversational": (
        [{"prompt": CHAT, "completion": said("yes"), "label": True}],
        [(CHAT, "yes", True, None)],
    ),
    "KLDO authors": (
        AUTHORS,
        [
            ("one", "yes", True, False),
            ("one", "sure", True, False),
            ("one", "no", False, False),
            ("two", "never", True, True),
            ("two", "first", False, True),
            ("two", "second", False, True),
            ("two", "third", False, True),
        ],
    ),
    "KLDO authors, conversational": (
        [{"safety": "safe", "prompt": CHAT, "acc_responses": ["yes"], "rej_responses": ["no"]}],
        [(CHAT, "yes", True, False), (CHAT, "no", False, False)],
    ),
}


def as_jsonl(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_json(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows))
    return path


def as_csv(path: Path, rows: list[Row]) -> Path:
    import pandas

    path = path.with_suffix(".csv")
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


def as_parquet(path: Path, rows: list[Row]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_dataset(path: Path, rows: list[Row]) -> Path:
    import datasets

    path = path.with_suffix(".dataset")
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def as_split_dataset(path: Path, rows: list[Row]) -> Path:
    import datasets

    path = path.with_suffix(".splits")
    train = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": train.select([0]), "train": train}).save_to_disk(str(path))
    return path


WRITERS: list[Writer] = [as_jsonl, as_json, as_csv, as_parquet, as_dataset, as_split_dataset]
TEXT_ONLY = ("own", "preference", "unpaired")
"""Formats that a CSV file can hold, whose cells are no lists."""


@pytest.mark.parametrize(
    ("name", "write"),
    [(name, write) for name in FORMATS for write in WRITERS if write is not as_csv or name in TEXT_ONLY],
)
def test_every_format_from_every_file(name: str, write: Writer, tmp_path: Path) -> None:
    rows, expected = FORMATS[name]
    path = write(tmp_path / "data", rows)
    examples = read_examples(str(path))
    assert [(e.prompt, e.response, e.aligned, e.harmful) for e in examples] == expected
    assert all(e.source.startswith(str(path)) and e.source.rpartition(":")[2].isdigit() for e in examples)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "text", ["42", "007", "None", "null", "NA", "true", "1e5", "2024-01-01", " padded ", 'a "b", c\nd']
)
def test_text_is_read_unchanged(text: str, write: Writer, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": text, "label": True}] * 2
    examples = read_examples(str(write(tmp_path / "data", rows)))
    assert [(e.prompt, e.response) for e in examples] == [(text, text)] * 2


@pytest.mark.parametrize("write", WRITERS)
def test_missing_label_and_pair_are_none(write: Writer, tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "one", "response": "yes", "aligned": True, "harmful": True, "pair": "a"},
        {"prompt": "two", "response": "no", "aligned": False, "harmful": None, "pair": None},
    ]
    examples = read_examples(str(write(tmp_path / "data", rows)))
    assert [(e.harmful, e.pair) for e in examples] == [(True, "a"), (None, None)]


def test_blank_lines_keep_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(UNPAIRED[0]) + "\n\n" + json.dumps(UNPAIRED[1]))
    assert [e.source for e in read_examples(str(path))] == [f"{path}:2", f"{path}:4"]


def test_preference_rows_are_pairs(write_jsonl: Callable[..., Path]) -> None:
    pairs = [e.pair for e in read_examples(str(write_jsonl(*PREFERENCE)))]
    assert pairs[0] == pairs[1]
    assert pairs[2] == pairs[3]
    assert pairs[0] != pairs[2]
    assert None not in pairs


def test_unpaired_rows_have_no_pair(write_jsonl: Callable[..., Path]) -> None:
    assert [e.pair for e in read_examples(str(write_jsonl(*UNPAIRED)))] == [None, None]


def test_own_pair_may_be_a_number(write_jsonl: Callable[..., Path]) -> None:
    rows = [row | {"pair": 7} for row in OWN]
    assert [e.pair for e in read_examples(str(write_jsonl(*rows)))] == ["7", "7"]


@pytest.mark.parametrize(("accepted", "rejected"), [(1, 1), (3, 1), (1, 3), (2, 0), (0, 2)])
def test_unequal_response_counts_lose_no_response(
    accepted: int, rejected: int, write_jsonl: Callable[..., Path]
) -> None:
    row: Row = {
        "safety": "safe",
        "prompt": "one",
        "acc_responses": [f"a{n}" for n in range(accepted)],
        "rej_responses": [f"r{n}" for n in range(rejected)],
    }
    examples = read_examples(str(write_jsonl(row)))
    assert sorted(e.response for e in examples) == sorted(row["acc_responses"] + row["rej_responses"])
    paired: dict[str, set[bool]] = {}
    for e in examples:
        if e.pair is not None:
            paired.setdefault(e.pair, set()).add(e.aligned)
    assert list(paired.values()) == [{True, False}] * min(accepted, rejected)
    assert sum(e.pair is None for e in examples) == abs(accepted - rejected)


def test_row_without_any_response_is_a_bad_row(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(AUTHORS[0], AUTHORS[0] | {"acc_responses": [], "rej_responses": []})
    assert f"{path}:2" in refusal(path)


@pytest.mark.parametrize(
    ("safety", "harmful"),
    [("safe", False), ("unsafe", True), ("Safe", False), (1, False), (0, True), (True, False), (False, True)],
)
def test_authors_safety_becomes_harmful(safety: Any, harmful: bool, write_jsonl: Callable[..., Path]) -> None:
    examples = read_examples(str(write_jsonl(AUTHORS[0] | {"safety": safety})))
    assert {e.harmful for e in examples} == {harmful}


def refusal(path: Path | str) -> str:
    """The message of the UserError: one line, without the text of any row."""
    with pytest.raises(UserError) as caught:
        read_examples(str(path))
    message = str(caught.value)
    assert PLANTED not in message
    assert "\n" not in message
    return message


GOOD: dict[str, Row] = {
    "own": {"prompt": PLANTED, "response": PLANTED, "aligned": True},
    "preference": {"prompt": PLANTED, "chosen": PLANTED, "rejected": PLANTED},
    "unpaired": {"prompt": PLANTED, "completion": PLANTED, "label": True},
    "authors": {"safety": "safe", "prompt": PLANTED, "acc_responses": [PLANTED], "rej_responses": [PLANTED]},
}
WRONG: list[tuple[str, str, Any]] = [
    ("own", "prompt", None),
    ("own", "prompt", ""),
    ("own", "prompt", []),
    ("own", "prompt", {PLANTED: PLANTED}),
    ("own", "prompt", [{"role": "user"}]),
    ("own", "prompt", [{"role": "user", "content": None, "note": PLANTED}]),
    ("own", "prompt", [PLANTED]),
    ("own", "response", None),
    ("own", "response", "  \n "),
    ("own", "response", 3),
    ("own", "aligned", PLANTED),
    ("own", "aligned", 2),
    ("own", "aligned", None),
    ("own", "harmful", PLANTED),
    ("own", "harmful", -1),
    ("preference", "prompt", None),
    ("preference", "chosen", None),
    ("preference", "rejected", ""),
    ("preference", "chosen", asked(PLANTED)),
    ("preference", "chosen", [*asked(PLANTED), *said(PLANTED)]),
    ("preference", "rejected", []),
    ("preference", "harmful", "yes"),
    ("unpaired", "completion", ""),
    ("unpaired", "label", "chosen"),
    ("unpaired", "label", 0.5),
    ("unpaired", "label", None),
    ("authors", "safety", None),
    ("authors", "safety", PLANTED),
    ("authors", "prompt", " "),
    ("authors", "acc_responses", None),
    ("authors", "acc_responses", [PLANTED, ""]),
    ("authors", "rej_responses", [PLANTED, None]),
    ("authors", "rej_responses", ""),
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG)
def test_wrong_field_is_named_with_file_and_line(
    kind: str, field: str, value: Any, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(GOOD[kind], GOOD[kind], GOOD[kind] | {field: value})
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert field in message or "content" in message


@pytest.mark.parametrize("write", WRITERS)
def test_null_is_named_with_its_record_in_every_file(write: Writer, tmp_path: Path) -> None:
    rows: list[Row] = [GOOD["unpaired"], GOOD["unpaired"] | {"completion": None}]
    path = write(tmp_path / "data", rows)
    message = refusal(path)
    assert message.startswith(str(path))
    assert ":2: completion" in message


@pytest.mark.parametrize(
    "line", ['{"prompt": "' + PLANTED, PLANTED, f"[{json.dumps(PLANTED)}]", "3", json.dumps(PLANTED), "null"]
)
def test_line_that_is_not_a_json_object_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD["own"]) + "\n" + line + "\n")
    assert refusal(path).startswith(f"{path}:2: ")


def test_unknown_columns_are_listed_with_the_known_formats(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(GOOD["own"], {"question": PLANTED, "answer": PLANTED})
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    for column in ("answer", "question", "chosen", "completion", "acc_responses", "aligned"):
        assert column in message


def test_csv_without_a_header_does_not_show_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"{PLANTED} one,{PLANTED} two,True\na,b,False\n")
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", b"[[1, 2]]"),
        ("data.json", b'[{"prompt": "' + PLANTED.encode()),
        ("data.json", b"3"),
        ("data.csv", b""),
        ("data.csv", b"prompt,completion,label\n" + PLANTED.encode() + b",b,True,c,d\ne,f,True\n\xff"),
        ("data.parquet", PLANTED.encode()),
        ("data.jsonl", b'{"prompt": "caf\xe9", "completion": "b", "label": true}\n'),
        ("data.txt", PLANTED.encode()),
        ("data", PLANTED.encode()),
    ],
)
def test_unreadable_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("data.jsonl", "\n"), ("data.json", "[]"), ("data.csv", "prompt,label\n")]
)
def test_source_without_examples_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name) == f"{tmp_path / name}: holds no examples"


def test_missing_source_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.jsonl").startswith(f"{tmp_path / 'gone.jsonl'}: ")
    assert "compliance-refusal" in refusal("bundled:complience-refusal")


def test_directory_must_be_a_saved_dataset_with_a_train_split(tmp_path: Path) -> None:
    import datasets

    assert "save_to_disk" in refusal(tmp_path)
    datasets.DatasetDict({"test": datasets.Dataset.from_list(UNPAIRED)}).save_to_disk(str(tmp_path / "splits"))
    assert "test" in refusal(tmp_path / "splits")


def test_state_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"{tmp_path}/state.json: ")


def test_bundled_source_is_named_in_full() -> None:
    examples = read_examples("bundled:preference")
    assert examples[0].source == examples[1].source == "bundled:preference:1"


@pytest.mark.parametrize("write", WRITERS)
def test_prompt_set_from_every_file(write: Writer, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "harmful": True, "kind": "own kind"}, {"prompt": "two", "harmful": False, "kind": None}]
    prompts = read_prompts([Source(path=str(write(tmp_path / "data", rows)))], both=True)
    assert [(p.text, p.harmful, p.kind) for p in prompts] == [("one", True, "own kind"), ("two", False, "ordinary")]


def test_messages_never_hold_the_prompt_of_a_prompt_set(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl({"prompt": PLANTED, "harmful": True}, {"prompt": PLANTED, "harmful": "no"})
    with pytest.raises(UserError, match=":2: harmful") as caught:
        read_prompts([Source(path=str(path))], both=False)
    assert PLANTED not in str(caught.value)


def test_file_that_shrinks_while_it_is_read_is_named(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(*OWN * 5)
    chunks = [chunk for file in files_of(Source(path=str(path))) for chunk in file_chunks(file)]
    path.write_text(path.read_text()[: path.stat().st_size // 2].rpartition("\n")[0] + "\n")
    with pytest.raises(UserError, match=r"data\.jsonl: became shorter"):
        [record for chunk in chunks for record in read_chunk(chunk)]


def test_every_suffix_of_a_source_has_a_reader() -> None:
    assert set(KINDS) == set(READERS)


ROWS = "".join(json.dumps(row) + "\n" for row in UNPAIRED)
CELLS = [
    ["prompt", "completion", "label"],
    *([row[key] for key in ("prompt", "completion", "label")] for row in UNPAIRED),
]


def separated(delimiter: str) -> str:
    return "".join(delimiter.join(f'"{cell}"' for cell in row) + "\r\n" for row in CELLS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", ROWS.encode()),
        ("data.json", b"\xef\xbb\xbf\n" + ROWS.encode()),
        ("data.json", ROWS.encode("utf-16")),
        ("data.json", json.dumps({"version": 1, "tags": ["a"], "data": UNPAIRED}).encode()),
        ("data.json.gz", gzip.compress(json.dumps({"rows": UNPAIRED}, indent=1).encode(), mtime=0)),
        ("data.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)),
        ("data.jsonl.zst", pa.compress(ROWS.encode(), "zstd", asbytes=True)),
        ("data.JSONL", ROWS.encode()),
        ("data.NDJSON.GZ", gzip.compress(ROWS.encode(), mtime=0)),
        ("data.ndjson", ROWS.encode()),
        ("data.tsv", separated("\t").encode()),
        ("data.csv", separated(";").encode()),
        ("data.csv", separated("\t").encode("utf-16")),
        ("data.csv", separated(",").encode("utf-8-sig")),
        ("data.csv.gz", gzip.compress(separated(";").encode("utf-16"), mtime=0)),
    ],
)
def test_kinds_of_files_as_published(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        examples = read_examples(str(source))
        assert [(e.prompt, e.response, e.aligned, e.harmful) for e in examples] == FORMATS["unpaired"][1]
        assert examples[0].source.startswith(f"{tmp_path / name}:")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("data.jsonl", ROWS.encode("utf-16"), "UTF-8"),
        ("data.json", b'{"messages": [{"role": "user", "content": "a"}]}', "columns messages"),
        ("data.json", b'{"a": [{"x": 1}], "b": [{"x": 2}]}', "columns a, b"),
        ("data.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)[:-20], "gzip"),
        ("data.jsonl.gz", ROWS.encode(), "gzip"),
        ("data.csv", b"\xff\xfe" + "prompt".encode("utf-16-le") + b"\x00", "UTF-16"),
        ("data.parquet.gz", b"", ".jsonl"),
        ("data.xlsx", b"", ".csv"),
    ],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(name: str, content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}:")
    assert named in message


def test_a_json_file_may_be_one_record(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(UNPAIRED[0], indent=1))
    assert read_examples(str(tmp_path / "data.json"))[0].prompt == UNPAIRED[0]["prompt"]


def test_lines_of_a_compressed_file_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(f"\n{ROWS}\n{{}}\n".encode()))
    assert refusal(path).startswith(f"{path}:{len(UNPAIRED) + 3}: ")


def test_the_name_of_a_source_has_no_suffix() -> None:
    names = {"a/b.c.jsonl.gz": "b.c", "b.PARQUET": "b", "b.v2.csv.zst": "b.v2", "data/*.jsonl": "data"}
    assert {path: Source(path=path).short_name for path in names} == names
