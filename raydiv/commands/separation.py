"""``raydiv separation``: how far models separate safe and harmful prompts; a report for each model and prompt set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raydiv.config.cluster import ClusterConfig
from raydiv.config.recipe import SeparationConfig
from raydiv.data.prompt_sets import prompt_sets_of, read_prompts, set_name
from raydiv.evaluation.contamination import count_contaminated
from raydiv.evaluation.models import resolve_models
from raydiv.evaluation.separation.embed import Readout
from raydiv.evaluation.separation.measure import measure_separation
from raydiv.evaluation.separation.report import SeparationReport
from raydiv.model.load import ModelSource
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError


def separation(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    config: SeparationConfig | None = None,
    embeddings: Path | None = None,
    different_models: bool = False,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: ClusterConfig | None = None,
    display: ProgressDisplay | None = None,
) -> list[SeparationReport]:
    """Measure separation; returns a report per model and prompt set.

    ``prompts`` are labelled sets; the unlabelled sources ``harmful`` and ``harmless`` make one more set; by default
    bundled:anchors. Hidden states are written as Parquet into the folder ``embeddings``. Raises UserError for models of
    different hidden sizes unless ``different_models``, since a Frechet distance is in the units of its own model.
    """
    display, cluster, config = display or ProgressDisplay(), cluster or ClusterConfig(), config or SeparationConfig()
    sources = resolve_models(models, template, precision)
    sources_of_sets = prompt_sets_of(prompts, harmful, harmless, default="bundled:anchors")
    # a list, since configurations of one published set have the same name
    sets = [(set_name(set_sources), read_prompts(set_sources, both=True)) for set_sources in sources_of_sets]
    _require_comparable(models, sources, Readout.from_config(config), different_models)
    files = _state_files(embeddings, len(models), len(sets))
    reports = []
    with ray_session(cluster):
        for m, (model, source) in enumerate(zip(models, sources, strict=True)):
            for s, (name, set_prompts) in enumerate(sets):
                overlap = count_contaminated(model, {name: set_prompts}, display)
                file = files.get((m, s))
                report = measure_separation(
                    source, set_prompts, config, cluster, display, label=model, name=name, states_file=file
                )
                reports.append(replace(report, overlap=overlap))
    return reports


def _require_comparable(
    models: Sequence[str], sources: Sequence[ModelSource], readout: Readout, different_models: bool
) -> None:
    """Raise UserError for a layer that a model lacks, and for different hidden sizes unless ``different_models``."""
    configs = [source.config() for source in sources]
    for config in configs:
        readout.layer_indices(config.num_hidden_layers)
    for model, config in zip(models, configs, strict=True):
        if config.hidden_size != configs[0].hidden_size and not different_models:
            raise UserError(
                f"{model}: hidden size {config.hidden_size}, but {models[0]} has {configs[0].hidden_size}, so these "
                "are different models; compare them with --different-models"
            )


def _state_files(folder: Path | None, models: int, sets: int) -> dict[tuple[int, int], Path]:
    """The file for the states of each model and set, by their numbers. Raises UserError where one exists already."""
    if folder is None:
        return {}
    files = {(m, s): folder / f"model-{m}-prompts-{s}.parquet" for m in range(models) for s in range(sets)}
    for file in files.values():
        if file.exists():
            raise UserError(f"--embeddings: {file} exists already; name another folder")
    return files
