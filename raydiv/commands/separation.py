"""``raydiv separation``: a report for each model and prompt set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raydiv.config.cluster import ClusterConfig
from raydiv.config.recipe import SeparationConfig as SeparationSection
from raydiv.data.prompt_sets import named, read_prompts, sets_of
from raydiv.evaluation.contamination import count_contaminated
from raydiv.evaluation.models import sources_of
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
    how: SeparationSection | None = None,
    embeddings: Path | None = None,
    different_models: bool = False,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: ClusterConfig | None = None,
    display: ProgressDisplay | None = None,
) -> list[SeparationReport]:
    """``raydiv separation``: a report per model and prompt set.

    ``prompts`` are sets with their labels; ``harmful`` and ``harmless`` sources without make one more set. Without any:
    bundled:anchors. States are kept as Parquet under ``embeddings``. Raises UserError for models of different hidden sizes,
    unless they are ``different_models``: a Frechet distance is in the units of its own model.
    """
    display, cluster, how = display or ProgressDisplay(), cluster or ClusterConfig(), how or SeparationSection()
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
                shared = count_contaminated(model, {name: own}, display)
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
        readout.layer_indices(config.num_hidden_layers)
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
