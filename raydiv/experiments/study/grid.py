"""The cells of a study before they are run: what each is called, and its recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from raydiv.config import Recipe, changed
from raydiv.config.study import short_id
from raydiv.config.sweep import OWN
from raydiv.utils.errors import UserError

WORD = {"models": "model.id", "data": "data.train", "losses": "loss.type"}
"""The key that an entry which is a word alone says."""

SECTION = {"models": "model", "data": "data", "losses": "loss"}
"""The section whose keys an entry names; a key that begins with a section (optim.lr) is of that one."""


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell: its name along each axis, and its recipe, which is not yet a run's."""

    model: str
    data: str
    loss: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.model}-{self.data}-{self.loss}-{self.seed}"


def planned_cells(recipe: Recipe) -> list[PlannedCell]:
    """Every cell of the grid, checked; an axis that is not named has the recipe's own entry.

    Raises UserError for the first cell that no run could be.
    """
    study = recipe.study
    assert study is not None
    if not study.trains:
        return []
    models = study.models or {model_name(recipe): {}}
    data = study.data or {data_name(recipe): {}}
    losses = study.losses or {loss_name(recipe): {}}
    axes = (models.items(), data.items(), losses.items(), study.seeds or [recipe.seed])
    found = [_plan(recipe, *entries) for entries in product(*axes)]
    twice = [name for name, count in Counter(plan.name for plan in found).items() if count > 1]
    if twice:
        raise UserError(f"study: two cells would be called {twice[0]}; give their entries other names")
    return found


def model_name(recipe: Recipe) -> str:
    """What a recipe's model is called where a study has no name for it."""
    return _named(short_id(recipe.model.id))


def data_name(recipe: Recipe) -> str:
    """What a recipe's training data are called where a study has no name for them."""
    return _named("_".join(source.short_name for source in recipe.data.train))


def loss_name(recipe: Recipe) -> str:
    """What a recipe's loss is called where a study has no name for it."""
    return "_".join(term.name for term in recipe.loss.terms)


def _named(words: str) -> str:
    """Words in the characters that a run's name may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-._") or "unnamed"


def _plan(
    recipe: Recipe, model: tuple[str, Any], data: tuple[str, Any], loss: tuple[str, Any], seed: int
) -> PlannedCell:
    names = {"models": model[0], "data": data[0], "losses": loss[0]}
    changes: dict[str, Any] = {"seed": seed}
    try:
        for axis, (_, said) in zip(names, (model, data, loss), strict=True):
            changes |= changes_of(axis, said)
        return PlannedCell(model[0], data[0], loss[0], seed, changed(recipe, changes))
    except UserError as error:
        raise UserError(f"study: the cell {', '.join(names.values())}: {error}") from None


def changes_of(axis: str, said: str | Mapping[str, Any]) -> dict[str, Any]:
    """What an entry changes of the recipe, as dotted keys."""
    if isinstance(said, str):
        return {WORD[axis]: said}
    own = [key for key in said if key.partition(".")[0] in (*OWN, "seed")]
    if own:
        raise UserError(f"{own[0]}: is the same for all cells of a study{' but for seeds' if own[0] == 'seed' else ''}")
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
