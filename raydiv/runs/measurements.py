"""Readers of the measurements in a run directory: separation/WHEN.json and evaluation/WHEN.json (WHEN: before, after).

raydiv.evaluation writes these files. Keys that earlier versions did not write have a default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from raydiv.utils.storage import intact, read_json

Interval = tuple[float, float]
"""95%."""


@dataclass(frozen=True, slots=True)
class MeasuredValue:
    """A value, its interval where it has one, and the number of prompts or documents of a rate."""

    value: float
    interval: Interval | None = None
    of: int | None = None


@dataclass(frozen=True, slots=True)
class SeparationFile:
    """Separation of one model: D_B, the plane of the prompts [n, 2] with their kinds and labels, and notes."""

    d_b: MeasuredValue
    plane: Sequence[Sequence[float]]
    kinds: Sequence[str]
    harmful: Sequence[bool]
    notes: Sequence[str]

    @classmethod
    def load(cls, path: Path) -> SeparationFile | None:
        """None where the run did not measure separation."""
        if not path.exists():
            return None
        content = read_json(path)
        with intact(path):
            d_b = MeasuredValue(float(content["figures"]["d_b"]), _interval(content.get("d_b_interval")))
            plane = [(float(x), float(y)) for x, y in content["plane"]]
            kinds, harmful = [str(kind) for kind in content["kinds"]], [bool(value) for value in content["harmful"]]
            if not len(plane) == len(kinds) == len(harmful):
                raise ValueError("plane, kinds and harmful differ in length")
            return cls(d_b, plane, kinds, harmful, _notes(content))


@dataclass(frozen=True, slots=True)
class AnswersFile:
    """One model's answers, judged: every value by metric name, and the notes, the judges' errors first."""

    values: Mapping[str, MeasuredValue]
    notes: Sequence[str]

    @classmethod
    def load(cls, path: Path) -> AnswersFile | None:
        """None where the run judged no answers."""
        if not path.exists():
            return None
        content = read_json(path)
        with intact(path):
            return cls.of(content)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> AnswersFile:
        """From the content of the file."""
        values = {
            name: MeasuredValue(float(rate["share"]), _interval(rate["interval"]), int(rate["of"]))
            for name, rate in content["rates"].items()
        }
        for key, entry in content.items():
            number = entry if isinstance(entry, Mapping) else {"value": entry}
            if isinstance(number.get("value"), int | float):
                interval = _interval(number.get("interval"))
                values[f"evaluate/{key}"] = MeasuredValue(number["value"], interval, number.get("of"))
        if content.get("kl"):
            values["evaluate/kl_per_token"] = MeasuredValue(float(content["kl"]["per_token"]))
            depth = content["kl"].get("depth") or {}
            if depth.get("half"):
                values["evaluate/depth/half"] = MeasuredValue(depth["half"], _interval(depth["half_interval"]))
        for name, score in content.get("capability", {}).items():
            values[name] = MeasuredValue(float(score["value"]), _interval(score["interval"]), int(score["documents"]))
        for judge, agreement in content.get("agreement", {}).items():
            if agreement["kappa"] is not None:
                interval = _interval(agreement["interval"])
                values[f"evaluate/kappa/{judge}"] = MeasuredValue(agreement["kappa"], interval, agreement["of"])
        for name, rate in content.get("calibrated", {}).items():
            values[_calibrated(name)] = MeasuredValue(
                float(rate["share"]), _interval(rate["interval"]), rate["labelled"]
            )
        # earlier versions had one judge
        judges = content["judges"] if "judges" in content else [content["judge"]]
        return cls(values, [*(str(judge["errors"]) for judge in judges), *_notes(content)])


@dataclass(frozen=True, slots=True)
class DepthFile:
    """Curves by name, each of values and half widths [t] in nats, and the position of its half (None: it has none)."""

    curves: Mapping[str, tuple[Sequence[float], Sequence[float], int | None]]

    @classmethod
    def load(cls, path: Path) -> DepthFile | None:
        """From a file of evaluation/: depth.json, or the KL of after.json. None where it was not measured."""
        if not path.exists():
            return None
        content = read_json(path)
        with intact(path):
            if "kl" in content:
                content = {"kl": (content["kl"] or {}).get("depth")}
            return cls(
                {
                    name: (
                        [float(value) for value in curve["values"]],
                        [float(width) for width in curve["half_widths"]],
                        None if curve["half"] is None else int(curve["half"]),
                    )
                    for name, curve in content.items()
                    if curve
                }
            )


def readable_prompt(prompt: str | Sequence[Mapping[str, Any]], between: str = "\n") -> str:
    """A prompt of an answers file as people read it: of a conversation, each turn under its role."""
    if isinstance(prompt, str):
        return prompt
    return between.join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def rewards_by_class(path: Path) -> dict[str, list[float]]:
    """Finite rewards of held-out examples by class, as training wrote them last; none where it measured none."""
    if not path.exists():
        return {}
    content = read_json(path)
    with intact(path):
        return {name: [float(value) for value in content[name] if isfinite(value)] for name in ("aligned", "unaligned")}


def _calibrated(metric: str) -> str:
    """The name of a rate that labels correct: evaluate/asr_calibrated/ATTACK for evaluate/asr/ATTACK."""
    group, rate, *attack = metric.split("/", 2)
    return "/".join([group, f"{rate}_calibrated", *attack])


def _notes(content: Mapping[str, Any]) -> list[str]:
    return [str(note) for note in content.get("notes", [])]


def _interval(ends: Any) -> Interval | None:
    return (float(ends[0]), float(ends[1])) if ends else None
