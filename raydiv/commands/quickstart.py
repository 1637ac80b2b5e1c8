"""``raydiv quickstart``: the bundled experiment on this machine, under a name that no run has yet."""

from __future__ import annotations

from collections.abc import Sequence

from raydiv.commands.train import Result, train
from raydiv.config import Recipe, load_recipe
from raydiv.data.bundled import QUICKSTART
from raydiv.runs.directory import RunDirectory


def quickstart(overrides: Sequence[str] = (), *, show_text: bool = False) -> Result:
    """Train and evaluate the bundled recipe, changed by ``overrides``; returns the run's result.

    A repeated quickstart gets a name of its own (``quickstart-2``), unless an override sets one. Raises as ``train`` does.
    """
    recipe = load_recipe(QUICKSTART, overrides)
    named = any(override.startswith("name=") for override in overrides)
    return train(recipe if named else _with_free_name(recipe), show_text=show_text)


def _with_free_name(recipe: Recipe) -> Recipe:
    """The recipe under its own name, or with the first number that no run directory has."""
    renamed, number = recipe, 1
    while RunDirectory.of(renamed).path.exists():
        number += 1
        renamed = recipe.model_copy(update={"name": f"{recipe.name}-{number}"})
    return renamed
