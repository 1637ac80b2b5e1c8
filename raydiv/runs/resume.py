"""Resuming a run: whether a recipe, its data and its model are those that the run was started with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.utils.dotted import flatten
from raydiv.utils.errors import UserError

FREE_SECTIONS = ("name", "output_dir", "cluster", "checkpoint", "track", "sweep", "study")
"""Sections that may differ, since they change no update. ``name`` and ``output_dir`` found the run."""

LAYOUT_KEYS = (
    "batch.tokens_per_microbatch",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.activation_checkpointing",
    "engine.profile",
)
"""Keys that may differ, since they change how an update is computed and not the update."""

RESOLVED_KEYS = ("data.template_date",)
"""Keys without a value in a recipe as written, and with one in a run's."""

MACHINE_KEYS = ("num_workers", "min_workers", "use_gpu", "worker_memory_gb", "cpus", "cpus_per_worker")
"""Keys of ``cluster``: while they are unchanged, ``auto`` keys keep the values that they were resolved to."""


def recipe_to_resume(run: RunDirectory, recipe: Recipe) -> Recipe:
    """``recipe``, with the values that the run resolved ``auto`` keys and the template's date to.

    Raises UserError, with the differences, when the run was started with another recipe.
    """
    started = run.read_recipe()
    recipe = with_template_date(recipe, started)
    changes = differences(comparable(started), comparable(recipe))
    if changes:
        lines = "\n".join(f"  {key}: {before} then, {now} now" for key, (before, now) in changes.items())
        raise UserError(
            f"{run.path}: was started with another recipe and cannot resume with this one:\n{lines}\n"
            "Undo these changes, or start another run (name=...)"
        )
    if any(getattr(started.cluster, key) != getattr(recipe.cluster, key) for key in MACHINE_KEYS):
        return recipe
    resolved = {
        section: getattr(recipe, section).model_copy(update=_resolved_values(started, recipe, section))
        for section in ("batch", "engine")
    }
    return recipe.model_copy(update=resolved)


def with_template_date(recipe: Recipe, started: Recipe | None) -> Recipe:
    """The recipe with the date that chat templates print: its own, else that of an earlier attempt, else today's."""
    if recipe.data.template_date is not None:
        return recipe
    day = date.today() if started is None else started.data.template_date
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"template_date": day})})


def resumes(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether the directory holds a run of this recipe that can resume, as far as is known without its data."""
    try:
        run.stage.read()
        recipe_to_resume(run, recipe)
    except UserError:
        return False
    return True


def _resolved_values(started: Recipe, recipe: Recipe, section: str) -> dict[str, Any]:
    """Resolved values of the fields that the recipe sets to ``auto``."""
    keys = [key.partition(".")[2] for key in LAYOUT_KEYS if key.startswith(f"{section}.")]
    return {
        key: getattr(getattr(started, section), key) for key in keys if getattr(getattr(recipe, section), key) == "auto"
    }


def comparable(recipe: Recipe) -> dict[str, Any]:
    """The values, by dotted key, on which the trained model depends: without place and layout of training."""
    tree = recipe.model_dump(mode="json", by_alias=True, exclude=set(FREE_SECTIONS))
    return {key: value for key, value in flatten(tree).items() if key not in LAYOUT_KEYS}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys, in order, whose values in two results of ``comparable`` differ, with both values.

    A key that one of them leaves to raydiv does not differ.
    """
    pairs = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in sorted(before.keys() | now.keys())}
    return {
        key: (old, new)
        for key, (old, new) in pairs.items()
        if old != new and not (key in RESOLVED_KEYS and None in (old, new))
    }


KEY_OF_CONTENT = {"data": "data.train", "model": "model.id", "rewards": "loss.position.model"}
"""The recipe's key that names the content of each fingerprint."""


def require_same_content(run: RunDirectory, fingerprints: Mapping[str, str]) -> None:
    """Raise UserError when the run was started with other ``data``, another ``model`` or another one of ``rewards``."""
    for kind, before in run.stage.read().fingerprints.items():
        if fingerprints[kind] != before:
            raise UserError(
                f"{KEY_OF_CONTENT[kind]}: the content has changed since {run.path} was started (fingerprint "
                f"{before[:12]} then, {fingerprints[kind][:12]} now); restore it, or start another run (name=...)"
            )
