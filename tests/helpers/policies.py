"""Policies as training leaves them, made without training: changed weights, gathered and written into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydiv.config import Recipe, save_recipe
from raydiv.model.export import write_model
from raydiv.model.load import DTYPES, build_policy
from raydiv.runs.directory import RunDirectory


def changed_policy(start: Path, recipe: Recipe) -> Any:
    """The model that is trained from ``start``, with changed weights."""
    torch.manual_seed(0)
    policy = build_policy(start, recipe.model, DTYPES[recipe.engine.precision]).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return policy


def gathered_weights(policy: Any) -> dict[str, torch.Tensor]:
    """The trained weights: all, or the adapters."""
    return {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}


def write_policy(policy: Any, start: Path, recipe: Recipe, target: Path) -> Path:
    """Write the policy's weights as a model directory, without the check of what was written."""
    write_model(policy, gathered_weights(policy), start, recipe, target, lambda _: None)
    return target


def write_run(start: Path, recipe: Recipe, folder: Path) -> RunDirectory:
    """A run directory of the recipe whose model is ``start`` with changed weights."""
    run = RunDirectory(folder)
    run.path.mkdir()
    save_recipe(recipe, run.recipe)
    write_policy(changed_policy(start, recipe), start, recipe, run.model)
    return run
