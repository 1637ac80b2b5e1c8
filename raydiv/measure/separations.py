"""Separation of harmful from harmless prompts in the hidden states of models, and what is reported of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydiv.config.recipe import Cluster
from raydiv.config.recipe import Separation as SeparationSection
from raydiv.data.prompts import Prompt, named, read_prompts, sets_of
from raydiv.errors import UserError
from raydiv.hidden.embed import Read, Readout, drawn, embed
from raydiv.hidden.moments import StreamedFigures, Streams
from raydiv.hidden.separation import Separation, as_row, explain, principal_plane, separation_of
from raydiv.hidden.store import EmbeddingFile
from raydiv.measure.models import sources_of
from raydiv.measure.overlap import trained_on
from raydiv.model.load import ModelSource
from raydiv.progress import Display
from raydiv.session import ray_session

FIGURES = {
    "d_b": "D_B, paper protocol",
    "silhouette": "silhouette, same plane",
    "d_b_full": "D_B, all dimensions, less chance",
    "frechet": "Frechet distance, squared",
    "probe_auc": "AUC of a linear probe, held out",
    "difference_auc": "AUC of the difference of means, held out",
}
"""Labels of raydiv.hidden.separation.Figures."""

TAKEN_IN = 256
"""Prompts whose states are added to streamed statistics together."""


@dataclass(frozen=True, slots=True)
class HowToSeparate:
    """What is read, and how much is asked of it.

    ``sample``: most prompts for figures that need all states at once; of a larger set that many are drawn, and of all of it
    there are streamed statistics. ``intervals``: for the last layer read, or for all.
    """

    readout: Readout = field(default_factory=Readout)
    sample: int = 1000
    intervals: Literal["last", "all"] = "last"

    @classmethod
    def of(cls, section: SeparationSection) -> HowToSeparate:
        return cls(Readout.of(section), section.sample)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Separation in one layer; ``streamed`` over all prompts where ``separation`` is of a sample of them."""

    layer: int
    separation: Separation
    streamed: StreamedFigures | None


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
    def separation(self) -> Separation:
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
        found, streamed = self.separation, self.layers[-1].streamed
        columns = (found.figures, found.matched, found.shuffled, *([] if streamed is None else [streamed]))
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
                *([] if streamed is None else [_shown(streamed.length_auc)]),
            )
        )
        which = "all prompts" if streamed is None else f"sample of {len(self.kinds)}"
        header = [self.model, which, "lengths matched", "labels shuffled"]
        return header + ([] if streamed is None else [f"all {self.count}, streamed"]), rows

    def layer_table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and a row per layer; empty rows where one layer was read."""
        header = ["layer", "D_B", "95%", "p", "matched", "shuffled", "D_B, all dim.", "matched", "probe AUC", "matched"]
        if len(self.layers) == 1:
            return header, []
        rows: list[tuple[str, ...]] = []
        for one in self.layers:
            found = one.separation
            figures, matched, interval = found.figures, found.matched, found.d_b_interval
            of_matched = [_shown(getattr(matched, name, None)) for name in ("d_b", "d_b_full", "probe_auc")]
            between = "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"
            in_plane = (_shown(figures.d_b), between, f"{found.d_b_p:.3f}", of_matched[0], _shown(found.shuffled.d_b))
            full = (_shown(figures.d_b_full), of_matched[1], _shown(figures.probe_auc), of_matched[2])
            rows.append((str(one.layer), *in_plane, *full))
        return header, rows

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        points = {"plane": self.plane.tolist(), "kinds": self.kinds, "harmful": self.harmful}
        (folder / f"{name}.json").write_text(json.dumps(self.as_json() | points, indent=1) + "\n")


def _figures_of(layer: LayerReport) -> dict[str, Any]:
    streamed = {} if layer.streamed is None else {"streamed": asdict(layer.streamed)}
    return asdict(layer.separation) | streamed


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def measure_separation(
    model: ModelSource,
    prompts: Sequence[Prompt],
    how: HowToSeparate,
    cluster: Cluster,
    display: Display,
    *,
    label: str,
    name: str,
    keep: Path | None = None,
) -> SeparationReport:
    """Separation of ``prompts`` in a model's hidden states; needs a Ray session.

    ``label`` and ``name`` are what the model and its prompts are called, ``keep`` a file for the states of all of them.
    """
    layers = how.readout.numbers(model.config().num_hidden_layers)
    kept = EmbeddingFile(keep, layers) if keep else nullcontext()
    with display.phase(f"separation, {label}") as update, kept as file:
        states = _States(prompts, how)
        rows = embed(model, prompts, cluster, how.readout)
        while some := list(islice(rows, TAKEN_IN)):
            states.add(some)
            if file is not None:
                file.write([prompts[position] for position, _, _ in some], *_columns(some))
            update(states.count, len(prompts))
    return states.report(layers, label=label, name=name)


class _States:
    """What is kept of the states of ``prompts`` as they are read."""

    def __init__(self, prompts: Sequence[Prompt], how: HowToSeparate) -> None:
        self._prompts, self._how = prompts, how
        self._harmful = np.array([prompt.harmful for prompt in prompts])
        self._order = drawn(len(prompts), how.sample)
        self._sample: dict[int, tuple[np.ndarray, int]] = {}
        self._wanted = frozenset(self._order)
        self._streams = Streams() if len(self._order) < len(prompts) else None
        self.count = 0

    def add(self, rows: Sequence[Read]) -> None:
        """Take in what was read of some prompts."""
        self.count += len(rows)
        if self._streams is not None:
            self._streams.add(
                _columns(rows)[0], self._harmful[[position for position, _, _ in rows]], _columns(rows)[1]
            )
        self._sample |= {position: (state, length) for position, state, length in rows if position in self._wanted}

    def report(self, layers: Sequence[int], *, label: str, name: str) -> SeparationReport:
        """Figures of all ``layers`` that were read."""
        points = np.stack([self._sample[position][0] for position in self._order]).astype(np.float64)
        lengths = np.array([self._sample[position][1] for position in self._order])
        harmful, last = self._harmful[self._order], len(layers) - 1
        found = []
        for at, layer in enumerate(layers):
            resampled = self._how.intervals == "all" or at == last
            apart = separation_of(points[:, at], harmful, lengths, resampled=resampled)
            found.append(LayerReport(layer, apart, None if self._streams is None else self._streams.figures(at)))
        kinds = [self._prompts[position].kind for position in self._order]
        plane = principal_plane(points[:, last])
        return SeparationReport(label, name, self.count, self._how.readout, found, plane, kinds, harmful.tolist())


def _columns(rows: Sequence[Read]) -> tuple[np.ndarray, list[int]]:
    """States [n, layers, d] and token lengths [n] of rows."""
    return np.stack([state for _, state, _ in rows]), [length for _, _, length in rows]


def separation(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    how: HowToSeparate | None = None,
    embeddings: Path | None = None,
    different_models: bool = False,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> list[SeparationReport]:
    """``raydiv separation``: a report per model and prompt set.

    ``prompts`` are sets with their labels; ``harmful`` and ``harmless`` sources without make one more set. Without any:
    bundled:anchors. States are kept as Parquet under ``embeddings``. Raises UserError for models of different hidden sizes,
    unless they are ``different_models``: a Frechet distance is in the units of its own model.
    """
    display, cluster, how = display or Display(), cluster or Cluster(), how or HowToSeparate()
    sources = sources_of(models, template, precision)
    sets = {
        named(one): read_prompts(one, both=True)
        for one in sets_of(prompts, harmful, harmless, default="bundled:anchors")
    }
    _require_comparable(models, sources, how.readout, different_models)
    files = _files(embeddings, len(models), len(sets))
    reports = []
    with ray_session(cluster):
        for m, (model, source) in enumerate(zip(models, sources, strict=True)):
            for s, (name, own) in enumerate(sets.items()):
                shared = trained_on(model, {name: own}, display)
                keep = files.get((m, s))
                found = measure_separation(source, own, how, cluster, display, label=model, name=name, keep=keep)
                reports.append(replace(found, overlap=shared))
    return reports


def _require_comparable(
    models: Sequence[str], sources: Sequence[ModelSource], readout: Readout, different_models: bool
) -> None:
    """Raises UserError for a layer that a model lacks, and for models that are not of one size unless they may be."""
    configs = [source.config() for source in sources]
    for config in configs:
        readout.numbers(config.num_hidden_layers)
    for model, config in zip(models, configs, strict=True):
        if config.hidden_size != configs[0].hidden_size and not different_models:
            raise UserError(
                f"{model}: its hidden size is {config.hidden_size}, and that of {models[0]} is {configs[0].hidden_size}: "
                "these are not runs of one model; --different-models compares them all the same"
            )


def _files(folder: Path | None, models: int, sets: int) -> dict[tuple[int, int], Path]:
    """The file that each model's states of each set go to. Raises UserError where one is there already."""
    if folder is None:
        return {}
    files = {(m, s): folder / f"model-{m}-prompts-{s}.parquet" for m in range(models) for s in range(sets)}
    for file in files.values():
        if file.exists():
            raise UserError(f"--embeddings: {file} is there already; name another folder")
    return files
