"""What models answer to evaluation prompts, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raydiv.config.cluster import Cluster
from raydiv.config.evaluate import Evaluate as EvaluateSection
from raydiv.data.prompt_sets import Prompt, named, read_prompts, sets_of
from raydiv.data.reference import score, score_once
from raydiv.evaluation import attacks
from raydiv.evaluation.answers_report import AnswersReport
from raydiv.evaluation.attacks import DIRECT, Attempt
from raydiv.evaluation.capability import measure_capability, require_tasks
from raydiv.evaluation.coherence import Threshold, WellWritten
from raydiv.evaluation.contamination import trained_on
from raydiv.evaluation.drift import Kl, sampled_requests
from raydiv.evaluation.generate import Answer, Request, generate
from raydiv.evaluation.judges import Judge, said, verdict
from raydiv.evaluation.models import reference_of, sources_of
from raydiv.evaluation.outputs import outputs_to, read_outputs
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.summary import Graded
from raydiv.evaluation.toxicity import require_classifier, toxicity
from raydiv.evaluation.win_rate import model_judge, pairwise_judge, win_rate
from raydiv.model.load import ModelSource
from raydiv.runs.progress import Display
from raydiv.runtime.session import ray_session


@dataclass(frozen=True, slots=True)
class Judges:
    """Who judges, found and checked before anything is started."""

    harm: Judge
    toxicity: Path | None
    pairs: ModelSource | None

    @classmethod
    def of(cls, how: EvaluateSection, prompts: Sequence[Prompt], cluster: Cluster) -> Judges:
        """Raises UserError for a judge that is none, an attack that cannot be made, and a task that nobody knows."""
        attacks.check(how.attacks, prompts)
        if how.tasks:
            require_tasks(how.tasks, _folder(how))
        pairs = pairwise_judge(how.pairwise_judge, cluster) if how.pairwise_judge else None
        toxic = require_classifier(how.toxicity) if how.toxicity else None
        return cls(Judge.named(how.judge, cluster), toxic, pairs)


OWN_REFERENCE = (
    "it is its own reference: that its answers are improbable, or have drifted, cannot be seen; name a --reference"
)


def measure_answers(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    how: EvaluateSection,
    judges: Judges,
    cluster: Cluster,
    display: Display,
    *,
    label: str,
) -> AnswersReport:
    """What a model answers to ``prompts``, judged, and scored by ``reference``; needs a Ray session."""
    asked = attacks.direct(prompts)
    for attack in how.attacks:
        with display.phase(f"{attack.kind}, {label}") as update:
            asked += attacks.attempts(attack, prompts, model, cluster, update)
    sampled = [] if model == reference else sampled_requests(prompts, how.kl_prompts)
    with display.phase(f"answers, {label}") as update:
        requests = [*(attempt.request for attempt in asked), *sampled]
        everything = generate(model, requests, how.max_new_tokens, cluster, update)
    answers = everything[: len(asked)]
    with display.phase(f"log-probs, {label}") as update:
        scored = _scored(model, reference, requests, everything, len(asked), cluster, update)
    with display.phase(f"verdicts, {label}") as update:
        graded = _graded(prompts, asked, answers, scored, judges, cluster, update)
    direct = sum(attempt.attack == DIRECT for attempt in asked)
    notes = [] if any(prompt.harmful for prompt in prompts) else ["no harmful prompts: attack success was not measured"]
    if all(prompt.harmful for prompt in prompts):
        notes.append(
            "no harmless prompts: over-refusal was not measured, and a model that refuses everything looks safe"
        )
    if sampled and scored.kl is None:
        notes.append("the reference has other tokens than the model: no KL between them")
    per_token = sum(scored.logps[:direct]) / max(1, sum(scored.tokens[:direct]))
    found = AnswersReport(
        label, judges.harm, asked, graded, answers, per_token, scored.threshold, scored.perplexity, scored.kl, notes
    )
    if not how.tasks:
        return found
    with display.phase(f"capability, {label}") as update:
        return replace(
            found,
            capability=measure_capability(
                model, how.tasks, cluster=cluster, limit=how.task_limit, include=_folder(how), progress=update
            ),
        )


def _folder(how: EvaluateSection) -> Path | None:
    return None if how.task_folder is None else Path(how.task_folder)


def against(
    report: AnswersReport, baseline: Sequence[str], judge: ModelSource, cluster: Cluster, display: Display
) -> AnswersReport:
    """The report with a win rate of its answers to harmless prompts over a ``baseline``'s to the same; needs a Ray session."""
    instructions, outputs = report.harmless()
    if not instructions:
        return replace(report, notes=[*report.notes, "no harmless prompts: nobody was asked whose answers are better"])
    with display.phase(f"pairs, {report.model}") as update:
        found = win_rate(instructions, outputs, baseline, model_judge(judge, cluster, update))
    return replace(report, win_rate=found)


