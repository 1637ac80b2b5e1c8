"""What is reported of the separation of one model: for files, metrics and tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raydiv.evaluation.separation.embed import Readout
from raydiv.evaluation.separation.metrics import SeparationMetrics, as_row, explain
from raydiv.evaluation.separation.moments import StreamedSeparation

FIGURES = {
    "d_b": "D_B, paper protocol",
    "silhouette": "silhouette, same plane",
    "d_b_full": "D_B, all dimensions, less chance",
    "frechet": "Frechet distance, squared",
    "probe_auc": "AUC of a linear probe, held out",
    "difference_auc": "AUC of the difference of means, held out",
}
"""Labels of raydiv.evaluation.separation.metrics.SeparationStatistics."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Separation in one layer; ``streamed`` over all prompts where ``separation`` is of a sample of them."""

    layer: int
    separation: SeparationMetrics
    streamed: StreamedSeparation | None

    def row(self, interval: bool) -> tuple[str, ...]:
        """Of a table of layers: D_B in the plane and in all dimensions and the probe's AUC, each with its controls."""
        found, low_high = self.separation, self.separation.d_b_interval
        between = [f"{low_high[0]:.2f}-{low_high[1]:.2f}"] if interval and low_high else []
        matched = [_shown(getattr(found.matched, name, None)) for name in ("d_b", "d_b_full", "probe_auc")]
        in_plane = [_shown(found.figures.d_b), *between, f"{found.d_b_p:.3f}", matched[0], _shown(found.shuffled.d_b)]
        full = [_shown(found.figures.d_b_full), matched[1], _shown(found.figures.probe_auc), matched[2]]
        return (str(self.layer), *in_plane, *full)


@dataclass(frozen=True, slots=True)
class SeparationReport:
    """Separation of one model in each layer read, the headline last, with its plane [n, 2], kinds and labels of prompts."""

    model: str
    prompts: str
    count: int
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
        return as_row(self.separation)

    def notes(self) -> list[str]:
        """What the controls say, and what was measured of how many, in words."""
        words = [*self.overlap, *explain(self.separation)]
        if self.layers[-1].streamed is not None:
            words.insert(
                0, f"of {self.count} prompts a sample of {len(self.kinds)}; streamed figures are of all of them"
            )
        return words

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``."""
        last = self.layers[-1]
        layers = [{"layer": one.layer, **_figures_of(one)} for one in self.layers]
        return {
            "model": self.model,
            "prompts": self.prompts,
            "count": self.count,
            "sampled": len(self.kinds),
            "protocol": "paper" if (self.readout.pooling, self.readout.layers) == ("last", (-1,)) else "other",
            "pooling": self.readout.pooling,
            "layer": last.layer,
            **_figures_of(last),
            **({"layers": layers} if len(layers) > 1 else {}),
            "notes": self.notes(),
        }

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and a row per figure of the last layer: of all prompts, of the length-matched ones, and by chance."""
        found, last = self.separation, self.layers[-1]
        streamed = [] if last.streamed is None else [last.streamed]
        columns = (found.figures, found.matched, found.shuffled, *streamed)
        rows = [(label, *(_shown(getattr(one, name, None)) for one in columns)) for name, label in FIGURES.items()]
        low_high = found.d_b_interval
        interval = "-" if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}"
        empty = [""] * (len(columns) - 1)
        rows.insert(1, ("  its 95% interval", interval, *empty))
        rows.insert(2, ("  its permutation p", f"{found.d_b_p:.3f}", *empty))
        rows.append(
            (
                "AUC of token length alone",
                _shown(found.length_auc),
                _shown(0.5) if found.matched else "-",
                "",
                *(_shown(one.length_auc) for one in streamed),
            )
        )
        which = f"sample of {len(self.kinds)}" if streamed else "all prompts"
        header = [f"layer {last.layer}", which, "lengths matched", "labels shuffled"]
        return [*header, *(f"all {self.count}, streamed" for _ in streamed)], rows

    def layer_table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and a row per layer, with intervals where every layer has one; no rows where one layer was read."""
        intervals = all(one.separation.d_b_interval for one in self.layers)
        header = ["layer", "D_B", *(["95%"] if intervals else []), "p", "matched", "shuffled"]
        header += ["full D_B", "matched", "probe AUC", "matched"]
        return header, [one.row(intervals) for one in self.layers] if len(self.layers) > 1 else []

    def files(self, name: str) -> dict[str, str]:
        """The figures, with the plane and what lies in it."""
        points = {"plane": self.plane.tolist(), "kinds": self.kinds, "harmful": self.harmful}
        return {f"{name}.json": json.dumps(self.as_json() | points, indent=1) + "\n"}


def _figures_of(layer: LayerReport) -> dict[str, Any]:
    streamed = {} if layer.streamed is None else {"streamed": asdict(layer.streamed)}
    return asdict(layer.separation) | streamed


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
