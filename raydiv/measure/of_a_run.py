"""What a run measures of its model, before training and after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raydiv.config import Recipe
from raydiv.data.prompts import PromptSets, named
from raydiv.measure.evaluations import Judges, against, measure_answers
from raydiv.measure.separations import measure_separation
from raydiv.model.load import ModelSource
from raydiv.progress import Display
from raydiv.run import RunDirectory


class Measurements:
    """The measurements that a recipe asks for; ``show_text`` writes prompts and answers out.

    Raises UserError for judges and attacks that cannot be used, before anything is started.
    """

    def __init__(self, recipe: Recipe, prompts: PromptSets, display: Display, show_text: bool) -> None:
        self._recipe, self._prompts, self._display, self._show_text = recipe, prompts, display, show_text
        self._before: list[str] = []
        self._judges = Judges.of(recipe.evaluate, recipe.cluster) if prompts.evaluate else None

    def take(self, run: RunDirectory, when: str, base_directory: Path) -> None:
        """Measure the model ``before`` or ``after`` training into the run directory; needs a Ray session."""
        recipe, display = self._recipe, self._display
        base = ModelSource.of(recipe, base_directory)
        model = base if when == "before" else replace(base, directory=run.model)
        metrics: dict[str, float] = {}
        if recipe.separation.prompts:
            how, name = recipe.separation, named(recipe.separation.prompts)
            apart = measure_separation(
                model, self._prompts.separation, how, recipe.cluster, display, label=when, name=name
            )
            apart.write(run.separation, when)
            metrics |= apart.metrics()
        if self._judges is not None:
            answers = measure_answers(
                model, base, self._prompts.evaluate, recipe.evaluate, self._judges, recipe.cluster, display, label=when
            )
            if when == "after" and self._judges.pairs is not None:
                answers = against(answers, self._before, self._judges.pairs, recipe.cluster, display)
            self._before = answers.harmless()[1]
            answers.write(run.evaluation, when, self._show_text)
            metrics |= answers.metrics()
        run.log({"step": 0 if when == "before" else run.steps_taken(), **metrics} if metrics else {})
