"""Readers of the measurements in a run directory: separation/WHEN.json and evaluation/WHEN.json (WHEN: before, after).

raydiv.evaluation writes these files. Keys that earlier versions did not write have a default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.utils.storage import read_json

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
        d_b = MeasuredValue(content["figures"]["d_b"], _interval(content.get("d_b_interval")))
        return cls(d_b, content["plane"], content["kinds"], content["harmful"], content.get("notes", []))


@dataclass(frozen=True, slots=True)
class AnswersFile:
    """One model's answers, judged: every value by metric name, and the notes, the judge's errors first."""

    values: Mapping[str, MeasuredValue]
    notes: Sequence[str]

    @classmethod
    def load(cls, path: Path) -> AnswersFile | None:
        """None where the run judged no answers."""
        return cls.of(read_json(path)) if path.exists() else None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> AnswersFile:
        """From the content of the file."""
        values = {
            name: MeasuredValue(rate["share"], _interval(rate["interval"]), rate["of"])
            for name, rate in content["rates"].items()
        }
        for key, entry in content.items():
            number = entry if isinstance(entry, Mapping) else {"value": entry}
            if isinstance(number.get("value"), int | float):
                interval = _interval(number.get("interval"))
                values[f"evaluate/{key}"] = MeasuredValue(number["value"], interval, number.get("of"))
        for name, score in content.get("capability", {}).items():
            values[name] = MeasuredValue(score["value"], _interval(score["interval"]), score["documents"])
        return cls(values, [content["judge"]["errors"], *content.get("notes", [])])


def _interval(ends: Any) -> Interval | None:
    return (ends[0], ends[1]) if ends else None
