"""Preparing sources through Ray: equal rows from every kind of file, bad rows, and what is cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.models import TEMPLATE, make_tokenizer
from helpers.stored import indices_of, opened, recipe_of, stream_here
from raydiv.commands.prepare import load_inputs
from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.data import ChatConfig
from raydiv.data import tokenize as module
from raydiv.data.index import INDEX, Index, OpenSource
from raydiv.data.readers import FILE_CHUNK_BYTES
from raydiv.data.splits import make_splits
from raydiv.data.tokenize import CHUNK_RECORDS, tokenize
from raydiv.model.chat import Chat
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

Row = dict[str, Any]

PLANTED = "PLANTED-TEXT"
BATCH = {"max_length": 96, "max_prompt_length": 48}


@pytest.fixture(scope="module")
def ray(small_sources_use_ray: None) -> Iterator[None]:
    with ray_session(ClusterConfig()):
        yield


def recipe(tokenizer: Path, train: Any, on_bad_row: str = "quarantine", **changes: Any) -> Recipe:
    return recipe_of(
        tokenizer, train, "sft", on_bad_row=on_bad_row, batch=changes.pop("batch", BATCH), eval=None, **changes
    )


def open_one(recipe: Recipe, chat: Chat) -> OpenSource:
    ((source,), _) = opened(recipe, chat)
    return source


def index_of(tokenizer: Path, chat: Chat, train: Any, **changes: Any) -> Index:
    """The index of one source, tokenised in this process."""
    changed = recipe(tokenizer, str(train) if isinstance(train, Path) else train, **changes)
    (index,) = indices_of([open_one(changed, chat)], changed, chat)
    return index


def lines(*rows: Any) -> bytes:
    """JSONL; bytes are lines already."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


Tokens = list[tuple[list[int], list[int], bool, int]]


def tokens_of(*indices: Index) -> Tokens:
    """Prompt ids, response ids, aligned and harmful of each example, in order."""
    tokens: Tokens = []
    for index in indices:
        columns = index.columns
        prompts, responses = (index.shards.read(f"{side}_ids", columns["row"]) for side in ("prompt", "response"))
        labels = columns["aligned"].tolist(), columns["harmful"].tolist()
        tokens += zip((p.tolist() for p in prompts), (r.tolist() for r in responses), *labels, strict=True)
    return tokens


def expected_tokens(chat: Chat, rows: list[Row], batch: dict[str, int] = BATCH) -> Tokens:
    """The same from the rows, one at a time."""
    tokens: Tokens = []
    for row in rows:
        example = chat.tokenize_one(row["prompt"], row["response"], batch["max_prompt_length"], batch["max_length"])
        harmful = row.get("harmful")
        tokens.append((example.prompt, example.response, row["aligned"], -1 if harmful is None else int(harmful)))
    return tokens


def bad_rows(index: Index) -> list[tuple[str, int, str]]:
    return [(row["file"], row["line"], row["reason"]) for row in index.bad.as_json()]


# --- one pass through Ray, of all sources below ---

ROWS = [
    {"prompt": f"Question {n}, {'longer ' * (n % 9)}?", "response": f"Answer {n}.", "aligned": n % 2 == 0}
    | {"harmful": n % 3 == 0}
    for n in range(60)
]
SEVERAL_CHUNKS = [
    {"prompt": f"{n} " + "long " * 600, "response": f"r{n}", "aligned": True, "note": "x" * (n % 997)}
    for n in range(1500)
]


def _good(n: int) -> Row:
    return {"prompt": f"Ask {n}", "response": f"Say {n}", "aligned": n % 2 == 0}


