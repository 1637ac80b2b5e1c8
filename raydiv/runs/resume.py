"""Going on with a run: whether a recipe is still its recipe, and its data still its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.utils.dotted import flatten
from raydiv.utils.errors import UserError

FREE = ("name", "output_dir", "cluster", "checkpoint", "track", "sweep", "study")
"""Sections that may differ: they change no update. Name and place are where the run was found."""

LAYOUT = (
    "batch.tokens_per_microbatch",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.activation_checkpointing",
    "engine.profile",
)
"""Keys that say how an update is computed, not which: they may differ too."""

MACHINE = ("num_workers", "min_workers", "use_gpu", "worker_memory_gb", "cpus", "cpus_per_worker")
"""Of the cluster: where these are as before, so is a layout that the recipe leaves open."""


def recipe_to_resume(run: RunDirectory, recipe: Recipe) -> Recipe:
    """The recipe by which the run in a directory goes on: ``recipe``, with what is settled already.

    Raises UserError, with the differences, when that run was begun with another one.
    """
    there = run.read_recipe()
    differ = differences(comparable(there), comparable(recipe))
    if differ:
        lines = [f"  {key}: {then} then, {now} now" for key, (then, now) in differ.items()]
        raise UserError(
            f"{run.path}: was begun with another recipe, and cannot go on with this one:\n" + "\n".join(lines) + "\n"
            "Take that back, or begin another run (name=...)"
        )
    if any(getattr(there.cluster, key) != getattr(recipe.cluster, key) for key in MACHINE):
        return recipe
    settled = {
        section: getattr(recipe, section).model_copy(update=_left_open(there, recipe, section))
        for section in ("batch", "engine")
    }
    return recipe.model_copy(update=settled)


def resumes(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether there is a run of this recipe that can be gone on with, as far as that is seen without its data."""
    try:
        run.stage.read()
        recipe_to_resume(run, recipe)
    except UserError:
        return False
    return True


def _left_open(there: Recipe, recipe: Recipe, section: str) -> dict[str, Any]:
    """The settled values of what the recipe leaves to raydiv."""
    keys = [key.partition(".")[2] for key in LAYOUT if key.startswith(f"{section}.")]
    return {
        key: getattr(getattr(there, section), key) for key in keys if getattr(getattr(recipe, section), key) == "auto"
    }


def comparable(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of the model that comes out of it, by dotted keys: not where, nor in which layout, it is trained."""
    tree = recipe.model_dump(mode="json", by_alias=True, exclude=set(FREE))
    return {key: value for key, value in flatten(tree).items() if key not in LAYOUT}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys at which two recipes that were ``compared`` differ, in order, with what stands in each."""
    pairs = {key: (then.get(key, "absent"), now.get(key, "absent")) for key in sorted(then.keys() | now.keys())}
    return {key: (one, other) for key, (one, other) in pairs.items() if one != other}


def require_same_content(run: RunDirectory, of: Mapping[str, str]) -> None:
    """Raise UserError when data or model are not those that the run was begun with."""
    for what, before in run.stage.read().of.items():
        if of[what] != before:
            where = "data.train" if what == "data" else "model.id"
            raise UserError(
                f"{where}: its content has changed since {run.path} was begun (fingerprint {before[:12]} then, "
                f"{of[what][:12]} now); bring it back, or begin another run (name=...)"
            )
