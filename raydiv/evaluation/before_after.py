"""Evaluation of a run's model before and after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raydiv.config import Recipe
from raydiv.data.prompt_sets import PromptSets, set_name
from raydiv.data.reference_scorer import score_tokens
from raydiv.data.tokens import StoredExamples
from raydiv.evaluation.answers import EvaluationJudges, measure_answers, with_win_rate
from raydiv.evaluation.baseline_cache import BaselineCache, Measurement
from raydiv.evaluation.depth import HeldOutDepth, chosen_examples
from raydiv.evaluation.separation.measure import measure_separation
from raydiv.model.load import ModelSource
from raydiv.runs.directory import EVALUATION, SEPARATION, RunDirectory
from raydiv.runs.progress import ProgressDisplay


class BeforeAfterEvaluation:
    """The evaluation that a recipe configures; with ``show_text`` its files contain prompts and answers.

    Raises UserError for invalid judges and attacks, before anything starts.
    """

    def __init__(self, recipe: Recipe, prompts: PromptSets, display: ProgressDisplay, show_text: bool) -> None:
        self._recipe, self._prompts, self._display, self._show_text = recipe, prompts, display, show_text
        self._harmless_before: list[str] = []
        self._judges = None
        if prompts.evaluate:
            self._judges = EvaluationJudges.from_config(recipe.evaluate, prompts.evaluate, recipe.cluster)

    def run(self, run: RunDirectory, when: str, base_directory: Path, held_out: StoredExamples | None = None) -> None:
        """Evaluate the model ``before`` or ``after`` training into the run directory; needs a Ray session.

        Before training it is the base model, whose evaluation may be cached by an earlier run. After it, the depth of
        the ``held_out`` examples is measured too, where answers are or training measured it.
        """
        base = ModelSource.from_recipe(self._recipe, base_directory)
        before = when == "before"
        measurement = self.baseline(base) if before else self._measure(replace(base, directory=run.model), base, when)
        wants_depth = self._judges is not None or self._recipe.evaluate.depth_every is not None
        if not before and held_out is not None and wants_depth:
            measurement = measurement.with_depth(
                self._held_out_depth(replace(base, directory=run.model), base, held_out)
            )
        measurement.write_into(run.path)
        run.metrics.append(
            {"step": 0 if before else run.metrics.steps_taken(), **measurement.metrics} if measurement.metrics else {}
        )

    def _held_out_depth(self, model: ModelSource, base: ModelSource, held_out: StoredExamples) -> HeldOutDepth | None:
        """Curves of the held-out examples; None where one class has none."""
        rows = chosen_examples(held_out.aligned)
        aligned = held_out.aligned[rows]
        if aligned.all() or not aligned.any():
            return None
        examples = held_out.ids(rows)
        with self._display.phase("depth, held-out examples") as update:
            after, before = (score_tokens(one, examples, self._recipe.cluster, update) for one in (model, base))
        return HeldOutDepth.of([ours - theirs for ours, theirs in zip(after, before, strict=True)], aligned)

    def restore_baseline(self, base_directory: Path) -> None:
        """On resume: restore the answers that the evaluation after training compares with; needs a Ray session."""
        if self._judges is not None and self._judges.pairwise is not None:
            self.baseline(ModelSource.from_recipe(self._recipe, base_directory))

    def baseline(self, base: ModelSource) -> Measurement:
        """The evaluation before training, cached or new; needs a Ray session."""
        if not self._recipe.separation.prompts and self._judges is None:
            return Measurement({}, {}, [])
        cache = BaselineCache(self._recipe, base, self._prompts, self._judges, self._show_text)
        measurement = cache.get()
        if measurement is None:
            measurement = self._measure(base, base, "before")
            cache.put(measurement)
        else:
            self._display.print("evaluation before training: from the cache")
        self._harmless_before = measurement.harmless
        return measurement

    def _measure(self, model: ModelSource, base: ModelSource, when: str) -> Measurement:
        recipe, display = self._recipe, self._display
        metrics: dict[str, float] = {}
        files: dict[str, str] = {}
        harmless: list[str] = []
        if recipe.separation.prompts:
            config, name = recipe.separation, set_name(recipe.separation.prompts)
            separation = measure_separation(
                model, self._prompts.separation, config, recipe.cluster, display, label=when, name=name
            )
            files |= {f"{SEPARATION}/{name}": content for name, content in separation.files(when).items()}
            metrics |= separation.metrics()
        if self._judges is not None:
            answers = measure_answers(
                model, base, self._prompts.evaluate, recipe.evaluate, self._judges, recipe.cluster, display, label=when
            )
            if self._judges.pairwise is not None:
                harmless = answers.harmless()[1]
                if when == "after":
                    answers = with_win_rate(
                        answers, self._harmless_before, self._judges.pairwise, recipe.cluster, display
                    )
            files |= {f"{EVALUATION}/{name}": content for name, content in answers.files(when, self._show_text).items()}
            metrics |= answers.metrics()
        return Measurement(metrics, files, harmless)