RAYDIV = {"prompt": PLANTED, "response": PLANTED, "aligned": True}
AUTHORS = {"safety": "safe", "prompt": "one", "acc_responses": ["yes"], "rej_responses": ["no"]}
BAD: list[tuple[Any, str]] = [
    (b'{"prompt": "' + PLANTED.encode(), "not JSON: "),
    (json.dumps([PLANTED]).encode(), "a record is a mapping of columns, found list of length 1"),
    ({"prompt": PLANTED, "response": PLANTED}, "unknown format: columns prompt, response "),
    (RAYDIV | {"response": None}, "response must be non-empty text, found None"),
    (RAYDIV | {"aligned": PLANTED}, "aligned must be true or false"),
    (RAYDIV | {"prompt": {"text": PLANTED}}, "prompt must be non-empty text, found dict of length 1"),
    (RAYDIV | {"response": " \n"}, "response must be non-empty text, found str of length 2"),
    (RAYDIV | {"prompt": f"{PLANTED}\0"}, "prompt holds a NUL character"),
    (RAYDIV | {"response": "x" * 10_000_000}, "response has 10,000,000 characters"),
    (b'{"prompt": "caf\xe9", "response": "b", "aligned": true}', "not UTF-8, at byte 16 of the line"),
    (RAYDIV | {"response": f"{PLANTED} \ud83d"}, "response is not UTF-8"),
    (RAYDIV | {"label": True}, "has both aligned and label"),
    (AUTHORS | {"safety": PLANTED}, "safety must be safe or unsafe, found str of length 12"),
    (AUTHORS | {"safety": 1}, "safety is spelled 1/0 here"),
]
FIRST_BAD, BAD_EVERY = 17, 180


def _with_bad_rows() -> tuple[list[Any], dict[int, str]]:
    """Lines of a file of several chunks, and the reasons of the bad rows by line number."""
    rows: list[Any] = [_good(n) for n in range(2600)]
    rows[5] = rows[2222] = AUTHORS
    rows[1111] = b"   "  # a blank line is not a row
    bad = {FIRST_BAD + number * BAD_EVERY: case for number, case in enumerate(BAD)}
    for position, (row, _) in bad.items():
        rows[position] = row
    return rows, {position + 1: reason for position, (_, reason) in bad.items()}


def _write_all(folder: Path) -> dict[str, list[Any]]:
    """Sources of ROWS in every kind of file, and sources of single tests: values of data.train, by name."""
    names = {"jsonl": "rows.jsonl", "json": "rows.json", "csv": "rows.csv", "parquet": "rows.parquet"}
    (folder / "rows.jsonl").write_bytes(lines(*ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=7)
    (folder / "rows.csv").write_text(
        "prompt,response,aligned,harmful\n"
        + "".join('"{prompt}",{response},{aligned},{harmful}\n'.format(**row) for row in ROWS)
    )
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(folder / "saved"), num_shards=3)
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(folder / "splits"))
    for name in ("folder", "pattern"):
        (folder / name).mkdir()
    (folder / "folder" / "a.jsonl").write_bytes(lines(*ROWS[:20]))
    (folder / "folder" / "b.json").write_text(json.dumps(ROWS[20:40]))
    pq.write_table(pa.Table.from_pylist(ROWS[40:]), folder / "folder" / "c.parquet")
    (folder / "folder" / "notes.txt").write_text(PLANTED)
    (folder / "folder" / ".hidden.jsonl").write_bytes(lines(RAYDIV))
    for number in range(6):  # read in order of name, not of writing
        part = folder / "pattern" / f"part-{5 - number}.jsonl"
        part.write_bytes(lines(*ROWS[(5 - number) * 10 :][:10]))
    (folder / "pattern" / "other.jsonl").write_bytes(lines(RAYDIV))
    (folder / "first.jsonl").write_bytes(lines(*ROWS[:25]))
    (folder / "second.jsonl").write_bytes(lines(*ROWS[25:]))
    renamed = [
        {"question": r["prompt"], "answer": r["response"], "ok": r["aligned"], "harmful": r["harmful"]} for r in ROWS
    ]
    (folder / "renamed.jsonl").write_bytes(lines(*renamed))
    (folder / "chunks.jsonl").write_bytes(lines(*SEVERAL_CHUNKS))
    (folder / "bad.jsonl").write_bytes(lines(*_with_bad_rows()[0]))
    columns = {"prompt": "question", "response": "answer", "aligned": "ok"}
    return {
        **{name: [str(folder / file)] for name, file in names.items()},
        "saved dataset": [str(folder / "saved")],
        "split of a saved dataset": [{"path": str(folder / "splits"), "split": "test"}],
        "folder": [str(folder / "folder")],
        "pattern": [str(folder / "pattern" / "part-?.jsonl")],
        "several files": [str(folder / "first.jsonl"), str(folder / "second.jsonl")],
        "columns": [{"path": str(folder / "renamed.jsonl"), "columns": columns}],
        "chunks": [str(folder / "chunks.jsonl")],
        "bad": [str(folder / "bad.jsonl")],
    }


