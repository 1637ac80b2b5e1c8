"""``raydiv evaluate``: what models answer to evaluation prompts, judged; a report for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig as EvaluateSection
from raydiv.data.prompt_sets import Prompt, prompt_sets_of, read_prompts, set_name
from raydiv.evaluation.answers import EvaluationJudges, with_win_rate, measure_answers
from raydiv.evaluation.answers_report import AnswersReport
from raydiv.evaluation.contamination import count_contaminated
from raydiv.evaluation.judges import last_user_text
from raydiv.evaluation.models import initial_model, resolve_models
from raydiv.evaluation.outputs import match_outputs, read_outputs
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session

OWN_REFERENCE = (
    "it is its own reference: that its answers are improbable, or have drifted, cannot be seen; name a --reference"
)


def evaluate(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    reference: str | None = None,
    baseline: Path | None = None,
    how: EvaluateSection | None = None,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: ClusterConfig | None = None,
    display: ProgressDisplay | None = None,
) -> list[AnswersReport]:
    """``raydiv evaluate``: a report per model. ``reference`` scores the answers: by default the first model, or what it began
    from where that is a run.

    ``prompts`` are sets with their labels, ``harmful`` and ``harmless`` sources without; without any: bundled:heldout. With a
    pairwise judge answers are compared with those of ``baseline``, a file in AlpacaEval's format, else of the first model.
    """
    display, cluster, how = display or ProgressDisplay(), cluster or ClusterConfig(), how or EvaluateSection()
    sources = resolve_models(models, template, precision)
    if reference is not None:
        (scorer,) = resolve_models([reference], template, precision)
    else:
        scorer = initial_model(models[0]) or sources[0]
    sets = prompt_sets_of(prompts, harmful, harmless, default="bundled:heldout")
    own = read_prompts([source for one in sets for source in one], both=False)
    judges = EvaluationJudges.from_config(how, own, cluster)
    stored = None if baseline is None else _stored_answers(baseline, own)
    with ray_session(cluster):
        reports = []
        for model, source in zip(models, sources, strict=True):
            shared = count_contaminated(model, {set_name([place for one in sets for place in one]): own}, display)
            found = measure_answers(source, scorer, own, how, judges, cluster, display, label=model)
            alone = [OWN_REFERENCE] if source == scorer and len(models) == 1 else []
            reports.append(replace(found, notes=[*shared, *alone, *found.notes]))
        if judges.pairwise is None:
            return reports
        compared = reports if stored is not None else reports[1:]
        theirs = reports[0].harmless()[1] if stored is None else stored
        rated = [with_win_rate(report, theirs, judges.pairwise, cluster, display) for report in compared]
        return [*reports[: len(reports) - len(rated)], *rated]


def _stored_answers(path: Path, prompts: Sequence[Prompt]) -> list[str]:
    """A baseline's stored answers to the harmless prompts. Raises UserError where it lacks one."""
    return match_outputs([last_user_text(prompt) for prompt in prompts if not prompt.harmful], read_outputs(path), path)
