"""``raydiv bench --part data``: speed and memory of data preparation, and the time that steps wait for data."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.commands.bench.harness import timed_run, without_evaluation
from raydiv.config import Recipe
from raydiv.config.source import Source
from raydiv.data.batching import BatchLayout, EpochPlan
from raydiv.data.index import Index, OpenSource
from raydiv.data.readers import read_examples
from raydiv.data.splits import examples_of
from raydiv.data.tokenize import tokenize
from raydiv.model.chat import Chat
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, stream_steps

LATE_STEP = 90_000
"""The number of a step late in a run."""

STREAM_STEPS = 200
"""Number of timed steps of a stream."""


def bench_data(
    recipe: Recipe,
    rows: Sequence[int] = (200_000,),
    repeats: int = 3,
    steps: int = 20,
    display: ProgressDisplay | None = None,
) -> dict[str, Any]:
    """Prepare ``rows`` examples ``repeats`` times, in turns with a multi-process script that does the same work; then
    stream and train on them.

    Returns medians: ``prepare`` (for each number of rows: examples per second of both, their ratio, and peak memory),
    ``stream`` (seconds to the first step when starting at step 10 and at step 90,000, and milliseconds per step without
    training) and ``train`` (the fraction of time that ``steps`` training steps wait for data; the first step
    separately).
    """
    display = display or ProgressDisplay()
    directory = model_directory(recipe.model.id, recipe.model.revision)
    chat = Chat.from_recipe(recipe, directory)
    report: dict[str, Any] = {"cpus": os.cpu_count(), "prepare": []}
    with tempfile.TemporaryDirectory() as folder, _empty_cache(Path(folder) / "cache"), ray_session(recipe.cluster):
        for count in rows:
            path = Path(folder) / f"{count}.jsonl"
            _write_rows(recipe, path, count)
            with display.phase(f"prepare {count} examples"):
                timings = [_prepare_both(recipe, chat, directory, path, number) for number in range(repeats)]
            report["prepare"].append(_summary(count, timings))
        with display.phase("stream"):
            report["stream"] = _stream(recipe, timings[-1]["index"], repeats)
    with display.phase("train"):
        report["train"] = _data_waits(recipe, steps)
    return report


@contextmanager
def _empty_cache(folder: Path) -> Iterator[None]:
    """Use an empty cache folder while the block runs."""
    before = os.environ.get("RAYDIV_CACHE")
    os.environ["RAYDIV_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("RAYDIV_CACHE")
        if before is not None:
            os.environ["RAYDIV_CACHE"] = before


def _write_rows(recipe: Recipe, path: Path, examples: int) -> None:
    """Write ``examples`` examples as pairs, with the lengths of the recipe's first source and distinct prompts."""
    source_examples = read_examples(recipe.data.train[0])
    sides = [[example for example in source_examples if example.aligned == aligned] for aligned in (True, False)]
    with path.open("w") as file:
        for number, (aligned, unaligned) in enumerate(
            itertools.islice(itertools.cycle(zip(*sides, strict=False)), examples // 2)
        ):
            prompt = aligned.prompt if isinstance(aligned.prompt, str) else aligned.prompt[-1]["content"]
            row = {"prompt": f"{number}: {prompt}", "chosen": aligned.response, "rejected": unaligned.response}
            file.write(json.dumps(row) + "\n")


def _prepare_both(recipe: Recipe, chat: Chat, directory: Path, path: Path, number: int) -> dict[str, Any]:
    """Time the plain script and then raydiv on one file."""
    batch, processes = recipe.batch, os.cpu_count() or 1
    output = f"{path}.{number}.plain"
    sizes = [str(size) for size in (processes, batch.max_prompt_length, batch.max_length)]
    script = str(Path(__file__).with_name("tokenize_baseline.py"))
    run = subprocess.run(  # noqa: S603 - a script of raydiv
        [sys.executable, script, str(path), str(directory), output, *sizes], capture_output=True, text=True, check=True
    )
    plain = json.loads(run.stdout)
    with _empty_cache(path.with_suffix(f".{number}.cache")), _PeakMemory() as peak:
        started = time.perf_counter()
        opened = OpenSource(Source(path=str(path)), recipe.data, batch, chat)
        (index,) = tokenize([opened], chat, recipe.cluster, quarantine=False)
        seconds = time.perf_counter() - started
    return {"plain": plain["seconds"], "ours": seconds, "examples": len(index), "memory": peak.bytes, "index": index}


def _summary(count: int, timings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    plain, ours = (statistics.median(timing[name] for timing in timings) for name in ("plain", "ours"))
    return {
        "examples": timings[0]["examples"],
        "plain_examples_per_second": count / plain,
        "examples_per_second": count / ours,
        "ratio": statistics.median(timing["plain"] / timing["ours"] for timing in timings),
        "ratios": [timing["plain"] / timing["ours"] for timing in timings],
        "peak_bytes": {name: max(timing["memory"][name] for timing in timings) for name in timings[0]["memory"]},
    }


class _PeakMemory:
    """Peak resident memory without shared pages: of this process, of its largest descendant, and of all together."""

    def __init__(self) -> None:
        self.bytes = {"driver": 0, "largest_worker": 0, "together": 0}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        driver = psutil.Process()
        ended = False
        while not ended:
            sizes = []
            for process in (driver, *driver.children(recursive=True)):
                try:
                    memory = process.memory_info()
                    sizes.append(memory.rss - memory.shared)
                except psutil.NoSuchProcess:
                    continue
            now = {"driver": sizes[0], "largest_worker": max(sizes[1:], default=0), "together": sum(sizes)}
            self.bytes = {name: max(size, now[name]) for name, size in self.bytes.items()}
            ended = self._done.wait(0.5)


def _stream(recipe: Recipe, index: Index, repeats: int) -> dict[str, Any]:
    """Seconds to the first step of a stream that starts early and of one that starts late; time per step without
    training.
    """
    import ray

    examples = examples_of([index])
    tokens, whole = recipe.batch.tokens_per_microbatch, recipe.batch.examples * recipe.batch.max_length
    layout = BatchLayout(whole if tokens == "auto" else tokens, recipe.cluster.num_workers, "batch")
    shard = RankShard(layout, 0, trains=True, scores=False)
    epochs = EpochPlan(examples.units, recipe.batch.examples, recipe.seed, examples.fingerprint)
    loader = StepLoader(ExampleSet(examples, np.zeros(len(examples), np.float32)), epochs, shard)
    reference = ray.put(loader)
    first_step_seconds: dict[int, list[float]] = {10: [], LATE_STEP: []}
    for start in [
        *first_step_seconds,
        *list(first_step_seconds) * repeats,
    ]:  # the first of each starts processes and is not counted
        started = time.perf_counter()
        steps = stream_steps(loader, partial(ray.get, reference), start, start + STREAM_STEPS)
        next(steps)
        first_step_seconds[start].append(time.perf_counter() - started)
        intervals = _intervals(steps)
    return {
        "examples": len(examples),
        "steps_per_epoch": epochs.steps_in(1),
        **{f"seconds_to_step_{start}": statistics.median(seconds[1:]) for start, seconds in first_step_seconds.items()},
        "milliseconds_per_step": 1e3 * statistics.median(intervals),
    }


def _intervals(steps: Iterator[Any]) -> list[float]:
    """Seconds between consecutive steps."""
    intervals, last = [], time.perf_counter()
    for _ in steps:
        intervals.append(time.perf_counter() - last)
        last = time.perf_counter()
    return intervals


def _data_waits(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Step time, and the time that steps wait for data, in a training run of ``steps`` updates."""
    _, records = timed_run(without_evaluation(recipe, steps))
    waiting, total = (sum(record[name] for record in records[1:]) for name in ("data_seconds", "step_seconds"))
    return {
        "steps": len(records) - 1,
        "step_seconds": statistics.median(record["step_seconds"] for record in records[1:]),
        "data_share": waiting / total,
        "first_step_data_seconds": records[0]["data_seconds"],
    }


def data_table(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of the ``prepare`` part of ``bench_data``."""
    header = ["examples", "plain script /s", "raydiv /s", "ratio", "driver MB", "largest worker MB", "together MB"]
    return header, [
        (
            f"{row['examples']:,}",
            f"{row['plain_examples_per_second']:,.0f}",
            f"{row['examples_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            *(f"{size / 2**20:,.0f}" for size in row["peak_bytes"].values()),
        )
        for row in report["prepare"]
    ]
