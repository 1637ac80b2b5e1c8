"""What the trials of a sweep and the cells of a study share: settings, and preparations before the first run."""

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
from raydiv.losses.position import RewardWeights
from raydiv.model.load import ModelSource
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay


@dataclass(frozen=True, slots=True)
class RunGroup:
    """What the runs of a sweep or a study have in common.

    ``folder`` holds their directories. ``cluster`` is the part of the cluster that each of them uses. ``tracking_uri``
    is MLflow's, None for the one of the environment, and ``parent_run_id`` the MLflow run that they are nested in.
    """

    folder: Path
    cluster: ClusterConfig
    tracking_uri: str | None
    parent_run_id: str | None

    def member_recipe(self, recipe: Recipe, name: str, tags: Mapping[str, str]) -> Recipe:
        """The recipe as that of the group's run ``name``, with MLflow tags."""
        parent = {} if self.parent_run_id is None else {"mlflow.parentRunId": self.parent_run_id}
        track = {"uri": self.tracking_uri, "tags": {**recipe.track.tags, **parent, **tags}}
        storage = recipe.checkpoint.storage
        if storage is not None:
            storage = f"{storage.rstrip('/')}/{self.folder.parent.name}"
        changes = {
            "name": name,
            "output_dir": str(self.folder),
            "cluster": self.cluster,
            "checkpoint": recipe.checkpoint.model_copy(update={"storage": storage}),
            "track": recipe.track.model_copy(update=track),
        }
        return recipe.model_copy(update=changes)


KEYS_OF_TRAINING: Any = {"optim": {"lr", "betas", "eps", "weight_decay", "clip", "schedule", "warmup"}, "loss": True}
"""Keys that change neither the data, the reference and the base model, nor the number of updates, ``loss.position``
apart.
"""


def distinct_preparations(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The first recipe of each group of recipes with equal preparations and equal names of metrics."""
    distinct: dict[str, Recipe] = {}
    for recipe in recipes:
        # the seed matters only if it draws the examples of data.eval
        draws_eval = isinstance(recipe.data.eval, float)
        excluded = KEYS_OF_TRAINING if draws_eval else KEYS_OF_TRAINING | {"seed": True}
        tree = recipe.model_dump(mode="json", by_alias=True, exclude=excluded)
        terms = [(term.name, term.divergence == "none") for term in recipe.loss.terms]
        rule = recipe.loss.position.rule
        # rewards are of a model of their own
        weights = rule if rule is None or isinstance(rule, RewardWeights) else rule.store_key
        distinct.setdefault(repr((tree, terms, weights)), recipe)
    return list(distinct.values())


def prepare_all(recipes: Sequence[Recipe], display: ProgressDisplay) -> tuple[int, set[str]]:
    """Prepare the data of every recipe and measure its base model, through the caches; needs a Ray session.

    Returns the highest number of updates of a recipe, and the names of the metrics that all base models have.
    """
    steps: list[int] = []
    metrics: list[set[str]] = []
    for recipe in recipes:
        inputs = load_inputs(recipe, display)
        require_ready(recipe, RunDirectory.of(recipe).path, local_files(inputs), new=False)
        steps.append(prepare_data(recipe, inputs, display, whole=True).steps(recipe))
        metrics.append(set(_baseline_metrics(recipe, inputs, display)))
    return max(steps), set.intersection(*metrics)


def evaluate_baseline(recipe: Recipe, display: ProgressDisplay) -> dict[str, float]:
    """The metrics of a recipe's model without training; needs a Ray session."""
    return _baseline_metrics(recipe, load_inputs(recipe, display), display)


def _baseline_metrics(recipe: Recipe, inputs: LoadedInputs, display: ProgressDisplay) -> dict[str, float]:
    evaluation = BeforeAfterEvaluation(recipe, inputs.prompts, display, show_text=False)
    return evaluation.baseline(ModelSource.from_recipe(recipe, inputs.model_directory)).metrics
