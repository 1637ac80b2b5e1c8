"""``raydiv bench``: training speed of a recipe on this machine, compared with a plain PyTorch loop and with TRL.

Machines are noisy, so raydiv and the baselines take turns. A rate or a size is the median over the turns. A ratio is
computed within each turn, where both ran under the same load; the median of these ratios is reported.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, Literal

from raydiv.commands.bench import trl_baseline
from raydiv.commands.bench.harness import Workload, make_workload, timed_run, without_evaluation
from raydiv.config import Recipe
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError
from raydiv.utils.versions import versions

Baseline = Literal["loop", "trl"]


@dataclass(frozen=True, slots=True)
class Timing:
    """One turn of raydiv or of a baseline: seconds and tokens of each step, and peak memory.

    raydiv also has the seconds that each step waited for data, and on GPUs the model FLOPs utilisation of each step.
    """

    seconds: list[float]
    tokens: list[int]
    peak_bytes: float
    data_seconds: list[float] = field(default_factory=list)
    mfu: list[float] = field(default_factory=list)

    def after(self, warmup: int) -> Timing:
        """The turn without its first ``warmup`` steps."""
        return Timing(
            self.seconds[warmup:],
            self.tokens[warmup:],
            self.peak_bytes,
            self.data_seconds[warmup:],
            self.mfu[warmup:],
        )


TRL_PREFIX = "trl_"
"""Prefix of TRL's names in a turn; the per-device batch size follows."""


def bench_training(
    recipe: Recipe,
    against: Sequence[Baseline] = ("loop",),
    steps: int = 6,
    warmup: int = 2,
    repeats: int = 3,
    display: ProgressDisplay | None = None,
) -> dict[str, Any]:
    """Time ``steps`` updates of the recipe after ``warmup`` updates, ``repeats`` times, in turns with the baselines.

    ``loop`` is a plain PyTorch loop without Ray and DeepSpeed on the same examples, with the fastest micro-batch size;
    it shows what the hardware allows. ``trl`` is TRL's trainer on the same model, examples, order, lengths and global
    batch, at each per-device batch size of 1, 2, 4 and 8 that divides the global batch.

    Returns for each ``step_seconds``, ``tokens_per_second`` (without padding; each example once, prompt included) and
    ``peak_bytes`` of the training process; for raydiv also ``data_seconds`` (time that a step waits for data) and
    ``layout``; TRL's ``best`` size; ``ratios`` of raydiv's numbers to the baselines'; on a GPU ``mfu``.

    Raises UserError for recipes that cannot be compared, before anything is timed.
    """
    _require_numbers(steps, warmup, repeats)
    _require_comparable(recipe, against)
    display = display or ProgressDisplay()
    recipe = without_evaluation(recipe, warmup + steps)
    workload = make_workload(recipe, warmup + steps, display)
    sizes = (
        trl_baseline.per_device_sizes(workload.settings["loss"], workload.settings["steps"]) if "trl" in against else []
    )
    layout: dict[str, Any] = {}
    contestants: dict[str, Callable[[], Timing]] = {"raydiv": partial(_raydiv, recipe, layout)}
    if "loop" in against:
        contestants["loop"] = partial(_script, workload, "loop_baseline")
    contestants |= {
        f"{TRL_PREFIX}{size}": partial(_script, workload, "trl_baseline", per_device=size) for size in sizes
    }
    turns, failed = _take_turns(contestants, repeats, display)
    timed = [{name: timing.after(warmup) for name, timing in turn.items()} for turn in turns]
    report = {
        "cpus": os.cpu_count(),
        "threads": workload.settings["threads"],
        "steps": steps,
        "warmup": warmup,
        "repeats": repeats,
        "examples_per_step": workload.sizes[warmup],
        "versions": versions() | ({"trl": metadata.version("trl")} if sizes else {}),
        **summarise(timed, workload.tokens[warmup:]),
    }
    report["raydiv"]["layout"] = layout
    if failed:
        report["failed"] = failed
    if recipe.cluster.use_gpu:
        report["mfu"] = statistics.median(share for turn in timed for share in turn["raydiv"].mfu)
    return report


