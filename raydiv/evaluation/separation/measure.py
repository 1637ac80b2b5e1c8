"""Separation of harmful from harmless prompts in the hidden states of models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from raydiv.config.cluster import Cluster
from raydiv.config.recipe import Separation as SeparationSection
from raydiv.data.prompt_sets import Prompt, named, read_prompts, sets_of
from raydiv.evaluation.contamination import trained_on
from raydiv.evaluation.models import sources_of
from raydiv.evaluation.separation.embed import Readout, drawn, embed
from raydiv.evaluation.separation.metrics import principal_plane, separation_of
from raydiv.evaluation.separation.moments import Streams
from raydiv.evaluation.separation.report import LayerReport, SeparationReport
from raydiv.evaluation.separation.store import EmbeddingFile
from raydiv.model.load import ModelSource
from raydiv.runs.progress import Display
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

TAKEN_IN = 256
"""Prompts whose states are added to streamed statistics together."""


def measure_separation(
    model: ModelSource,
    prompts: Sequence[Prompt],
    how: SeparationSection,
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
    layers = Readout.of(how).numbers(model.config().num_hidden_layers)
    kept = EmbeddingFile(keep, layers) if keep else nullcontext()
    with display.phase(f"separation, {label}") as update, kept as file:
        states = _States(prompts, how)
        rows = embed(model, prompts, cluster, Readout.of(how))
        while some := list(islice(rows, TAKEN_IN)):
            positions = [position for position, _, _ in some]
            hidden, lengths = np.stack([state for _, state, _ in some]), [length for _, _, length in some]
            states.add(positions, hidden, lengths)
            if file is not None:
                file.write([prompts[position] for position in positions], hidden, lengths)
            update(states.count, len(prompts))
    return states.report(layers, label=label, name=name)


class _States:
    """What is kept of the states of ``prompts`` as they are read."""

    def __init__(self, prompts: Sequence[Prompt], how: SeparationSection) -> None:
        self._prompts, self._how = prompts, how
        self._harmful = np.array([prompt.harmful for prompt in prompts])
        self._order = drawn(self._harmful, how.sample)
        self._sample: dict[int, tuple[np.ndarray, int]] = {}
        self._wanted = frozenset(self._order)
        self._streams = Streams() if len(self._order) < len(prompts) else None
        self.count = 0

    def add(self, positions: Sequence[int], hidden: np.ndarray, lengths: Sequence[int]) -> None:
        """Take in states [n, layers, d] and token lengths [n] of the prompts at ``positions``."""
        self.count += len(positions)
        if self._streams is not None:
            self._streams.add(hidden, self._harmful[positions], lengths)
        for position, state, length in zip(positions, hidden, lengths, strict=True):
            if position in self._wanted:
                self._sample[position] = (state.copy(), length)

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
        return SeparationReport(label, name, self.count, Readout.of(self._how), found, plane, kinds, harmful.tolist())


def separation(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    how: SeparationSection | None = None,
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
    display, cluster, how = display or Display(), cluster or Cluster(), how or SeparationSection()
    sources = sources_of(models, template, precision)
    asked = sets_of(prompts, harmful, harmless, default="bundled:anchors")
    # not by name: configurations of one published set are called the same
    sets = [(named(one), read_prompts(one, both=True)) for one in asked]
    _require_comparable(models, sources, Readout.of(how), different_models)
    files = _files(embeddings, len(models), len(sets))
    reports = []
    with ray_session(cluster):
        for m, (model, source) in enumerate(zip(models, sources, strict=True)):
            for s, (name, own) in enumerate(sets):
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