KINDS = [
    *("jsonl", "json", "csv", "parquet", "saved dataset", "split of a saved dataset", "folder", "pattern"),
    *("several files", "columns"),
]


class Everything:
    """All sources, prepared in one pass through Ray."""

    def __init__(self, folder: Path, tokenizer: Path, chat: Chat) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.sources = _write_all(folder)
        self.recipe = recipe(tokenizer, [source for sources in self.sources.values() for source in sources])
        self.progress: list[int] = []
        indices = iter(
            tokenize(
                opened(self.recipe, chat)[0],
                chat,
                self.recipe.cluster,
                quarantine=True,
                progress=lambda done, total, note="": self.progress.append(done),
            )
        )
        self.indices = {name: [next(indices) for _ in sources] for name, sources in self.sources.items()}


@pytest.fixture(scope="module")
def everything(
    ray: None, tokenizer: Path, chat: Chat, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Everything]:
    folder = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDIV_CACHE", str(folder / "cache"))
        return Everything(folder, tokenizer, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows_in_order(kind: str, everything: Everything, chat: Chat) -> None:
    indices = everything.indices[kind]
    assert tokens_of(*indices) == expected_tokens(chat, ROWS)
    assert not any(len(index.bad) for index in indices)


def test_where_names_the_file_and_the_line(everything: Everything) -> None:
    folder = everything.folder
    (index,) = everything.indices["folder"]
    assert [index.where(row) for row in (0, 19, 20, 59)] == [
        f"{folder}/folder/{place}" for place in ("a.jsonl:1", "a.jsonl:20", "b.json:1", "c.parquet:20")
    ]
    (index,) = everything.indices["parquet"]
    assert [index.where(row) for row in (6, 7, 59)] == [f"{folder}/rows.parquet:{row}" for row in (7, 8, 60)]


def test_file_of_several_chunks_has_every_record_once_in_order(everything: Everything, chat: Chat) -> None:
    (index,) = everything.indices["chunks"]
    assert (everything.folder / "chunks.jsonl").stat().st_size > FILE_CHUNK_BYTES
    assert len(index.shards.uris) > 1
    assert tokens_of(index) == expected_tokens(chat, SEVERAL_CHUNKS)
    rows = range(0, len(SEVERAL_CHUNKS), 150)
    assert [index.where(row) for row in rows] == [f"{everything.folder}/chunks.jsonl:{row + 1}" for row in rows]


def test_every_bad_row_is_listed_with_file_line_and_reason(everything: Everything) -> None:
    (index,) = everything.indices["bad"]
    expected = _with_bad_rows()[1]
    reasons = {line: reason for _, line, reason in bad_rows(index)}
    assert len(index.bad) == len(reasons) == len(BAD)
    assert {file for file, _, _ in bad_rows(index)} == {str(everything.folder / "bad.jsonl")}
    assert reasons.keys() == expected.keys()
    for line, beginning in expected.items():
        assert reasons[line].startswith(beginning)
        assert "\n" not in reasons[line]
        assert PLANTED not in reasons[line]


def test_all_good_rows_between_bad_ones_are_kept_in_order(everything: Everything, chat: Chat) -> None:
    (index,) = everything.indices["bad"]
    assert (everything.folder / "bad.jsonl").stat().st_size > FILE_CHUNK_BYTES
    assert len(index.shards.uris) > len(index) // CHUNK_RECORDS
    rows, bad = _with_bad_rows()
    authors = [
        {"prompt": "one", "response": response, "aligned": aligned, "harmful": False}
        for response, aligned in (("yes", True), ("no", False))
    ]
    good = [
        row
        for line, record in enumerate(rows, start=1)
        if line not in bad and isinstance(record, dict)
        for row in (authors if record is AUTHORS else [record])
    ]
    assert len(good) == 2600 - len(BAD) - 1 + 2
    assert tokens_of(index) == expected_tokens(chat, good)


def test_progress_counts_every_row_tokenised(everything: Everything) -> None:
    assert everything.progress == sorted(everything.progress)
    rows = {
        index.opened.folder.uri: int(index.shards.starts[-1])
        for indices in everything.indices.values()
        for index in indices
    }
    assert everything.progress[-1] == sum(rows.values())


def _files(opened: OpenSource) -> dict[str, Path]:
    return {path.name: path for path in Path(opened.folder.uri).iterdir()}


def test_interrupted_preparation_resumes_where_it_stopped(
    everything: Everything, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(everything.cache))
    (before,) = everything.indices["bad"]
    files = _files(before.opened)
    contents = {name: path.read_bytes() for name, path in files.items()}
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    lost = sorted(name for name in files if name != INDEX)[1]
    files[lost].unlink()
    files[INDEX].unlink()
    again = [opened for opened in opened_sources(everything, chat) if opened.folder == before.opened.folder]
    assert not again[0].ready
    (after,) = tokenize(again, chat, ClusterConfig(), quarantine=True)
    assert {name: path.read_bytes() for name, path in _files(before.opened).items()} == contents
    now = {name: path.stat().st_mtime_ns for name, path in files.items()}
    assert {name for name in files if now[name] != times[name]} == {lost, INDEX}
    assert bad_rows(after) == bad_rows(before)
    assert tokens_of(after) == tokens_of(before)


def opened_sources(everything: Everything, chat: Chat) -> list[OpenSource]:
    return opened(everything.recipe, chat)[0]


def test_first_bad_row_is_an_error_without_its_text(everything: Everything, tokenizer: Path, chat: Chat) -> None:
    path = everything.folder / "bad.jsonl"
    strict = recipe(tokenizer, str(path), on_bad_row="error")
    with pytest.raises(UserError) as caught:
        tokenize([open_one(strict, chat)], chat, strict.cluster, quarantine=False)
    message = str(caught.value)
    assert message.startswith(f"{path}:{FIRST_BAD + 1}: not JSON")
    assert PLANTED not in message
    assert "\n" not in message
    assert f"raydiv data check {path}" in message
    assert "data.on_bad_row=quarantine" in message


def test_unreadable_file_is_named_from_a_task(ray: None, tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_text("prompt,response,aligned\na,b,true\n" + f'"{PLANTED}"x,b,true\n')
    strict = recipe(tokenizer, str(path))
    with pytest.raises(UserError) as caught:
        tokenize([open_one(strict, chat)], chat, strict.cluster, quarantine=True)
    assert str(caught.value).startswith(f"{path}: not CSV: ")
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("kind", ["bad", "parquet", "saved dataset", "pattern"])
def test_equal_content_makes_equal_bytes(kind: str, everything: Everything, tokenizer: Path, chat: Chat) -> None:
    first, second = everything.indices[kind], index_of(tokenizer, chat, everything.sources[kind])
    assert _files(first[0].opened).keys() == _files(second.opened).keys()
    for name, path in _files(second.opened).items():
        assert path != _files(first[0].opened)[name]
        assert path.read_bytes() == _files(first[0].opened)[name].read_bytes()


def test_small_sources_need_no_ray(
    everything: Everything, tokenizer: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydiv.data.index.SMALL_BYTES", 2**30)
    monkeypatch.setattr("raydiv.runtime.actor_pool.pool_resources", None)
    source = recipe(tokenizer, everything.sources["bad"][0])
    (index,) = module.tokenize([open_one(source, chat)], chat, source.cluster, quarantine=True)
    expected = everything.indices["bad"][0]
    assert index.columns.keys() == expected.columns.keys()
    for name, column in index.columns.items():
        np.testing.assert_array_equal(column, expected.columns[name])


def test_equal_rows_make_equal_fingerprints_in_every_kind_of_source(everything: Everything) -> None:
    fingerprints = {
        kind: make_splits(everything.recipe, [index], []).train.examples.fingerprint
        for kind in KINDS
        for index in everything.indices[kind][:1]
        if kind != "several files"
    }
    assert len(set(fingerprints.values())) == 1, fingerprints


# --- in this process ---


@pytest.fixture
def unmade(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After the call, nothing may be tokenised."""

    def forbid() -> None:
        def made(*_: Any, **__: Any) -> Any:
            raise AssertionError("cached shards were tokenised again")

        monkeypatch.setattr(module.Tokenizer, "__call__", made)

    return forbid


def test_the_same_content_under_another_path_is_not_tokenised_again(
    tokenizer: Path, chat: Chat, tmp_path: Path, unmade: Callable[[], None]
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_bytes(lines(*ROWS))
    first = index_of(tokenizer, chat, tmp_path / "one" / "one.jsonl")
    unmade()
    second = index_of(tokenizer, chat, tmp_path / "other")
    assert second.opened.folder == first.opened.folder
    assert tokens_of(second) == tokens_of(first)
    assert second.where(0) == f"{tmp_path}/other/other.jsonl:1"


def test_bad_rows_of_equal_content_are_listed_under_each_path(tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    for name in ("one.jsonl", "other.jsonl"):
        (tmp_path / name).write_bytes(lines(ROWS[0], b"{"))
        index = index_of(tokenizer, chat, tmp_path / name)
        assert [place[:2] for place in bad_rows(index)] == [(str(tmp_path / name), 2)]


@pytest.mark.parametrize(
    "change",
    [
        {"batch": BATCH | {"max_length": 95}},
        {"batch": BATCH | {"max_prompt_length": 47}},
        {"template": TEMPLATE + " "},
        {"columns": {"prompt": "response", "response": "prompt", "aligned": "aligned"}},
        {"train": {"constants": {"note": "x"}}},
        {"tokenizer": "another"},
        {"content": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_determines_tokens_or_rows_is_part_of_the_key(
    change: dict[str, Any], tokenizer: Path, chat: Chat, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(*ROWS))
    first = index_of(tokenizer, chat, path)
    source: dict[str, Any] = {"path": str(path), **change.pop("train", {})}
    if change.pop("content", None):
        path.write_bytes(lines(*ROWS[1:]))
    if change.pop("tokenizer", None):
        tokenizer = tmp_path / "tokenizer"
        make_tokenizer(tokenizer)
        rules = json.loads((tokenizer / "tokenizer.json").read_text())
        rules["pre_tokenizer"]["add_prefix_space"] = True
        (tokenizer / "tokenizer.json").write_text(json.dumps(rules))
    changed = recipe(tokenizer, source, **change)
    other = open_one(changed, Chat(tokenizer, changed.data))
    assert other.folder != first.opened.folder
    assert not other.ready


def test_equal_bytes_under_another_suffix_are_another_source(tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):  # one line with a list: one row of JSON, or one bad row of JSONL
        (tmp_path / name).write_bytes(lines([ROWS[0]]))
    assert len(index_of(tokenizer, chat, tmp_path / "rows.json")) == 1
    (bad,) = bad_rows(index_of(tokenizer, chat, tmp_path / "rows.jsonl"))
    assert bad == (str(tmp_path / "rows.jsonl"), 1, "a record is a mapping of columns, found list of length 1")


def test_columns_of_the_recipe_apply_to_sources_without_columns(tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        lines({"question": "one", "answer": "yes"}, {"question": "two"}, {"question": "three", "answer": "no"})
    )
    names = {"prompt": "question", "response": "answer"}
    constants = {"aligned": True, "harmful": False}
    by_recipe = index_of(tokenizer, chat, {"path": str(path), "constants": constants}, columns=names)
    by_source = index_of(
        tokenizer, chat, {"path": str(path), "constants": constants, "columns": names}, columns={"prompt": "nothing"}
    )
    expected = [
        {"prompt": prompt, "response": response, "aligned": True, "harmful": False}
        for prompt, response in (("one", "yes"), ("three", "no"))
    ]
    for index in (by_recipe, by_source):
        assert tokens_of(index) == expected_tokens(chat, expected)
        assert bad_rows(index) == [(str(path), 2, "no column answer, which data.columns names")]


def test_labels_of_csv_are_parsed_in_renamed_columns(tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer,ok\none,yes,true\ntwo,no,False\n")
    columns = {"prompt": "question", "response": "answer", "aligned": "ok"}
    index = index_of(tokenizer, chat, {"path": str(path), "columns": columns})
    assert [aligned for _, _, aligned, _ in tokens_of(index)] == [True, False]


def test_column_named_like_a_label_may_hold_text_in_csv(tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("label,response,aligned\ntrue,yes,true\n")
    index = index_of(tokenizer, chat, {"path": str(path), "columns": {"prompt": "label"}})
    assert tokens_of(index) == expected_tokens(chat, [{"prompt": "true", "response": "yes", "aligned": True}])


FAILS_ON_BAD = (
    "{% for m in messages %}{% if 'bad' in m['content'] %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['content'] + '</s>' }}{% endfor %}"
)
FAILS_WITH_TYPE_ERROR = "{% for m in messages %}{{ m['content'] + (1 if 'bad' in m['content'] else '') }}{% endfor %}"


@pytest.mark.parametrize("template", [FAILS_ON_BAD, FAILS_WITH_TYPE_ERROR], ids=["exception", "type error"])
def test_prompt_on_which_the_template_fails_is_a_bad_row(template: str, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"{'bad' if n in (3, 7) else 'good'} {PLANTED}", "response": f"r{n}", "aligned": True}
        for n in range(9)
    ]
    path.write_bytes(lines(*rows[:5], b"{", *rows[5:]))
    chat = Chat(tokenizer, ChatConfig(template=template))
    index = index_of(tokenizer, chat, path, template=template)
    assert [(line, reason.partition(":")[0]) for _, line, reason in bad_rows(index)] == [
        (4, "the chat template fails"),
        (6, "not JSON"),
        (9, "the chat template fails"),
    ]
    assert PLANTED not in str(bad_rows(index))
    assert tokens_of(index) == expected_tokens(chat, [row for n, row in enumerate(rows) if n not in (3, 7)])


GOOD = {"prompt": "p", "response": "r", "aligned": True}


def test_an_error_stops_the_stream_at_once(
    tokenizer: Path, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from stream_here(*arguments, **options)
        finally:
            stopped.append(True)

    (tmp_path / "data.jsonl").write_bytes(lines(b"{", *[GOOD] * 10))
    strict = recipe(tokenizer, str(tmp_path / "data.jsonl"), on_bad_row="error")
    monkeypatch.setattr(module, "map_stream", watched)
    with pytest.raises(UserError) as caught:  # the error holds its frames, and with them the stream
        tokenize([open_one(strict, chat)], chat, strict.cluster, quarantine=False)
    assert stopped, caught


ASKED = {"role": "user", "content": "x"}


def after(**turn: str) -> Row:
    """A row whose prompt begins with a system turn, changed by ``turn``."""
    return GOOD | {"prompt": [{"role": "system", "content": PLANTED} | turn, ASKED]}


BAD_FIELDS: dict[str, Row] = {
    "NUL in a message": GOOD | {"response": [{"role": "assistant", "content": "x\0"}]},
    "lone surrogate in a rejected response": {"prompt": "p", "chosen": "c", "rejected": "\ud800"},
    "label as other text": {"prompt": "p", "completion": "c", "label": "yes"},
    "NUL in one of several responses": AUTHORS | {"rej_responses": ["no", "\0"]},
    "conversations without a response": {"chosen": [ASKED], "rejected": [ASKED]},
    "lone surrogate in a system turn": after(content=f"{PLANTED} \ud800"),
    "lone surrogate in a role": after(role="\ud800"),
    "lone surrogate in a pair's name": GOOD | {"pair": "\ud800"},
    "NUL in a system turn": after(content="\0"),
    "endless system turn": after(content="x" * 1_000_001),
}


@pytest.mark.parametrize("bad", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_field_makes_a_bad_row(bad: Row, tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(GOOD, bad, GOOD))
    index = index_of(tokenizer, chat, path)
    assert [place[:2] for place in bad_rows(index)] == [(str(path), 2)]
    assert PLANTED not in str(bad_rows(index))
    assert len(index) == 2


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_field_with_invalid_utf8_in_a_binary_file_is_a_bad_row(
    kind: str, tokenizer: Path, chat: Chat, tmp_path: Path
) -> None:
    prompts = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": prompts, "response": ["a", "b", "c"], "aligned": [True, True, False]})
    path = tmp_path / "data.parquet"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        path = tmp_path / "saved"
        datasets.Dataset(table).save_to_disk(str(path))
    index = index_of(tokenizer, chat, path)
    assert [line for _, line, _ in bad_rows(index)] == [2]
    assert [row[2] for row in tokens_of(index)] == [True, False]


def test_bad_first_row_is_left_out_under_quarantine(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(b"{", GOOD))
    with pytest.raises(UserError, match=r"data\.jsonl:1: not JSON"):
        load_inputs(recipe(tiny_model, str(path), on_bad_row="error"), ProgressDisplay(quiet=True))
    assert len(load_inputs(recipe(tiny_model, str(path)), ProgressDisplay(quiet=True)).train) == 1


def test_rarer_spelling_of_safety_is_an_error_with_its_line(tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(AUTHORS, AUTHORS, AUTHORS | {"safety": "0"}))
    with pytest.raises(UserError, match=r"data\.jsonl:3: safety .*1/0 here, .*safe/unsafe"):
        index_of(tokenizer, chat, path, on_bad_row="error")


# --- hub data sets ---


class Hub:
    """Replaces ``datasets.load_dataset``, and records its arguments."""

    def __init__(self, rows: list[Row]) -> None:
        self.data, self.asked = datasets.Dataset.from_list(rows), []  # type: ignore[var-annotated]

    def __call__(self, *place: Any, **options: Any) -> datasets.Dataset:
        self.asked.append((place, options))
        return self.data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A data set of ROWS on the hub, exported to files of 25 rows."""
    hub = Hub(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr("raydiv.data.sources.EXPORT_ROWS", 25)
    return hub


def test_hub_data_set_is_loaded_with_the_sources_options(hub: Hub, tokenizer: Path, chat: Chat) -> None:
    source = {"path": "hf://org/name", "config": "small", "split": "test", "revision": "abc"}
    index = index_of(tokenizer, chat, source)
    assert hub.asked == [(("org/name", "small"), {"split": "test", "revision": "abc"})]
    assert tokens_of(index) == expected_tokens(chat, ROWS)


def test_hub_data_set_is_its_train_split_by_default(hub: Hub, tokenizer: Path, chat: Chat) -> None:
    index_of(tokenizer, chat, "hf://org/name")
    assert hub.asked == [(("org/name", None), {"split": "train", "revision": None})]


def test_hub_data_set_is_exported_once(
    hub: Hub, tokenizer: Path, chat: Chat, tmp_path: Path, unmade: Callable[[], None]
) -> None:
    def exported() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "hub").rglob("*.parquet")}

    first = index_of(tokenizer, chat, "hf://org/name")
    before = exported()
    assert sorted(pq.read_metadata(path).num_rows for path in before) == [10, 25, 25]
    unmade()
    assert tokens_of(index_of(tokenizer, chat, "hf://org/name")) == tokens_of(first)
    assert exported() == before


def test_lost_file_of_a_hub_data_set_is_exported_again(hub: Hub, tokenizer: Path, chat: Chat, tmp_path: Path) -> None:
    first = index_of(tokenizer, chat, "hf://org/name")
    lost, *others = sorted((tmp_path / "cache" / "hub").rglob("*.parquet"))
    times = [path.stat().st_mtime_ns for path in others]
    content = lost.read_bytes()
    lost.unlink()
    assert open_one(recipe(tokenizer, "hf://org/name"), chat).folder == first.opened.folder
    assert lost.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in others] == times


def test_bad_row_of_a_hub_data_set_is_numbered_in_the_whole_data_set(hub: Hub, tokenizer: Path, chat: Chat) -> None:
    hub.data = datasets.Dataset.from_list([*ROWS[:29], ROWS[29] | {"response": ""}, *ROWS[30:]])
    index = index_of(tokenizer, chat, "hf://org/name")
    assert [place[:2] for place in bad_rows(index)] == [("hf://org/name", 30)]
    assert index.where(28) == "hf://org/name:29"


def test_hub_data_set_that_cannot_be_loaded_is_named(
    tokenizer: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"^hf://org/name: .*: offline and more$"):
        open_one(recipe(tokenizer, "hf://org/name"), chat)
