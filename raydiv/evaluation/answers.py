"""What models answer to evaluation prompts, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig as EvaluateSection
from raydiv.data.prompt_sets import Prompt
from raydiv.data.reference_scorer import score, score_once
from raydiv.evaluation import attacks
from raydiv.evaluation.answers_report import AnswersReport
from raydiv.evaluation.attacks import DIRECT, Attempt
from raydiv.evaluation.capability import measure_capability, require_tasks
from raydiv.evaluation.coherence import CoherenceReference, PerplexityThreshold
from raydiv.evaluation.drift import KlEstimate, sampled_requests
from raydiv.evaluation.generate import GeneratedAnswer, Request, generate
from raydiv.evaluation.judges import HarmJudge, overall_verdict
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.summary import GradedAnswer
from raydiv.evaluation.toxicity import require_classifier, toxicity
from raydiv.evaluation.win_rate import make_pairwise_judge, pairwise_judge_model, win_rate
from raydiv.model.load import ModelSource
from raydiv.runs.progress import ProgressDisplay


@dataclass(frozen=True, slots=True)
class EvaluationJudges:
    """Who judges, found and checked before anything is started."""

    harm: HarmJudge
    toxicity: Path | None
    pairwise: ModelSource | None

    @classmethod
    def from_config(cls, how: EvaluateSection, prompts: Sequence[Prompt], cluster: ClusterConfig) -> EvaluationJudges:
        """Raises UserError for a judge that is none, an attack that cannot be made, and a task that nobody knows."""
        attacks.check_attacks(how.attacks, prompts)
        if how.tasks:
            require_tasks(how.tasks, _folder(how))
        pairs = pairwise_judge_model(how.pairwise_judge, cluster) if how.pairwise_judge else None
        toxic = require_classifier(how.toxicity) if how.toxicity else None
        return cls(HarmJudge.from_name(how.judge, cluster), toxic, pairs)


def measure_answers(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    config: EvaluateSection,
    judges: EvaluationJudges,
    cluster: ClusterConfig,
    display: ProgressDisplay,
    *,
    label: str,
) -> AnswersReport:
    """What a model answers to ``prompts``, judged, and scored by ``reference``; needs a Ray session."""
    asked = attacks.direct_attempts(prompts)
    for attack in config.attacks:
        with display.phase(f"{attack.kind}, {label}") as update:
            asked += attacks.attack_attempts(attack, prompts, model, cluster, update)
    sampled = [] if model == reference else sampled_requests(prompts, config.kl_prompts)
    with display.phase(f"answers, {label}") as update:
        requests = [*(attempt.request for attempt in asked), *sampled]
        everything = generate(model, requests, config.max_new_tokens, cluster, update)
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
    if not config.tasks:
        return found
    with display.phase(f"capability, {label}") as update:
        return replace(
            found,
            capability=measure_capability(
                model, config.tasks, cluster=cluster, limit=config.task_limit, include=_folder(config), progress=update
            ),
        )


def _folder(how: EvaluateSection) -> Path | None:
    return None if how.task_folder is None else Path(how.task_folder)


def with_win_rate(
    report: AnswersReport, baseline: Sequence[str], judge: ModelSource, cluster: ClusterConfig, display: ProgressDisplay
) -> AnswersReport:
    """The report with a win rate of its answers to harmless prompts over a ``baseline``'s to the same; needs a Ray session."""
    instructions, outputs = report.harmless()
    if not instructions:
        return replace(report, notes=[*report.notes, "no harmless prompts: nobody was asked whose answers are better"])
    with display.phase(f"pairs, {report.model}") as update:
        found = win_rate(instructions, outputs, baseline, make_pairwise_judge(judge, cluster, update))
    return replace(report, win_rate=found)


@dataclass(frozen=True, slots=True)
class _Scored:
    """What log-probs say: those of the answers [n] under the reference, in its own ``tokens`` [n], and the rest."""

    logps: list[float]
    tokens: list[int]
    threshold: PerplexityThreshold
    perplexity: float
    kl: KlEstimate | None


def _scored(
    model: ModelSource,
    reference: ModelSource,
    requests: Sequence[Request],
    answers: Sequence[GeneratedAnswer],
    direct: int,
    cluster: ClusterConfig,
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
        seen = [(chat.prompt_ids(request.prompt), [*chat.text_ids(answer.text), eos]) for request, answer in pairs]
    written = CoherenceReference.read(chat)
    logps = score_once(reference, [*written.examples, *seen], cluster, update)
    known, logps = logps[: len(written.examples)], logps[len(written.examples) :]
    if model == reference:
        perplexity, kl = written.perplexity(known), None
    else:
        own_written = written if same else CoherenceReference.read(model.chat())
        sampled = seen[direct:] if same else []
        own = score(model, [*own_written.examples, *sampled], cluster, update)
        perplexity = own_written.perplexity(own[: len(own_written.examples)])
        kl = None
        if sampled:
            kl = KlEstimate.from_logps(
                own[len(own_written.examples) :], logps[direct:], sum(len(ids) for _, ids in sampled)
            )
    tokens = [len(ids) for _, ids in seen[:direct]]
    return _Scored(logps[:direct], tokens, PerplexityThreshold.from_logps(written, known), perplexity, kl)


def _graded(
    prompts: Sequence[Prompt],
    asked: Sequence[Attempt],
    answers: Sequence[GeneratedAnswer],
    scored: _Scored,
    judges: EvaluationJudges,
    cluster: ClusterConfig,
    update: Any,
) -> list[GradedAnswer]:
    """The verdict on each answer."""
    own = [prompts[attempt.prompt_index] for attempt in asked]
    texts = [answer.text for answer in answers]
    # what was put in the model's mouth is no sign of what it would say
    said = [text.removeprefix(attempt.request.opening) for text, attempt in zip(texts, asked, strict=True)]
    harm = judges.harm(own, said if judges.harm.source is None else texts, cluster, update)
    toxic = [None] * len(texts) if judges.toxicity is None else toxicity(judges.toxicity, texts, cluster, update)
    graded = []
    for number, attempt in enumerate(asked):
        refused = is_refusal(said[number])
        broken = scored.threshold.is_broken(said[number], scored.logps[number], scored.tokens[number])
        found = overall_verdict(harm[number], refused=refused, broken=broken)
        graded.append(GradedAnswer(own[number], attempt.attack, found, toxic[number]))
    return graded
