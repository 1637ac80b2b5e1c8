"""Folders on a local path and on S3 (a server on loopback): atomic files, and sources and the cache on them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from helpers.stored import rows_here, stream_here
from raydiv.commands.prepare import PreparedData, prepare
from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.source import Source
from raydiv.data.readers import FILE_CHUNK_BYTES, file_chunks, read_examples
from raydiv.data.sources import files_of
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.cache import cache_dir, shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder, file_system, open_input

Row = dict[str, Any]

NOT_BYTES: Any = object()
"""No buffer: writing it fails after the file is open."""


def content(folder: Folder, name: str) -> bytes:
    with open_input(folder.uri_of(name)) as file:
        return bytes(file.read())


# --- a local path ---


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "folder"))


def test_a_local_folder_is_created_with_its_first_file(local: Folder) -> None:
    assert local.file_names("") == []
    assert not local.has("a.parquet")
    local.write("a.parquet", b"one")
    assert local.has("a.parquet")
    assert content(local, "a.parquet") == b"one"
    assert os.listdir(local.uri) == ["a.parquet"]


def test_file_names_are_sorted_and_of_one_suffix(local: Folder) -> None:
    for name in ("b.parquet", "a.parquet", "c.json"):
        local.write(name, b"x")
    (Path(local.uri) / "d.parquet").mkdir()
    assert local.file_names(".parquet") == ["a.parquet", "b.parquet"]
    assert local.file_names("") == ["a.parquet", "b.parquet", "c.json"]
    assert not local.has("d.parquet")


def test_a_local_file_is_replaced_atomically(local: Folder) -> None:
    local.write("a", b"a long first content")
    with open_input(local.uri_of("a")) as before:
        local.write("a", pa.py_buffer(b"second"))
        assert bytes(before.read()) == b"a long first content"
    assert content(local, "a") == b"second"


def test_a_failed_local_write_keeps_the_old_file(local: Folder) -> None:
    local.write("a", b"one")
    for name in ("a", "b"):
        with pytest.raises(TypeError):
            local.write(name, NOT_BYTES)
    assert content(local, "a") == b"one"
    assert not local.has("b")


def test_a_failed_local_write_leaves_no_other_file(local: Folder) -> None:
    local.write("b", b"x")
    with pytest.raises(TypeError):
        local.write("a", NOT_BYTES)
    assert os.listdir(local.uri) == ["b"]


@pytest.mark.parametrize("name", ["a b", "a%20b", "ä 你好", "a#b?c", "[a]"])
def test_a_local_path_is_not_quoted(name: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / name))
    folder.write(name, b"x")
    assert content(folder, name) == b"x"
    assert (tmp_path / name / name).read_bytes() == b"x"


def test_an_unknown_scheme_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"^nowhere://x/y: cannot be reached"):
        file_system("nowhere://x/y")


def test_the_cache_is_a_local_folder_unless_it_is_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "chosen"))
    assert shared_dir("a", "b").uri == str(cache_dir("a", "b")) == str(tmp_path / "chosen" / "a" / "b")
    monkeypatch.setenv("RAYDIV_CACHE", "s3://bucket/cache/")
    assert shared_dir("a", "b").uri == "s3://bucket/cache/a/b"
    assert cache_dir("a", "b") == tmp_path / "home" / "raydiv" / "a" / "b"


# --- S3 ---


@pytest.fixture
def remote(bucket: str, tmp_path: Path) -> Folder:
    """A folder of the bucket for this test only."""
    return Folder(f"{bucket}/{tmp_path.name}")


def test_a_remote_folder_has_the_written_files(remote: Folder) -> None:
    assert remote.file_names("") == []
    assert not remote.has("a.parquet")
    remote.write("b.parquet", b"two")
    remote.write("a.parquet", pa.py_buffer(b"one"))
    Folder(remote.uri_of("c.parquet")).write("inner.parquet", b"x")
    assert remote.file_names(".parquet") == ["a.parquet", "b.parquet"]
    assert remote.has("a.parquet")
    assert not remote.has("c.parquet")
    assert content(remote, "a.parquet") == b"one"
    with open_input(remote.uri_of("b.parquet")) as file:
        file.seek(1)
        assert file.read() == b"wo"


def test_a_remote_file_larger_than_a_part_is_complete(remote: Folder) -> None:
    large = np.random.default_rng(0).bytes(11 * 2**20)
    remote.write("large", large)
    assert content(remote, "large") == large


def test_a_failed_remote_write_leaves_no_file(remote: Folder) -> None:
    with pytest.raises(TypeError):
        remote.write("a", NOT_BYTES)
    assert remote.file_names("") == []


@pytest.mark.parametrize("name", ["a b", "a%20b", "ä 你好", "a#b"])
def test_a_remote_name_may_have_any_character(name: str, remote: Folder) -> None:
    remote.write(name, name.encode())
    assert remote.file_names("") == [name]
    assert content(remote, name) == name.encode()


ROWS = [{"prompt": f"Question {n}?", "response": f"Answer {n}.", "aligned": n % 2 == 0} for n in range(30)]


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[Row], **options: Any) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def csv(rows: list[Row]) -> bytes:
    return ("prompt,response,aligned\n" + "".join("{prompt},{response},{aligned}\n".format(**r) for r in rows)).encode()


def test_a_remote_source_is_read_in_every_format(remote: Folder, tmp_path: Path) -> None:
    remote.write("rows.jsonl", jsonl(ROWS))
    remote.write("rows.json", json.dumps(ROWS).encode())
    remote.write("rows.csv", csv(ROWS))
    remote.write("rows.parquet", parquet(ROWS, row_group_size=7))
    parts = Folder(remote.uri_of("parts"))
    parts.write("b.jsonl", jsonl(ROWS[20:]))
    parts.write("a.parquet", parquet(ROWS[:20]))
    parts.write("notes.txt", b"nothing")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    saved = Folder(remote.uri_of("saved"))
    for file in (tmp_path / "saved").iterdir():
        saved.write(file.name, file.read_bytes())
    expected = [(row["prompt"], row["response"], row["aligned"]) for row in ROWS]
    places = ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "parts", "parts/", "saved", "rows.json*"]
    for place in places:
        examples = read_examples(Source(path=f"{remote.uri}/{place}"))
        copies = 2 if place == "rows.json*" else 1
        assert [(e.prompt, e.response, e.aligned) for e in examples] == expected * copies, place
    assert read_examples(Source(path=remote.uri_of("parts")))[20].source == f"{remote.uri}/parts/b.jsonl:1"


def test_a_remote_file_of_several_chunks_has_every_record_once(remote: Folder) -> None:
    rows = [row | {"note": "x" * (200_000 + n)} for n, row in enumerate(ROWS)]
    remote.write("rows.jsonl", jsonl(rows))
    source = Source(path=remote.uri_of("rows.jsonl"))
    assert len(file_chunks(files_of(source)[0])) == -(-len(jsonl(rows)) // FILE_CHUNK_BYTES) > 1
    examples = read_examples(source)
    assert [e.prompt for e in examples] == [row["prompt"] for row in rows]
    assert [e.source for e in examples] == [f"{source.path}:{n + 1}" for n in range(len(rows))]


@pytest.mark.parametrize("place", ["gone.jsonl", "gone", "gone/*.jsonl", "*.parquet"])
def test_a_missing_remote_source_is_named(place: str, remote: Folder) -> None:
    remote.write("rows.jsonl", jsonl(ROWS))
    with pytest.raises(UserError) as caught:
        files_of(Source(path=f"{remote.uri}/{place}"))
    assert str(caught.value).startswith(f"{remote.uri}/{place}: ")


def test_a_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"^s3://nobodys/rows.jsonl: "):
        files_of(Source(path="s3://nobodys/rows.jsonl"))


def test_an_unreachable_server_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"^s3://away/rows.jsonl: cannot be reached: "):
        files_of(Source(path="s3://away/rows.jsonl"))


@pytest.fixture
def remote_cache(remote: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    cache = Folder(remote.uri_of("cache"))
    monkeypatch.setenv("RAYDIV_CACHE", cache.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return cache


def test_a_hub_data_set_is_written_to_a_remote_cache(
    remote_cache: Folder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    monkeypatch.setattr("raydiv.data.sources.EXPORT_ROWS", 12)
    examples = read_examples(Source(path="hf://org/name"))
    assert [e.prompt for e in examples] == [row["prompt"] for row in ROWS]
    assert all(file.uri.startswith(remote_cache.uri) for file in files_of(Source(path="hf://org/name")))


# --- prepare, through Ray ---


@pytest.fixture(scope="module")
def ray(bucket: str) -> Iterator[None]:
    """A Ray session whose workers have the environment of ``bucket``, which is set first."""
    with ray_session(ClusterConfig()):
        yield


def s3_recipe(model: Path, source: str, *overrides: str) -> Recipe:
    return load_recipe(
        {
            "model": {"id": str(model)},
            "data": {"train": source, "on_bad_row": "quarantine"},
            "loss": {"type": "kldo"},
            "optim": {"steps": 1},
            "batch": {"max_length": 96, "max_prompt_length": 48},
            "separation": {"prompts": None},
        },
        overrides,
    )


def files(uri: str) -> dict[str, Any]:
    system, path = file_system(uri)
    return {
        info.path.removeprefix(f"{path}/"): info.mtime_ns
        for info in system.get_file_info(fs.FileSelector(path, recursive=True))
        if info.is_file
    }


@pytest.mark.long
@pytest.mark.slow
def test_prepare_reads_data_from_s3_and_writes_its_cache_there(
    ray: None,
    small_sources_use_ray: None,
    remote: Folder,
    remote_cache: Folder,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote.write("rows.jsonl", jsonl(ROWS[:20]) + b"{\n" + jsonl(ROWS[20:]))
    recipe = s3_recipe(tiny_model, remote.uri_of("rows.jsonl"))
    first = prepare(recipe, ProgressDisplay(quiet=True))
    assert (first.reference_hits, first.reference_misses) == (0, len(ROWS))
    assert next(first.data.bad.as_json())["line"] == 21
    cached = files(remote_cache.uri)
    assert {name.split("/")[0] for name in cached} == {"prepared", "reference"}
    assert {path.name for path in (tmp_path / "home" / "raydiv").iterdir()} == {"digests", "templates"}
    assert all(uri.startswith(remote_cache.uri) for uri in first.train.examples.shards.uris)

    again = prepare(recipe.model_copy(update={"seed": 1}), ProgressDisplay(quiet=True))
    assert (again.reference_hits, again.reference_misses) == (len(ROWS), 0)
    assert files(remote_cache.uri) == cached

    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "local"))
    monkeypatch.setattr("raydiv.data.tokenize.map_stream", stream_here)
    monkeypatch.setattr("raydiv.data.reference_scorer.map_rows_unordered", rows_here)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    local = prepare(s3_recipe(tiny_model, str(tmp_path / "rows.jsonl")), ProgressDisplay(quiet=True))
    for other in (first, again):
        assert other.train.examples.fingerprint == local.train.examples.fingerprint
        assert ids_of(other) == ids_of(local)
        np.testing.assert_allclose(other.train.reference_logps, local.train.reference_logps, rtol=1e-5)


def ids_of(prepared: PreparedData) -> list[tuple[list[int], list[int]]]:
    ids = prepared.train.examples.ids(np.arange(len(prepared.train.examples)))
    return [(prompt.tolist(), response.tolist()) for prompt, response in ids]
