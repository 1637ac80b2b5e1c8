"""What a user names when a model is to be measured."""

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
    """Run directories, model directories, bundled models and hub ids as what can be loaded.

    A run says how its model is loaded and which template it was trained with; ``template`` and ``precision`` go over it.
    """
    found = [_source(model) for model in models]
    for one in found:
        one.config()  # or workers find out that it cannot be read
        one.chat()
    return [replace(one, template=template or one.template, precision=precision or one.precision) for one in found]


def initial_model(model: str) -> ModelSource | None:
    """The model that a run began from; None of what is no run. Raises UserError where it is not there any more."""
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
