"""Runs that belong together, as a sweep's trials or a study's cells: what they share is done once, before any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.commands.preflight import require_ready
from raydiv.commands.prepare import LoadedInputs, load_inputs, local_files, prepare_data
from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.before_after import BeforeAfterEvaluation
from raydiv.model.load import ModelSource
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Where the runs are kept, the part of the cluster that each has, and MLflow's place and run that they are nested in."""

    folder: Path
    cluster: ClusterConfig
    tracking_uri: str | None
    parent: str | None

    def member_recipe(self, recipe: Recipe, name: str, tags: Mapping[str, str]) -> Recipe:
        """The recipe of one of the runs."""
        nested = {} if self.parent is None else {"mlflow.parentRunId": self.parent}
        track = {"uri": self.tracking_uri, "tags": {**recipe.track.tags, **nested, **tags}}
        storage = recipe.checkpoint.storage
        own = None if storage is None else f"{storage.rstrip('/')}/{self.folder.parent.name}"
        changes = {
            "name": name,
            "output_dir": str(self.folder),
            "cluster": self.cluster,
            "checkpoint": recipe.checkpoint.model_copy(update={"storage": own}),
            "track": recipe.track.model_copy(update=track),
        }
        return recipe.model_copy(update=changes)


TRAINING: Any = {"optim": {"lr", "betas", "eps", "weight_decay", "clip", "schedule", "warmup"}, "loss": True}
"""What changes neither data, reference and base, nor the number of updates; a seed that draws no ``data.eval`` neither."""


def distinct_preparations(recipes: Sequence[Recipe]) -> list[Recipe]:
    """One recipe for each way in which they differ in what is shared, or in the names of their metrics."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        drawn = isinstance(recipe.data.eval, float)
        tree = recipe.model_dump(mode="json", by_alias=True, exclude=TRAINING if drawn else TRAINING | {"seed": True})
        terms = [(term.name, term.divergence == "none") for term in recipe.loss.terms]
        found.setdefault(repr((tree, terms)), recipe)
    return list(found.values())


def prepare_all(recipes: Sequence[Recipe], display: ProgressDisplay) -> tuple[int, set[str]]:
    """Prepare every recipe and measure its base, through caches; needs a Ray session.

    Returns the most updates that one of them makes, and the names of what was measured of all bases.
    """
    steps: list[int] = []
    measured: list[set[str]] = []
    for recipe in recipes:
        opened = load_inputs(recipe, display)
        require_ready(recipe, RunDirectory.of(recipe).path, local_files(opened), new=False)
        steps.append(prepare_data(recipe, opened, display).steps(recipe))
        measured.append(set(_of_base(recipe, opened, display)))
    return max(steps), set.intersection(*measured)


def evaluate_baseline(recipe: Recipe, display: ProgressDisplay) -> dict[str, float]:
    """The metrics of a recipe's model as it comes; needs a Ray session."""
    return _of_base(recipe, load_inputs(recipe, display), display)


def _of_base(recipe: Recipe, opened: LoadedInputs, display: ProgressDisplay) -> dict[str, float]:
    measurements = BeforeAfterEvaluation(recipe, opened.prompts, display, show_text=False)
    return measurements.baseline(ModelSource.of(recipe, opened.directory)).metrics
