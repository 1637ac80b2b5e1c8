"""Whether a run was trained on the prompts that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raydiv.data.overlap import overlap_with_training
from raydiv.data.prompt_sets import Prompt
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError


def count_contaminated(model: str, prompts: Mapping[str, Sequence[Prompt]], display: ProgressDisplay) -> list[str]:
    """What of the prompt sets a run's training data has, in words; nothing of a model that is no run. Needs a Ray session."""
    run = RunDirectory(Path(model))
    if not run.holds_a_run:
        return []
    with display.phase(f"overlap, {model}"):
        try:
            overlaps = overlap_with_training(run.read_recipe(), run.model, prompts)
        except UserError as error:
            return [f"whether it was trained on these prompts is not known: {error}"]
    return [
        f"of the {one.prompts} prompts of {one.name} it was trained on {sum(one.same)} word for word, and on "
        f"{len(one.same) - sum(one.same)} more nearly"
        for one in overlaps
        if one.evaluation_places
    ]
