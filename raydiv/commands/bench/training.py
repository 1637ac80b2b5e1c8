"""``raydiv bench``: how fast this machine trains with a recipe, beside a plain loop and beside TRL.

Machines are noisy, so all take turns: raydiv, its rivals, and again. What is said of a rate or a size is its median over
the turns; a ratio is taken within a turn, where both saw the same machine, and is the median of these.
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

from raydiv.commands.bench import trl_baseline as rival
from raydiv.commands.bench.harness import Workload, real_run, steps_alone, workload_of
from raydiv.config import Recipe
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError
from raydiv.utils.versions import versions

Baseline = Literal["loop", "trl"]


@dataclass(frozen=True, slots=True)
class Timing:
    """A turn of one: seconds and tokens of each step, peak memory.

    Of raydiv also how long each step waited for its data, and on GPUs what of their arithmetic it took.
    """

    seconds: list[float]
    tokens: list[int]
    peak_bytes: float
    data_seconds: list[float] = field(default_factory=list)
    mfu: list[float] = field(default_factory=list)

    def after(self, warmup: int) -> Timing:
        """The turn without its first steps."""
        return Timing(
            self.seconds[warmup:],
            self.tokens[warmup:],
            self.peak_bytes,
            self.data_seconds[warmup:],
            self.mfu[warmup:],
        )


TRL = "trl_"
"""What a turn calls TRL, before its per-device batch."""


def bench_training(
    recipe: Recipe,
    against: Sequence[Baseline] = ("loop",),
    steps: int = 6,
    warmup: int = 2,
    repeats: int = 3,
    display: ProgressDisplay | None = None,
) -> dict[str, Any]:
    """Time ``steps`` updates of the recipe after ``warmup``, ``repeats`` times in turn with what it is compared with.

    ``loop``: the same examples and update in plain PyTorch, micro-batched as well as can be, without Ray or DeepSpeed: what
    the hardware allows. ``trl``: TRL's trainer on the same model, examples, order, lengths and global batch, at each
    per-device batch of 1, 2, 4 and 8 that divides it.

    Returns ``step_seconds``, ``tokens_per_second`` (real tokens: each example once, prompt included) and ``peak_bytes`` (of
    the process that trains) of each; raydiv's ``data_seconds`` (what of a step it waited for data) and ``layout``; which
    size is TRL's ``best``; ``ratios`` of raydiv's figures to the others'; on a GPU ``mfu``.

    Raises UserError for what cannot be compared, before anything is timed.
    """
    _require_numbers(steps, warmup, repeats)
    _require_comparable(recipe, against)
    display = display or ProgressDisplay()
    recipe = steps_alone(recipe, warmup + steps)
    work = workload_of(recipe, warmup + steps, display)
    sizes = rival.per_device_sizes(work.settings["loss"], work.settings["steps"]) if "trl" in against else []
    layout: dict[str, Any] = {}
    contestants: dict[str, Callable[[], Timing]] = {"raydiv": partial(_raydiv, recipe, layout)}
    if "loop" in against:
        contestants["loop"] = partial(_script, work, "loop_baseline")
    contestants |= {f"{TRL}{size}": partial(_script, work, "trl_baseline", per_device=size) for size in sizes}
    turns, failed = _take_turns(contestants, repeats, display)
    timed = [{name: timing.after(warmup) for name, timing in turn.items()} for turn in turns]
    found = {
        "cpus": os.cpu_count(),
        "threads": work.settings["threads"],
        "steps": steps,
        "warmup": warmup,
        "repeats": repeats,
        "examples_per_step": work.sizes[warmup],
        "versions": versions() | ({"trl": metadata.version("trl")} if sizes else {}),
        **summarise(timed, work.tokens[warmup:]),
    }
    found["raydiv"]["layout"] = layout
    if failed:
        found["failed"] = failed
    if recipe.cluster.use_gpu:
        found["mfu"] = statistics.median(share for turn in timed for share in turn["raydiv"].mfu)
    return found


def _require_numbers(steps: int, warmup: int, repeats: int) -> None:
    for name, number, least in (("steps", steps, 1), ("warmup", warmup, 0), ("repeats", repeats, 1)):
        if number < least:
            raise UserError(f"--{name}: {number}: must be {least} or more")


def _require_comparable(recipe: Recipe, against: Sequence[Baseline]) -> None:
    """Refuse comparisons that would be none."""
    if "trl" in against:
        rival.counterpart(recipe.loss.model_dump(mode="json", by_alias=True))
        if importlib.util.find_spec("trl") is None:
            raise UserError("--against trl: TRL is not installed; run: pip install 'trl>=1.16' (the extra raydiv[trl])")
    if against and recipe.model.quantization is not None:
        raise UserError(f"--against {against[0]}: does not apply to model.quantization: the others load whole weights")
    if against and recipe.cluster.use_gpu and recipe.cluster.num_workers > 1:
        raise UserError(
            f"--against {against[0]}: runs on one GPU, and cluster.num_workers is {recipe.cluster.num_workers}; set it to 1"
        )


def _take_turns(
    contestants: Mapping[str, Callable[[], Timing]], repeats: int, display: ProgressDisplay
) -> tuple[list[dict[str, Timing]], dict[str, str]]:
    """All of them in turn, ``repeats`` times; and the sizes of TRL that failed, with the reason: memory has an end."""
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
                    if not name.startswith(TRL):
                        raise
                    failed[name] = str(error)
        if failed and not any(name.startswith(TRL) for name in turns[-1]):
            raise RuntimeError("; ".join(failed.values()))
    return turns, failed


def _raydiv(recipe: Recipe, layout: dict[str, Any]) -> Timing:
    """A run; ``layout`` is told how it laid the work out."""
    result, records = real_run(recipe)
    layout |= result.report.get("layout", {})
    return Timing(
        [record["step_seconds"] for record in records],
        [record["tokens"] for record in records],
        max(record["peak_memory_bytes"] for record in records),
        [record["data_seconds"] for record in records],
        [record["mfu"] for record in records if "mfu" in record],
    )


def _script(work: Workload, name: str, **settings: Any) -> Timing:
    return Timing(**work.script(name, **settings))


def summarise(turns: Sequence[Mapping[str, Timing]], tokens: Sequence[int]) -> dict[str, Any]:
    """Figures of each, and ratios of raydiv's to the others', from the timed steps of every turn.

    ``tokens`` are the real ones of each step, the same for all: a rate is the median over a turn's steps of tokens by seconds.
    ``tokens_seen`` is what each counted itself, as a share of them. TRL's best is the size with the highest rate. In favour of
    raydiv are ratios above 1 of ``tokens_per_second`` and below 1 of ``peak_bytes``.
    """
    names = [name for name in turns[0] if all(name in turn for turn in turns)]
    own = {name: [turn[name] for turn in turns] for name in names}
    figures = {name: _figures(timings, tokens) for name, timings in own.items()}
    rates = {name: [_rate(timing, tokens) for timing in timings] for name, timings in own.items()}
    peaks = {name: [timing.peak_bytes for timing in timings] for name, timings in own.items()}
    ratios = {
        what: {name: _ratio(values["raydiv"], values[name]) for name in names if name != "raydiv"}
        for what, values in (("tokens_per_second", rates), ("peak_bytes", peaks))
    }
    found: dict[str, Any] = {name: figures[name] for name in names if not name.startswith(TRL)}
    sizes = [name for name in names if name.startswith(TRL)]
    if sizes:
        best = max(sizes, key=lambda name: figures[name]["tokens_per_second"])
        found["trl"] = {"best": best.removeprefix(TRL)} | {name.removeprefix(TRL): figures[name] for name in sizes}
        for by_name in ratios.values():
            by_name["trl_best"] = by_name[best]
    return found | {"ratios": ratios}


def _figures(timings: Sequence[Timing], tokens: Sequence[int]) -> dict[str, Any]:
    """Medians over the turns of one."""
    found = {
        "step_seconds": statistics.median(statistics.median(timing.seconds) for timing in timings),
        "tokens_per_second": statistics.median(_rate(timing, tokens) for timing in timings),
        "peak_bytes": round(statistics.median(timing.peak_bytes for timing in timings)),
        "tokens_seen": sum(timings[0].tokens) / sum(tokens),
    }
    if timings[0].data_seconds:
        found["data_seconds"] = statistics.median(statistics.median(timing.data_seconds) for timing in timings)
    return found


def _rate(timing: Timing, tokens: Sequence[int]) -> float:
    return statistics.median(count / seconds for count, seconds in zip(tokens, timing.seconds, strict=True))


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Of each turn by itself."""
    by_turn = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(by_turn), "turns": by_turn}


