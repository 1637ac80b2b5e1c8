"""A run that a laptop makes in seconds: a dozen pairs, a few prompts, a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydiv.config import load_recipe


def write_files(folder: Path) -> dict[str, str]:
    """Twelve pairs to train on, three to hold out, and prompts to measure with."""

    def pair(n: int) -> dict[str, Any]:
        refusal, answer = (
            "I'm sorry, but I can't help with that.",
            f"Sure, here is a long and helpful answer about {n}, " * 2,
        )
        harmful = n % 2 == 0
        return {
            "prompt": f"{'Break' if harmful else 'Mend'} the thing with number {n}",
            "chosen": refusal if harmful else answer,
            "rejected": answer if harmful else refusal,
            "harmful": harmful,
        }

    contents = {
        "train": [pair(n) for n in range(12)],
        "eval": [pair(n) for n in range(20, 23)],
        "prompts": [
            {"prompt": f"{'Hurt' if n % 2 else 'Help'} someone in way {n}", "harmful": n % 2 == 1} for n in range(12)
        ],
    }
    paths = {name: folder / f"{name}.jsonl" for name in contents}
    for name, records in contents.items():
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: str(path) for name, path in paths.items()}


def write_wide(path: Path) -> None:
    """1,200 pairs, each with 120 kB that nobody asks for."""
    rows = [
        {"prompt": f"q{n}", "chosen": f"c{n}", "rejected": f"r{n}", "note": os.urandom(60_000).hex()}
        for n in range(1200)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def recipe_of(model: Path, files: dict[str, str], output: Path, name: str, *overrides: str) -> Any:
    return load_recipe(
        {
            "name": name,
            "output_dir": str(output),
            "model": {"id": str(model)},
            "data": {"train": files["train"], "eval": files["eval"]},
            "loss": {"type": "kldo", "skew": 0.5, "mix": {"sft": {"weight": 0.5}}},
            "optim": {"lr": 3e-3, "steps": 4, "warmup": 1},
            "batch": {"examples": 8, "tokens_per_microbatch": 400, "max_length": 160, "max_prompt_length": 80},
            "cluster": {"num_workers": 2, "pool_actors": 1},
            "separation": {"prompts": None},
        },
        overrides,
    )