def _require_numbers(steps: int, warmup: int, repeats: int) -> None:
    for name, number, least in (("steps", steps, 1), ("warmup", warmup, 0), ("repeats", repeats, 1)):
        if number < least:
            raise UserError(f"--{name}: {number}: must be {least} or more")


def _require_comparable(recipe: Recipe, against: Sequence[Baseline]) -> None:
    """Raise UserError for recipes that a baseline does not support."""
    if "trl" in against:
        trl_baseline.trl_loss_options(recipe.loss.model_dump(mode="json", by_alias=True))
        if importlib.util.find_spec("trl") is None:
            raise UserError("--against trl: TRL is not installed; run: pip install 'trl>=1.16' (the extra raydiv[trl])")
    if against and recipe.model.quantization is not None:
        raise UserError(
            f"--against {against[0]}: does not support model.quantization: the baselines load whole weights"
        )
    if against and recipe.loss.position.rule is not None:
        raise UserError(
            f"--against {against[0]}: does not support loss.position (now {recipe.loss.position.kind}): the baselines "
            "count every token 1"
        )
    if against and recipe.cluster.use_gpu and recipe.cluster.num_workers > 1:
        raise UserError(
            f"--against {against[0]}: runs on one GPU; set cluster.num_workers to 1 (now {recipe.cluster.num_workers})"
        )


def _take_turns(
    contestants: Mapping[str, Callable[[], Timing]], repeats: int, display: ProgressDisplay
) -> tuple[list[dict[str, Timing]], dict[str, str]]:
    """Timings of all contestants, ``repeats`` times in turn, and the error of each TRL size that failed (out of
    memory).
    """
    turns: list[dict[str, Timing]] = []
    failed: dict[str, str] = {}
    for number in range(repeats):
        turns.append({})
        with display.phase(f"turn {number + 1} of {repeats}") as update:
            for place, (name, run) in enumerate(contestants.items()):
                update(place, len(contestants), name)
                if name in failed:
                    continue
                try:
                    turns[-1][name] = run()
                except RuntimeError as error:
                    if not name.startswith(TRL_PREFIX):
                        raise
                    failed[name] = str(error)
        if failed and not any(name.startswith(TRL_PREFIX) for name in turns[-1]):
            raise RuntimeError("; ".join(failed.values()))
    return turns, failed


def _raydiv(recipe: Recipe, layout: dict[str, Any]) -> Timing:
    """Time a run of raydiv, and fill ``layout`` with its layout."""
    result, records = timed_run(recipe)
    layout |= result.report.get("layout", {})
    return Timing(
        [record["step_seconds"] for record in records],
        [record["tokens"] for record in records],
        max(record["peak_memory_bytes"] for record in records),
        [record["data_seconds"] for record in records],
        [record["mfu"] for record in records if "mfu" in record],
    )


def _script(workload: Workload, name: str, **settings: Any) -> Timing:
    return Timing(**workload.script(name, **settings))


