"""Resolving the models that a user names for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raydiv.config.data import template_text
from raydiv.config.recipe import adapter_directory
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.directory import RunDirectory
from raydiv.utils.errors import UserError


def resolve_models(
    models: Sequence[str], template: str | None = None, precision: Literal["fp32", "bf16"] | None = None
) -> list[ModelSource]:
    """Sources of run directories, model directories, bundled models and hub ids. Raises UserError for an unusable one.

    Settings of a run's model come from its recipe; ``template`` and ``precision`` override them.
    """
    try:
        chosen = {} if template is None else {"template": template_text(template)}
    except ValueError as error:
        raise UserError(f"--template: {error}") from None
    sources = []
    for source in map(_source, models):
        chat_config = source.chat_config.model_copy(update=chosen)
        source = replace(source, chat_config=chat_config, precision=precision or source.precision)
        source.config()  # raises here rather than in a worker
        source.chat()
        sources.append(source)
    return sources


def initial_model(model: str) -> ModelSource | None:
    """The model that a run started from; None where ``model`` is no run. Raises UserError if it no longer exists."""
    run = RunDirectory(Path(model))
    if not run.holds_a_run:
        return None
    recipe = run.read_recipe()
    if recipe.model.adapter is not None:
        adapter = model_directory(str(adapter_directory(recipe.model.adapter)), key="model.adapter")
        return ModelSource.from_recipe(recipe, adapter)
    return ModelSource.from_recipe(recipe, model_directory(recipe.model.id, recipe.model.revision))


def _source(model: str) -> ModelSource:
    run = RunDirectory(Path(model))
    if run.holds_a_run:
        return ModelSource.from_recipe(run.read_recipe(), model_directory(str(run.model)))
    return ModelSource(model_directory(model))
