"""What a run measures of its model, before training and after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raydiv.config import Recipe
from raydiv.data.prompt_sets import PromptSets, set_name
from raydiv.evaluation.answers import EvaluationJudges, with_win_rate, measure_answers
from raydiv.evaluation.baseline_cache import BaselineCache, Measurement
from raydiv.evaluation.separation.measure import measure_separation
from raydiv.model.load import ModelSource
from raydiv.runs.directory import EVALUATION, SEPARATION, RunDirectory
from raydiv.runs.progress import ProgressDisplay


class BeforeAfterEvaluation:
    """The measurements that a recipe asks for; ``show_text`` writes prompts and answers out.

    Raises UserError for judges and attacks that cannot be used, before anything is started.
    """

    def __init__(self, recipe: Recipe, prompts: PromptSets, display: ProgressDisplay, show_text: bool) -> None:
        self._recipe, self._prompts, self._display, self._show_text = recipe, prompts, display, show_text
        self._before: list[str] = []
        asked = prompts.evaluate
        self._judges = EvaluationJudges.from_config(recipe.evaluate, asked, recipe.cluster) if asked else None

    def run(self, run: RunDirectory, when: str, base_directory: Path) -> None:
        """Measure the model ``before`` or ``after`` training into the run directory; needs a Ray session.

        Before training it is the model as it came, of which an earlier run may have left the same measurement.
        """
        base = ModelSource.from_recipe(self._recipe, base_directory)
        before = when == "before"
        taken = self.baseline(base) if before else self._measure(replace(base, directory=run.model), base, when)
        taken.write_into(run.path)
        run.metrics.append(
            {"step": 0 if before else run.metrics.steps_taken(), **taken.metrics} if taken.metrics else {}
        )

    def restore_baseline(self, base_directory: Path) -> None:
        """Before a run goes on: know again what the measurement after training compares answers with; needs a Ray session."""
        if self._judges is not None and self._judges.pairwise is not None:
            self.baseline(ModelSource.from_recipe(self._recipe, base_directory))

    def baseline(self, base: ModelSource) -> Measurement:
        """The measurement before training, from what earlier runs kept where it is there; needs a Ray session."""
        if not self._recipe.separation.prompts and self._judges is None:
            return Measurement({}, {}, [])
        place = BaselineCache(self._recipe, base, self._prompts, self._judges, self._show_text)
        taken = place.get()
        if taken is None:
            taken = self._measure(base, base, "before")
            place.put(taken)
        else:
            self._display.print("the model before training: measured earlier, and kept")
        self._before = taken.harmless
        return taken

    def _measure(self, model: ModelSource, base: ModelSource, when: str) -> Measurement:
        recipe, display = self._recipe, self._display
        metrics: dict[str, float] = {}
        files: dict[str, str] = {}
        harmless: list[str] = []
        if recipe.separation.prompts:
            how, name = recipe.separation, set_name(recipe.separation.prompts)
            apart = measure_separation(
                model, self._prompts.separation, how, recipe.cluster, display, label=when, name=name
            )
            files |= {f"{SEPARATION}/{name}": content for name, content in apart.files(when).items()}
            metrics |= apart.metrics()
        if self._judges is not None:
            answers = measure_answers(
                model, base, self._prompts.evaluate, recipe.evaluate, self._judges, recipe.cluster, display, label=when
            )
            if self._judges.pairwise is not None:
                harmless = answers.harmless()[1]
                if when == "after":
                    answers = with_win_rate(answers, self._before, self._judges.pairwise, recipe.cluster, display)
            files |= {f"{EVALUATION}/{name}": content for name, content in answers.files(when, self._show_text).items()}
            metrics |= answers.metrics()
        return Measurement(metrics, files, harmless)