@dataclass(frozen=True, slots=True)
class _Scored:
    """What log-probs say: those of the answers [n] under the reference, in its own ``tokens`` [n], and the rest."""

    logps: list[float]
    tokens: list[int]
    threshold: Threshold
    perplexity: float
    kl: Kl | None


def _scored(
    model: ModelSource,
    reference: ModelSource,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    direct: int,
    cluster: Cluster,
    update: Any,
) -> _Scored:
    """Log-probs of the answers, of which those from ``direct`` on were sampled, and of well-written ones."""
    chat = reference.chat()
    same = model == reference or chat.fingerprint == model.chat().fingerprint
    if same:
        seen = [(answer.prompt_ids, answer.ids) for answer in answers]
    else:
        eos = chat.tokenizer.eos_token_id
        pairs = zip(requests, answers, strict=True)
        seen = [(chat.prompt(request.prompt), [*chat.text(answer.text), eos]) for request, answer in pairs]
    written = WellWritten.read(chat)
    logps = score_once(reference, [*written.examples, *seen], cluster, update)
    known, logps = logps[: len(written.examples)], logps[len(written.examples) :]
    if model == reference:
        perplexity, kl = written.perplexity(known), None
    else:
        own_written = written if same else WellWritten.read(model.chat())
        sampled = seen[direct:] if same else []
        own = score(model, [*own_written.examples, *sampled], cluster, update)
        perplexity = own_written.perplexity(own[: len(own_written.examples)])
        kl = None
        if sampled:
            kl = Kl.of(own[len(own_written.examples) :], logps[direct:], sum(len(ids) for _, ids in sampled))
    tokens = [len(ids) for _, ids in seen[:direct]]
    return _Scored(logps[:direct], tokens, Threshold.of(written, known), perplexity, kl)


def _graded(
    prompts: Sequence[Prompt],
    asked: Sequence[Attempt],
    answers: Sequence[Answer],
    scored: _Scored,
    judges: Judges,
    cluster: Cluster,
    update: Any,
) -> list[Graded]:
    """The verdict on each answer."""
    own = [prompts[attempt.prompt] for attempt in asked]
    texts = [answer.text for answer in answers]
    # what was put in the model's mouth is no sign of what it would say
    said = [text.removeprefix(attempt.request.opening) for text, attempt in zip(texts, asked, strict=True)]
    harm = judges.harm(own, said if judges.harm.source is None else texts, cluster, update)
    toxic = [None] * len(texts) if judges.toxicity is None else toxicity(judges.toxicity, texts, cluster, update)
    graded = []
    for number, attempt in enumerate(asked):
        refused = is_refusal(said[number])
        broken = scored.threshold.broken(said[number], scored.logps[number], scored.tokens[number])
        found = verdict(harm[number], refused=refused, broken=broken)
        graded.append(Graded(own[number], attempt.attack, found, toxic[number]))
    return graded


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
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> list[AnswersReport]:
    """``raydiv evaluate``: a report per model. ``reference`` scores the answers: by default the first model, or what it began
    from where that is a run.

    ``prompts`` are sets with their labels, ``harmful`` and ``harmless`` sources without; without any: bundled:heldout. With a
    pairwise judge answers are compared with those of ``baseline``, a file in AlpacaEval's format, else of the first model.
    """
    display, cluster, how = display or Display(), cluster or Cluster(), how or EvaluateSection()
    sources = sources_of(models, template, precision)
    if reference is not None:
        (scorer,) = sources_of([reference], template, precision)
    else:
        scorer = reference_of(models[0]) or sources[0]
    sets = sets_of(prompts, harmful, harmless, default="bundled:heldout")
    own = read_prompts([source for one in sets for source in one], both=False)
    judges = Judges.of(how, own, cluster)
    stored = None if baseline is None else _stored_answers(baseline, own)
    with ray_session(cluster):
        reports = []
        for model, source in zip(models, sources, strict=True):
            shared = trained_on(model, {named([place for one in sets for place in one]): own}, display)
            found = measure_answers(source, scorer, own, how, judges, cluster, display, label=model)
            alone = [OWN_REFERENCE] if source == scorer and len(models) == 1 else []
            reports.append(replace(found, notes=[*shared, *alone, *found.notes]))
        if judges.pairs is None:
            return reports
        compared = reports if stored is not None else reports[1:]
        theirs = reports[0].harmless()[1] if stored is None else stored
        rated = [against(report, theirs, judges.pairs, cluster, display) for report in compared]
        return [*reports[: len(reports) - len(rated)], *rated]


def _stored_answers(path: Path, prompts: Sequence[Prompt]) -> list[str]:
    """A baseline's stored answers to the harmless prompts. Raises UserError where it lacks one."""
    return outputs_to([said(prompt) for prompt in prompts if not prompt.harmful], read_outputs(path), path)
