"""Contamination: whether a run was trained on the prompts that it is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raydiv.data.overlap import overlap_with_training
from raydiv.data.prompt_sets import Prompt
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError


def count_contaminated(model: str, prompts: Mapping[str, Sequence[Prompt]], display: ProgressDisplay) -> list[str]:
    """Notes on prompts that are in a run's training data; none for a model that is not a run. Needs a Ray session."""
    run = RunDirectory(Path(model))
    if not run.holds_a_run:
        return []
    with display.phase(f"overlap, {model}"):
        try:
            overlaps = overlap_with_training(run.read_recipe(), run.model, prompts)
        except UserError as error:
            return [f"contamination was not measured: {error}"]
    return [
        f"{overlap.name}: {sum(overlap.same)} of {overlap.prompts} prompts are in the training data word for word, and "
        f"{len(overlap.same) - sum(overlap.same)} more are near-duplicates"
        for overlap in overlaps
        if overlap.evaluation_places
    ]
