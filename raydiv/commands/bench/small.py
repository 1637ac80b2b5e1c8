"""``raydiv bench --part small``: seconds of commands that a person waits for, beside their imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from raydiv.commands.bench.harness import with_output_in
from raydiv.config import Recipe, save_recipe
from raydiv.data.readers import read_examples
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import worker_environment
from raydiv.utils.versions import versions

IMPORTS = {
    "data_check": "from transformers import AutoTokenizer",
    "plan": "import torch\nfrom transformers import AutoModelForCausalLM",
}
"""What the libraries behind each command take to import."""


def bench_small(
    recipe: Recipe, rows: int = 1000, repeats: int = 3, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """Time ``raydiv data check`` of ``rows`` rows of the recipe's training data, and ``raydiv plan`` of the recipe.

    Each is a process, timed from its start to its end, in turns with one that imports the libraries alone.

    Caches are warm: each command has run once before. Returns medians in seconds: ``data_check`` and ``plan``, each
    with its ``..._imports``.
    """
    display = display or ProgressDisplay()
    with tempfile.TemporaryDirectory() as folder:
        data, path = Path(folder) / "rows.jsonl", Path(folder) / "recipe.yaml"
        _write_rows(recipe, rows, data)
        save_recipe(with_output_in(recipe, folder), path)
        commands = {
            "data_check": ["-m", "raydiv", "data", "check", str(data), "--recipe", str(path), "--json"],
            "plan": ["-m", "raydiv", "plan", str(path), "--json"],
            **{f"{name}_imports": ["-c", code] for name, code in IMPORTS.items()},
        }
        environment = os.environ | worker_environment(recipe.cluster)
        with display.phase("warm-up"):
            for command in commands.values():
                _seconds(command, environment)
        turns = []
        for number in range(repeats):
            with display.phase(f"turn {number + 1} of {repeats}"):
                turns.append({name: _seconds(command, environment) for name, command in commands.items()})
    return {
        "cpus": os.cpu_count(),
        "rows": rows,
        "repeats": repeats,
        "versions": versions(),
        **{f"{name}_seconds": median(turn[name] for turn in turns) for name in turns[0]},
        "turns": turns,
    }


def _write_rows(recipe: Recipe, rows: int, path: Path) -> None:
    """``rows`` examples of the recipe's training data, in raydiv's columns; repeated where there are fewer."""
    examples = [example for source in recipe.data.train for example in read_examples(source, recipe.data)]
    with path.open("w") as file:
        for example in islice(cycle(examples), rows):
            record = {"prompt": example.prompt, "response": example.response, "aligned": example.aligned}
            file.write(json.dumps(record) + "\n")


def _seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run Python with a command's words. Raises RuntimeError where it fails; a plan that does not fit is no failure."""
    started = time.monotonic()
    run = subprocess.run(  # noqa: S603 - this Python
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    if run.returncode and not ("plan" in command and run.stdout):
        raise RuntimeError(f"{' '.join(command[:4])}: status {run.returncode}: {run.stderr.strip()[-300:]}")
    return time.monotonic() - started


def small_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_small`` returns."""
    names = {"data_check": f"raydiv data check, {report['rows']} rows", "plan": "raydiv plan"}
    return ["", "seconds", "imports alone"], [
        (label, f"{report[f'{name}_seconds']:.1f}", f"{report[f'{name}_imports_seconds']:.1f}")
        for name, label in names.items()
    ]
