"""The grid of a study before it runs: its cells and baselines, each with a name and a checked recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from raydiv.config import Recipe, with_changes
from raydiv.config.study import short_id
from raydiv.config.sweep import EXPERIMENT_KEYS
from raydiv.utils.errors import UserError

ENTRY_KEY = {"models": "model.id", "data": "data.train", "losses": "loss.type"}
"""The recipe key that an axis sets by an entry that is a string."""

SECTION = {"models": "model", "data": "data", "losses": "loss"}
"""The section of the keys in an axis's entry; a key that begins with a section, such as optim.lr, is a full key."""


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell: its name on each axis, its seed, and its recipe, which has no output directory of its own yet."""

    model: str
    data: str
    loss: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.model}-{self.data}-{self.loss}-{self.seed}"


@dataclass(frozen=True, slots=True)
class StudyGrid:
    """The cells of a study, and the recipes of the models that are measured without training, by name."""

    cells: list[PlannedCell]
    baselines: dict[str, Recipe]

    @classmethod
    def of(cls, recipe: Recipe) -> StudyGrid:
        """The grid of the recipe's study.

        Raises UserError for the first cell or baseline with an invalid recipe, and for two cells of one name.
        """
        assert recipe.study is not None
        cells = _planned_cells(recipe) if recipe.study.trains else []
        name, count = next(iter(Counter(cell.name for cell in cells).most_common(1)), ("", 0))
        if count > 1:
            raise UserError(f"study: {count} cells have the name {name}; rename their entries")
        return cls(cells, _baselines(recipe))


def _planned_cells(recipe: Recipe) -> list[PlannedCell]:
    """A cell for each combination of entries. An axis that is not set has the recipe's own value as its only entry."""
    study = recipe.study
    assert study is not None
    models = study.models or {model_name(recipe): {}}
    data_sets = study.data or {data_name(recipe): {}}
    losses = study.losses or {loss_name(recipe): {}}
    cells = []
    for model, data, loss, seed in product(models, data_sets, losses, study.seeds or [recipe.seed]):
        try:
            changes = {
                **changes_of("models", models[model]),
                **changes_of("data", data_sets[data]),
                **changes_of("losses", losses[loss]),
                "seed": seed,
            }
            cells.append(PlannedCell(model, data, loss, seed, with_changes(recipe, changes)))
        except UserError as error:
            raise UserError(f"study: cell {model}, {data}, {loss}: {error}") from None
    return cells


def _baselines(recipe: Recipe) -> dict[str, Recipe]:
    assert recipe.study is not None
    recipes = {}
    for name, entry in recipe.study.baselines.items():
        try:
            recipes[name] = with_changes(recipe, changes_of("models", entry))
        except UserError as error:
            raise UserError(f"study.baselines.{name}: {error}") from None
    return recipes


def changes_of(axis: str, entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """The recipe keys that an entry sets, dotted, with their values.

    Raises UserError for a key that cannot differ between the cells of a study.
    """
    if isinstance(entry, str):
        return {ENTRY_KEY[axis]: entry}
    changes = {}
    for key, value in entry.items():
        section = key.partition(".")[0]
        if section == "seed":
            raise UserError(f"{key}: not supported in an entry; set study.seeds")
        if section in EXPERIMENT_KEYS:
            raise UserError(f"{key}: not supported in an entry; it is the same for all cells of a study")
        changes[key if section in Recipe.model_fields else f"{SECTION[axis]}.{key}"] = value
    return changes


def model_name(recipe: Recipe) -> str:
    """The name of the recipe's model if the study gives it none."""
    return _as_run_name(short_id(recipe.model.id))


def data_name(recipe: Recipe) -> str:
    """The name of the recipe's training data if the study gives them none."""
    return _as_run_name("_".join(source.short_name for source in recipe.data.train))


def loss_name(recipe: Recipe) -> str:
    """The name of the recipe's loss if the study gives it none."""
    return "_".join(term.name for term in recipe.loss.terms)


def _as_run_name(text: str) -> str:
    """The text in the characters that the name of a run may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "unnamed"
