"""The cells of a study before they are run: what each is called, and its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from raydiv.config import Recipe, changed
from raydiv.config.study import model_name
from raydiv.errors import UserError

WORD = {"models": "model.id", "data": "data.train", "losses": "loss.type"}
"""The key that an entry which is a word alone says."""

SECTION = {"models": "model", "data": "data", "losses": "loss"}
"""The section whose keys an entry names; a key that begins with a section (optim.lr) is of that one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A cell: its name along each axis, and its recipe, which is not yet a run's."""

    model: str
    data: str
    loss: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.model}-{self.data}-{self.loss}-{self.seed}"


def plans(recipe: Recipe) -> list[Plan]:
    """Every cell of the grid, checked; an axis that is not named has the recipe's own entry.

    Raises UserError for the first cell that no run could be.
    """
    study = recipe.study
    assert study is not None
    if not study.trains:
        return []
    models = study.models or {model_name(recipe.model.id): {}}
    data = study.data or {data_name(recipe): {}}
    losses = study.losses or {recipe.loss.type: {}}
    axes = (models.items(), data.items(), losses.items(), study.seeds or [recipe.seed])
    return [_plan(recipe, *entries) for entries in product(*axes)]


def data_name(recipe: Recipe) -> str:
    """What a recipe's training data are called where a study has no name for them."""
    return "_".join(source.short_name.replace(":", "-") for source in recipe.data.train)


def _plan(recipe: Recipe, model: tuple[str, Any], data: tuple[str, Any], loss: tuple[str, Any], seed: int) -> Plan:
    names = {"models": model[0], "data": data[0], "losses": loss[0]}
    changes: dict[str, Any] = {"seed": seed}
    for axis, (_, said) in zip(names, (model, data, loss), strict=True):
        changes |= changes_of(axis, said)
    try:
        return Plan(model[0], data[0], loss[0], seed, changed(recipe, changes))
    except UserError as error:
        raise UserError(f"study: the cell {', '.join(names.values())}: {error}") from None


def changes_of(axis: str, said: str | Mapping[str, Any]) -> dict[str, Any]:
    """What an entry changes of the recipe, as dotted keys."""
    if isinstance(said, str):
        return {WORD[axis]: said}
    return {key if _of_the_recipe(key) else f"{SECTION[axis]}.{key}": value for key, value in said.items()}


def _of_the_recipe(key: str) -> bool:
    return key.partition(".")[0] in Recipe.model_fields


def baselines(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of models that are measured as they are, by name. Raises UserError as ``plans`` does."""
    study = recipe.study
    assert study is not None
    found = {}
    for name, said in study.baselines.items():
        try:
            found[name] = changed(recipe, changes_of("models", said))
        except UserError as error:
            raise UserError(f"study.baselines.{name}: {error}") from None
    return found
