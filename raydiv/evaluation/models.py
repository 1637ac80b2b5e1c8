"""Resolving the models that a user names for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.directory import RunDirectory


def resolve_models(
    models: Sequence[str], template: str | None = None, precision: Literal["fp32", "bf16"] | None = None
) -> list[ModelSource]:
    """Sources of run directories, model directories, bundled models and hub ids. Raises UserError for an unusable one.

    Settings of a run's model come from its recipe; ``template`` and ``precision`` override them.
    """
    sources = [_source(model) for model in models]
    for source in sources:
        source.config()  # raises here rather than in a worker
        source.chat()
    return [
        replace(source, template=template or source.template, precision=precision or source.precision)
        for source in sources
    ]


def initial_model(model: str) -> ModelSource | None:
    """The model that a run started from; None where ``model`` is no run. Raises UserError if it no longer exists."""
    run = RunDirectory(Path(model))
    if not run.holds_a_run:
        return None
    recipe = run.read_recipe()
    return ModelSource.from_recipe(recipe, model_directory(recipe.model.id, recipe.model.revision))


def _source(model: str) -> ModelSource:
    run = RunDirectory(Path(model))
    if run.holds_a_run:
        return ModelSource.from_recipe(run.read_recipe(), model_directory(str(run.model)))
    return ModelSource(model_directory(model))
