"""``raydiv quickstart``: run the bundled experiment on this machine, under an unused name."""

from __future__ import annotations

from collections.abc import Sequence

from raydiv.commands.train import Result, train
from raydiv.config import Recipe, load_recipe
from raydiv.data.bundled import QUICKSTART
from raydiv.runs.directory import RunDirectory


def quickstart(overrides: Sequence[str] = (), *, show_text: bool = False, open_report: bool = False) -> Result:
    """Train and evaluate the bundled recipe with ``overrides``; returns the result of the run.

    A repeated quickstart is named ``quickstart-2`` and so on, unless an override sets the name. Raises as ``train``
    does.
    """
    recipe = load_recipe(QUICKSTART, overrides)
    has_name = any(override.startswith("name=") for override in overrides)
    return train(recipe if has_name else _with_free_name(recipe), show_text=show_text, open_report=open_report)


def _with_free_name(recipe: Recipe) -> Recipe:
    """The recipe, with the first number appended to its name that no run directory has."""
    renamed, number = recipe, 1
    while RunDirectory.of(renamed).path.exists():
        number += 1
        renamed = recipe.model_copy(update={"name": f"{recipe.name}-{number}"})
    return renamed
