"""Separation of harmful from harmless prompts in the hidden states of models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np

from raydiv.config.cluster import ClusterConfig
from raydiv.config.recipe import SeparationConfig
from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.separation.embed import Readout, distinct_prompts, embed, sample_prompts
from raydiv.evaluation.separation.metrics import principal_plane, separation_metrics
from raydiv.evaluation.separation.moments import StreamedMoments
from raydiv.evaluation.separation.report import LayerReport, SeparationReport
from raydiv.evaluation.separation.store import EmbeddingFile
from raydiv.model.load import ModelSource
from raydiv.runs.progress import ProgressDisplay

CHUNK_PROMPTS = 256
"""Prompts whose states are added to the streamed statistics at a time."""


def measure_separation(
    model: ModelSource,
    prompts: Sequence[Prompt],
    config: SeparationConfig,
    cluster: ClusterConfig,
    display: ProgressDisplay,
    *,
    label: str,
    name: str,
    states_file: Path | None = None,
) -> SeparationReport:
    """Separation of ``prompts`` in a model's hidden states; needs a Ray session.

    A repeated prompt is measured once. ``label`` names the model and ``name`` the prompts; all states are written to
    ``states_file`` where it is given.
    """
    layers = Readout.from_config(config).layer_indices(model.config().num_hidden_layers)
    given, prompts = len(prompts), distinct_prompts(prompts)
    writer = EmbeddingFile(states_file, layers) if states_file else nullcontext()
    with display.phase(f"separation, {label}") as update, writer as file:
        states = _StateCollector(prompts, config)
        rows = embed(model, prompts, cluster, Readout.from_config(config))
        while chunk := list(islice(rows, CHUNK_PROMPTS)):
            positions = [position for position, _, _ in chunk]
            hidden, lengths = np.stack([state for _, state, _ in chunk]), [length for _, _, length in chunk]
            states.add(positions, hidden, lengths)
            if file is not None:
                file.write([prompts[position] for position in positions], hidden, lengths)
            update(states.count, len(prompts))
    return states.report(layers, label=label, name=name, repeated=given - len(prompts))


class _StateCollector:
    """Collects the states of a sample of ``prompts``, and streamed moments of all of them."""

    def __init__(self, prompts: Sequence[Prompt], config: SeparationConfig) -> None:
        self._prompts, self._config = prompts, config
        self._harmful = np.array([prompt.harmful for prompt in prompts])
        self._order = sample_prompts(self._harmful, config.sample)
        self._sample: dict[int, tuple[np.ndarray, int]] = {}
        self._sampled = frozenset(self._order)
        self._streams = StreamedMoments() if len(self._order) < len(prompts) else None
        self.count = 0

    def add(self, positions: Sequence[int], hidden: np.ndarray, lengths: Sequence[int]) -> None:
        """Add states [n, layers, d] and token lengths [n] of the prompts at ``positions``."""
        self.count += len(positions)
        if self._streams is not None:
            self._streams.add(hidden, self._harmful[positions], lengths)
        for position, state, length in zip(positions, hidden, lengths, strict=True):
            if position in self._sampled:
                self._sample[position] = (state.copy(), length)

    def report(self, layers: Sequence[int], *, label: str, name: str, repeated: int) -> SeparationReport:
        """The report on ``layers``."""
        points = np.stack([self._sample[position][0] for position in self._order]).astype(np.float64)
        lengths = np.array([self._sample[position][1] for position in self._order])
        harmful, last = self._harmful[self._order], len(layers) - 1
        reports = []
        for index, layer in enumerate(layers):
            resampled = self._config.intervals == "all" or index == last
            metrics = separation_metrics(points[:, index], harmful, lengths, resampled=resampled)
            reports.append(
                LayerReport(layer, metrics, None if self._streams is None else self._streams.statistics(index))
            )
        kinds = [self._prompts[position].kind for position in self._order]
        plane = principal_plane(points[:, last])
        readout = Readout.from_config(self._config)
        return SeparationReport(label, name, self.count, repeated, readout, reports, plane, kinds, harmful.tolist())
