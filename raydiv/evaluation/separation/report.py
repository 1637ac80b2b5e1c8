"""The report of the separation of one model: files, metrics and tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from raydiv.evaluation.separation.embed import Readout
from raydiv.evaluation.separation.metrics import (
    SeparationMetrics,
    SeparationStatistics,
    control_notes,
    metric_values,
    p_of_all_layers,
)
from raydiv.evaluation.separation.moments import StreamedSeparation
from raydiv.runs.metric_registry import METRICS


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Separation in one layer. ``streamed`` covers all prompts where ``separation`` covers a sample of them."""

    layer: int
    separation: SeparationMetrics
    streamed: StreamedSeparation | None

    def row(self, with_interval: bool, p_of_all: float) -> tuple[str, ...]:
        """A row of the table of layers: the probe's AUC, the Mahalanobis distance and D_B, with their controls."""
        result = self.separation
        cells = [str(self.layer)]
        for name in ("probe_auc", "mahalanobis", "d_b"):
            cells += [_text(name, result.figures), _text(name, result.matched), _text(name, result.subset)]
        cells += [_text("d_b", result.shuffled)]
        cells += [_interval("d_b", result.d_b_interval, "-")] if with_interval else []
        return (*cells, f"{result.d_b_p:.3f}", f"{p_of_all:.3f}")

    def as_json(self) -> dict[str, Any]:
        return self.separation.as_json() | ({} if self.streamed is None else {"streamed": asdict(self.streamed)})


@dataclass(frozen=True, slots=True)
class SeparationReport:
    """Separation of one model in each layer read; the last of ``layers`` is the one reported.

    ``count`` is the number of prompts, without ``repeated`` ones; ``plane`` [n, 2], ``kinds`` and the labels
    ``harmful`` may cover a sample.
    """

    model: str
    prompts: str
    count: int
    repeated: int
    readout: Readout
    layers: list[LayerReport]
    plane: np.ndarray
    kinds: list[str]
    harmful: list[bool]
    overlap: list[str] = field(default_factory=list)

    @property
    def separation(self) -> SeparationMetrics:
        return self.layers[-1].separation

    def metrics(self) -> dict[str, float]:
        return metric_values(self.separation)

    def notes(self) -> list[str]:
        """The size of a sample, repeated prompts, training prompts among these prompts, and what the controls show."""
        sampled = self.layers[-1].streamed is not None
        size = f"a sample of {len(self.kinds)} of {self.count} prompts; streamed figures cover all of them"
        repeated = f"{self.repeated} of {self.count + self.repeated} prompts repeat others, and are not measured again"
        return [
            *([size] if sampled else []),
            *([repeated] if self.repeated else []),
            *self.overlap,
            *control_notes(self.separation),
        ]

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``."""
        last = self.layers[-1]
        layers = []
        if len(self.layers) > 1:
            layers = [
                {"layer": layer.layer, **layer.as_json(), "d_b_p_all_layers": p}
                for layer, p in zip(self.layers, self._p_of_all_layers(), strict=True)
            ]
        return {
            "model": self.model,
            "prompts": self.prompts,
            "count": self.count,
            "repeated": self.repeated,
            "sampled": len(self.kinds),
            "protocol": "paper" if (self.readout.pooling, self.readout.layers) == ("last", (-1,)) else "other",
            "pooling": self.readout.pooling,
            "layer": last.layer,
            **last.as_json(),
            **({"layers": layers} if layers else {}),
            "notes": self.notes(),
        }

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and a row per statistic of the last layer.

        Columns: all prompts, those of matched lengths, as many at random, shuffled labels, all prompts streamed.
        """
        result, last = self.separation, self.layers[-1]
        streamed = [] if last.streamed is None else [last.streamed]
        columns = (result.figures, result.matched, result.subset, result.shuffled, *streamed)
        below = {
            "mahalanobis": [
                ("  its 95% interval", _interval("mahalanobis", result.mahalanobis_interval, " to ")),
            ],
            "d_b": [
                ("  its 95% interval", _interval("d_b", result.d_b_interval, " to ")),
                ("  its permutation p", f"{result.d_b_p:.3f}"),
            ],
        }
        rows: list[tuple[str, ...]] = []
        for statistic in fields(SeparationStatistics):
            rows.append((_label(statistic.name), *(_text(statistic.name, column) for column in columns)))
            rows += [(*row, *[""] * (len(columns) - 1)) for row in below.get(statistic.name, [])]
        matched_auc = "0.50" if result.matched else "-"
        aucs = [_text("length_auc", result), matched_auc, "", "", *(_text("length_auc", column) for column in streamed)]
        rows.append((_label("length_auc"), *aucs))
        first = f"sample of {len(self.kinds)}" if streamed else "all prompts"
        header = [f"layer {last.layer}", first, "lengths matched", "as many at random", "labels shuffled"]
        return [*header, *(f"all {self.count}, streamed" for _ in streamed)], rows

    def layer_table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and a row per layer, with intervals where every layer has one; no rows where one layer was read."""
        intervals = all(layer.separation.d_b_interval for layer in self.layers)
        header = ["layer"]
        for heading in ("probe AUC", "Mahalanobis", "D_B"):
            header += [heading, "matched", "random"]
        header += ["shuffled", *(["95%"] if intervals else []), "p", "p, all layers"]
        if len(self.layers) < 2:
            return header, []
        pairs = zip(self.layers, self._p_of_all_layers(), strict=True)
        return header, [layer.row(intervals, p) for layer, p in pairs]

    def _p_of_all_layers(self) -> list[float]:
        return p_of_all_layers([layer.separation for layer in self.layers])

    def files(self, name: str) -> dict[str, str]:
        """The file with the statistics and the plane, by file name."""
        points = {"plane": self.plane.tolist(), "kinds": self.kinds, "harmful": self.harmful}
        return {f"{name}.json": json.dumps(self.as_json() | points, indent=1) + "\n"}


def _label(name: str) -> str:
    return METRICS[f"separation/{name}"].row_label


def _text(name: str, statistics: object) -> str:
    """The statistic of this name; a dash where it was not measured."""
    value = getattr(statistics, name, None)
    return "-" if value is None else METRICS[f"separation/{name}"].text(value)


def _interval(name: str, interval: tuple[float, float] | None, between: str) -> str:
    return METRICS[f"separation/{name}"].range_text(interval, between) or "-"
