"""``raydiv bench``: the yardstick does the same work, and every figure is there."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stored import indices_of, opened, recipe_of

from raydiv.benchmarks import plain
from raydiv.benchmarks.data import FAR, bench_data
from raydiv.config import load_recipe
from raydiv.model.chat import Chat
from raydiv.progress import Display

ROWS = [
    {"prompt": f"Question {n}?", "chosen": f"Answer {n}, " * (n % 7 + 1), "rejected": "No." * (n % 3 + 1)}
    for n in range(2500)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_plain_script_makes_the_same_tokens(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    chat = Chat(tiny_model)
    recipe = recipe_of(tiny_model, str(data), batch={"max_prompt_length": 20, "max_length": 40})
    (index,) = indices_of(opened(recipe, chat)[0], recipe, chat)
    found = plain.main(str(data), str(tiny_model), str(tmp_path / "plain"), 1, 20, 40)
    assert found["examples"] == len(index) == 2 * len(ROWS)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "plain").iterdir())]
    assert len(tables) == 3
    for column in ("prompt_ids", "response_ids"):
        ours = [ids.tolist() for ids in index.shards.read(column, index.columns["row"])]
        assert ours == [ids for table in tables for ids in table[column].to_pylist()]


@pytest.mark.long
@pytest.mark.slow
def test_bench_of_data_has_every_figure(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        {
            "model": {"id": str(tiny_model)},
            "data": {"train": str(data)},
            "loss": {"type": "kldo", "skew": 0.5},
            "optim": {"epochs": 1},
            "output_dir": str(tmp_path),
        }
    )
    found = bench_data(recipe, [1000, 3000], repeats=1, steps=3, display=Display(quiet=True))
    assert [one["examples"] for one in found["prepare"]] == [1000, 3000]
    for one in found["prepare"]:
        assert one["ratio"] == pytest.approx(one["examples_per_second"] / one["plain_examples_per_second"])
        assert one["peak_bytes"]["driver"] > 0
    assert found["stream"]["steps_per_epoch"] == -(-3000 // 16)
    assert {"seconds_to_step_10", f"seconds_to_step_{FAR}"} <= found["stream"].keys()
    assert found["train"]["steps"] == 2
    assert 0 <= found["train"]["data_share"] < 1
    assert not list(tmp_path.glob("run*"))
