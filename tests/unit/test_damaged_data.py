"""Damaged files of examples: each is read, or refused in one line that names the file."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.mutations import mutated_bytes
from helpers.outcomes import refusal
from raydiv.config.source import Source
from raydiv.data.readers import read_examples
from raydiv.utils.errors import UserError

ROWS = [
    {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No.", "harmful": n % 2 == 0} for n in range(30)
]

FILES = {
    "rows.jsonl": ("rows.jsonl",),
    "rows.jsonl.gz": ("rows.jsonl.gz",),
    "rows.json": ("rows.json",),
    "rows.csv": ("rows.csv",),
    "rows.parquet": ("rows.parquet",),
    "plain.parquet": ("plain.parquet",),
    "saved": ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"),
    "splits": ("dataset_dict.json", "train/state.json", "train/data-00000-of-00001.arrow"),
}
"""By source, the files of it that are damaged."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    with (folder / "rows.csv").open("w", newline="") as content:
        writer = csv.DictWriter(content, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)
    times = pa.array([datetime.datetime(2026, 1, 31)] * len(ROWS), pa.timestamp("us", "UTC"))
    table = pa.Table.from_pylist(ROWS).append_column("at", times)
    pq.write_table(table, folder / "rows.parquet")
    pq.write_table(table, folder / "plain.parquet", compression="none", use_dictionary=False)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(folder / "splits"))
    return folder


def read_mutations(source: str, seeds: range, folder: Path) -> None:
    for file in FILES[source]:
        path = folder / file if (folder / source).is_file() else folder / source / file
        original = path.read_bytes()
        try:
            for seed in seeds:
                path.write_bytes(mutated_bytes(original, seed))
                message = refusal(lambda: read_examples(Source(path=str(folder / source))))
                if message is not None:
                    assert str(folder / source) in message, f"{file}, seed {seed}: {message}"
                    assert "\n" not in message, f"{file}, seed {seed}: {message}"
        finally:
            path.write_bytes(original)
        assert len(read_examples(Source(path=str(folder / source)))) == 2 * len(ROWS)


@pytest.mark.parametrize("source", FILES)
def test_a_damaged_file_is_read_or_named(source: str, folder: Path) -> None:
    read_mutations(source, range(60), folder)


@pytest.mark.long
@pytest.mark.parametrize("source", FILES)
def test_many_damaged_files_are_read_or_named(source: str, folder: Path) -> None:
    read_mutations(source, range(60, 1000), folder)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62] * len(ROWS), pa.timestamp("us")),
        pa.array([0] * len(ROWS), pa.timestamp("us", "Nowhere/Unknown")),
        pa.array([2**31 - 1] * len(ROWS), pa.date32()),
        pa.array([b"\xff"] * len(ROWS), pa.binary()),
    ],
    ids=["a date that Python lacks", "an unknown time zone", "a day that Python lacks", "bytes"],
)
def test_columns_that_hold_no_field_are_not_read(column: pa.Array, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS).append_column("at", column)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert len(read_examples(Source(path=str(tmp_path / "rows.parquet")))) == 2 * len(ROWS)


def test_a_nested_date_that_python_lacks_makes_bad_rows(tmp_path: Path) -> None:
    dates = pa.array([2**62] * len(ROWS), pa.timestamp("us"))
    table = pa.Table.from_pylist(ROWS).append_column("notes", pa.StructArray.from_arrays([dates], names=["at"]))
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet:1: a field cannot be read"):
        read_examples(Source(path=str(tmp_path / "rows.parquet")))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"splits": 3}', '{"splits": ["../x"]}', "[" * 5000])
def test_malformed_records_of_a_saved_data_set_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset_dict\.json|leads out"):
        read_examples(Source(path=str(tmp_path)))
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        read_examples(Source(path=str(tmp_path)))