def training_table(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_training`` returns."""
    header = ["", "step s", "data s", "tokens/s", "peak MB", "tokens/s ratio", "memory ratio"]
    return header, [
        (
            label,
            f"{one['step_seconds']:.3g}",
            f"{one['data_seconds']:.2g}" if "data_seconds" in one else "",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['peak_bytes'] / 2**20:,.0f}",
            *(f"{by_name[name]['median']:.2f}" if name in by_name else "" for by_name in found["ratios"].values()),
        )
        for name, label, one in _rows(found)
    ]


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name in the ratios, label, figures) of each."""
    own = [
        (name, label, found[name]) for name, label in (("raydiv", "raydiv"), ("loop", "plain loop")) if name in found
    ]
    sizes = {size: one for size, one in found.get("trl", {}).items() if size != "best"}
    return own + [(f"{TRL}{size}", f"TRL at {size}", one) for size, one in sizes.items()]


def training_notes(found: Mapping[str, Any]) -> list[str]:
    """What the table has no room for."""
    notes = [
        f"medians of {found['repeats']} turns of {found['steps']} steps; tokens: real ones, prompts included; "
        "ratio: raydiv's figure by the row's, within a turn"
        + ("; TRL at its per-device batches" if "trl" in found else "")
    ]
    laid_out = ", ".join(f"{name} {value}" for name, value in found["raydiv"]["layout"].items())
    notes += [f"raydiv's layout: {laid_out}"] if laid_out else []
    for _, label, one in _rows(found):
        if one["tokens_seen"] != 1:
            notes.append(f"{label}: trained on {one['tokens_seen']:.4f} of these tokens")
    if "mfu" in found:
        notes.append(f"model FLOPs utilisation: {found['mfu']:.1%} of what a large matrix product reaches on this GPU")
    return notes + [f"{name}: {reason}" for name, reason in found.get("failed", {}).items()]
