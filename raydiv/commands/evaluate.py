"""``raydiv evaluate``: judge the answers of models to evaluation prompts; a report for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig, is_url
from raydiv.data.prompt_sets import Prompt, last_user_text, prompt_sets_of, read_prompts, set_name
from raydiv.evaluation.answers import EvaluationJudges, measure_answers, with_win_rate
from raydiv.evaluation.answers_report import AnswersReport
from raydiv.evaluation.contamination import count_contaminated
from raydiv.evaluation.models import initial_model, resolve_models
from raydiv.evaluation.outputs import match_outputs, read_outputs
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

OWN_REFERENCE = (
    "the model is its own reference, so improbable answers and drift are not measured; name another model (--reference)"
)


def evaluate(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    reference: str | None = None,
    baseline: Path | None = None,
    config: EvaluateConfig | None = None,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: ClusterConfig | None = None,
    display: ProgressDisplay | None = None,
) -> list[AnswersReport]:
    """Evaluate models on prompts; returns a report per model.

    ``prompts`` are labelled sets, ``harmful`` and ``harmless`` are unlabelled sources; by default bundled:heldout. The
    model ``reference`` scores the answers: by default the base model of the first model if that is a run, else the
    first model. A pairwise judge compares answers with those of the first model, or in ``baseline``, a file in
    AlpacaEval's format.

    Raises UserError for models, prompts, judges or a baseline that cannot be used.
    """
    display, cluster, config = display or ProgressDisplay(), cluster or ClusterConfig(), config or EvaluateConfig()
    if is_url(config.engine) and len(models) > 1:
        raise UserError("--engine: a server answers for one model; name one MODEL, the one that it serves")
    sources = resolve_models(models, template, precision)
    if reference is not None:
        (scorer,) = resolve_models([reference], template, precision)
    else:
        scorer = initial_model(models[0]) or sources[0]
    sets = prompt_sets_of(prompts, harmful, harmless, default="bundled:heldout")
    set_sources = [source for set_sources in sets for source in set_sources]
    evaluated = read_prompts(set_sources, both=False)
    judges = EvaluationJudges.from_config(config, evaluated, cluster)
    stored = None if baseline is None else _stored_answers(baseline, evaluated)
    reports = []
    with ray_session(cluster):
        for label, model in zip(models, sources, strict=True):
            overlap = count_contaminated(label, {set_name(set_sources): evaluated}, display)
            report = measure_answers(model, scorer, evaluated, config, judges, cluster, display, label=label)
            own_reference = [OWN_REFERENCE] if model == scorer and len(models) == 1 else []
            reports.append(replace(report, notes=[*overlap, *own_reference, *report.notes]))
        if judges.pairwise is None:
            return reports
        baseline_answers = reports[0].harmless()[1] if stored is None else stored
        first = 1 if stored is None else 0
        compared = [
            with_win_rate(report, baseline_answers, judges.pairwise, cluster, display) for report in reports[first:]
        ]
        return [*reports[:first], *compared]


def _stored_answers(path: Path, prompts: Sequence[Prompt]) -> list[str]:
    """The answers in ``path`` to the harmless prompts. Raises UserError where one is missing."""
    return match_outputs([last_user_text(prompt) for prompt in prompts if not prompt.harmful], read_outputs(path), path)