def summarise(turns: Sequence[Mapping[str, Timing]], tokens: Sequence[int]) -> dict[str, Any]:
    """Medians of each contestant, and ratios of raydiv's numbers to the baselines', from the timed steps of every turn.

    ``tokens`` of each step exclude padding and are the same for all: a rate is the median of tokens/seconds over a
    turn's steps. ``tokens_seen`` is the fraction of them that a contestant counted itself. TRL's best size is the one
    with the highest rate. raydiv is better where the ratio of ``tokens_per_second`` is above 1, and that of
    ``peak_bytes`` below 1.
    """
    names = [name for name in turns[0] if all(name in turn for turn in turns)]
    timings_by_name = {name: [turn[name] for turn in turns] for name in names}
    figures = {name: _medians(timings, tokens) for name, timings in timings_by_name.items()}
    rates = {name: [_rate(timing, tokens) for timing in timings] for name, timings in timings_by_name.items()}
    peaks = {name: [timing.peak_bytes for timing in timings] for name, timings in timings_by_name.items()}
    ratios = {
        metric: {name: _ratio(values["raydiv"], values[name]) for name in names if name != "raydiv"}
        for metric, values in (("tokens_per_second", rates), ("peak_bytes", peaks))
    }
    summary: dict[str, Any] = {name: figures[name] for name in names if not name.startswith(TRL_PREFIX)}
    sizes = [name for name in names if name.startswith(TRL_PREFIX)]
    if sizes:
        best = max(sizes, key=lambda name: figures[name]["tokens_per_second"])
        summary["trl"] = {"best": best.removeprefix(TRL_PREFIX)} | {
            name.removeprefix(TRL_PREFIX): figures[name] for name in sizes
        }
        for by_name in ratios.values():
            by_name["trl_best"] = by_name[best]
    return summary | {"ratios": ratios}


def _medians(timings: Sequence[Timing], tokens: Sequence[int]) -> dict[str, Any]:
    """Medians over the turns of one contestant."""
    medians = {
        "step_seconds": statistics.median(statistics.median(timing.seconds) for timing in timings),
        "tokens_per_second": statistics.median(_rate(timing, tokens) for timing in timings),
        "peak_bytes": round(statistics.median(timing.peak_bytes for timing in timings)),
        "tokens_seen": sum(timings[0].tokens) / sum(tokens),
    }
    if timings[0].data_seconds:
        medians["data_seconds"] = statistics.median(statistics.median(timing.data_seconds) for timing in timings)
    return medians


def _rate(timing: Timing, tokens: Sequence[int]) -> float:
    return statistics.median(count / seconds for count, seconds in zip(tokens, timing.seconds, strict=True))


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The median of the ratios within each turn, and these ratios."""
    by_turn = [own / other for own, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(by_turn), "turns": by_turn}


def training_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_training`` returns."""
    header = ["", "step s", "data s", "tokens/s", "peak MB", "tokens/s ratio", "memory ratio"]
    return header, [
        (
            label,
            f"{row['step_seconds']:.3g}",
            f"{row['data_seconds']:.2g}" if "data_seconds" in row else "",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            *(f"{by_name[name]['median']:.2f}" if name in by_name else "" for by_name in report["ratios"].values()),
        )
        for name, label, row in _rows(report)
    ]


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name in the ratios, label, medians) of each contestant."""
    rows = [
        (name, label, report[name]) for name, label in (("raydiv", "raydiv"), ("loop", "plain loop")) if name in report
    ]
    sizes = {size: row for size, row in report.get("trl", {}).items() if size != "best"}
    return rows + [(f"{TRL_PREFIX}{size}", f"TRL at {size}", row) for size, row in sizes.items()]


def training_notes(report: Mapping[str, Any]) -> list[str]:
    """Lines below the table."""
    notes = [
        f"medians of {report['repeats']} turns of {report['steps']} steps; tokens exclude padding and include prompts; "
        "ratio: raydiv's value divided by the row's, within a turn"
        + ("; TRL at its per-device batches" if "trl" in report else "")
    ]
    layout = ", ".join(f"{name} {value}" for name, value in report["raydiv"]["layout"].items())
    notes += [f"raydiv's layout: {layout}"] if layout else []
    for _, label, row in _rows(report):
        if row["tokens_seen"] != 1:
            notes.append(f"{label}: trained on {row['tokens_seen']:.4f} of these tokens")
    if "mfu" in report:
        notes.append(f"model FLOPs utilisation: {report['mfu']:.1%} of what a large matrix product reaches on this GPU")
    return notes + [f"{name}: {reason}" for name, reason in report.get("failed", {}).items()]
