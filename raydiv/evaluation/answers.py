"""Generating and judging a model's answers to evaluation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig, is_url
from raydiv.data.prompt_sets import Prompt
from raydiv.data.reference_scorer import score, score_once, score_tokens
from raydiv.evaluation import attacks
from raydiv.evaluation.answers_report import AnswersReport
from raydiv.evaluation.attacks import DIRECT, Attempt
from raydiv.evaluation.capability import measure_capability, require_tasks
from raydiv.evaluation.coherence import CoherenceReference, PerplexityThreshold
from raydiv.evaluation.drift import KlEstimate, sampled_requests
from raydiv.evaluation.generate import GeneratedAnswer, Request, generate
from raydiv.evaluation.judges.harm_judge import HarmJudge, ServedJudge
from raydiv.evaluation.judges.verdicts import HarmVerdict
from raydiv.evaluation.own_answers import answers_to_begin_with
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.server import Server
from raydiv.evaluation.summary import GradedAnswer
from raydiv.evaluation.toxicity import require_classifier, toxicity
from raydiv.evaluation.vllm_engine import Vllm, require_vllm, vllm_version
from raydiv.evaluation.win_rate import make_pairwise_judge, pairwise_judge_model, win_rate
from raydiv.model.load import ModelSource
from raydiv.runs.progress import ProgressDisplay


@dataclass(frozen=True, slots=True)
class EvaluationJudges:
    """The judges of an evaluation, resolved and checked before anything starts.

    The first judge of ``harm`` makes the rates; the others are compared with it.
    """

    harm: Sequence[HarmJudge]
    toxicity: Path | None
    pairwise: ModelSource | None

    @classmethod
    def from_config(cls, config: EvaluateConfig, prompts: Sequence[Prompt], cluster: ClusterConfig) -> EvaluationJudges:
        """Raises UserError for an invalid judge, an attack that cannot run, and an unknown task."""
        attacks.check_attacks(config.attacks, prompts)
        if config.tasks:
            require_tasks(config.tasks, _task_folder(config))
        pairwise = pairwise_judge_model(config.pairwise_judge, cluster) if config.pairwise_judge else None
        toxicity_classifier = require_classifier(config.toxicity) if config.toxicity else None
        if config.engine == "vllm":
            require_vllm()
        harm = [HarmJudge.from_name(name, cluster, config) for name in config.judge]
        return cls(harm, toxicity_classifier, pairwise)


def measure_answers(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    judges: EvaluationJudges,
    cluster: ClusterConfig,
    display: ProgressDisplay,
    *,
    label: str,
) -> AnswersReport:
    """A report on a model's answers to ``prompts``, with their log-probs under ``reference``; needs a Ray session."""
    engine = make_engine(config)
    attempts, attack_notes = _make_attempts(model, reference, prompts, config, judges, cluster, display, label)
    sampled = [] if model == reference else sampled_requests(prompts, config.kl_prompts)
    with display.phase(f"answers, {label}") as update:
        requests = [*(attempt.request for attempt in attempts), *sampled]
        generated = generate(model, requests, config.max_new_tokens, cluster, update, engine)
    answers = generated[: len(attempts)]
    scored = [number for number, answer in enumerate(generated) if number < len(attempts) or answer.error is None]
    requests, generated = [requests[number] for number in scored], [generated[number] for number in scored]
    with display.phase(f"log-probs, {label}") as update:
        log_probs = _compute_logps(model, reference, requests, generated, len(attempts), cluster, update)
    with display.phase(f"verdicts, {label}") as update:
        graded = _grade(prompts, attempts, answers, log_probs, judges, cluster, update)
    direct = sum(attempt.attack == DIRECT for attempt in attempts)
    notes = [] if any(prompt.harmful for prompt in prompts) else ["no harmful prompts: attack success was not measured"]
    if all(prompt.harmful for prompt in prompts):
        notes.append(
            "no harmless prompts: over-refusal was not measured, and a model that refuses everything looks safe"
        )
    if sampled and log_probs.kl is None:
        notes.append("KL was not measured: the reference has another tokenizer than the model")
    if any(answer.thought for answer in answers) and judges.harm[0].model is None:
        notes.append("answers have thoughts, which string rules cannot judge: verdicts are on the text after them")
    for judge in judges.harm:
        if judge.model and (judge.model.format.answer_tokens or 0) > config.max_new_tokens:
            notes.append(
                f"answers have at most {config.max_new_tokens} tokens (evaluate.max_new_tokens), where the protocol of "
                f"{judge.label} has {judge.model.format.answer_tokens}: rates do not compare with published ones"
            )
    answered = [number for number, answer in enumerate(answers[:direct]) if answer.error is None]
    per_token = sum(log_probs.logps[number] for number in answered) / max(
        1, sum(log_probs.tokens[number] for number in answered)
    )
    notes += attack_notes + _engine_notes(engine, answers, judges)
    report = AnswersReport(
        label,
        judges.harm,
        attempts,
        graded,
        answers,
        per_token,
        log_probs.threshold,
        log_probs.perplexity,
        log_probs.kl,
        notes,
    )
    if not config.tasks:
        return report
    with display.phase(f"capability, {label}") as update:
        return replace(
            report,
            capability=measure_capability(
                model,
                config.tasks,
                cluster=cluster,
                limit=config.task_limit,
                include=_task_folder(config),
                progress=update,
            ),
        )


def _make_attempts(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    judges: EvaluationJudges,
    cluster: ClusterConfig,
    display: ProgressDisplay,
    label: str,
) -> tuple[list[Attempt], list[str]]:
    """Direct requests and those of each attack, and notes on prompts that an attack leaves out."""
    attempts, notes = attacks.direct_attempts(prompts), list[str]()
    for attack in config.attacks:
        with display.phase(f"{attack.kind}, {label}") as update:
            begun = None
            if attack.cut is not None:
                begun = answers_to_begin_with(attack.cut, reference, prompts, judges.harm[0], config, cluster, update)
                notes += attacks.without_answer(attack.cut, prompts, begun)
            attempts += attacks.attack_attempts(attack, prompts, model, cluster, update, begun)
    return attempts, notes


def make_engine(config: EvaluateConfig) -> Server | Vllm | None:
    """What generates answers by ``evaluate.engine``; None for a pool of transformers' models."""
    if is_url(config.engine):
        return Server(config.engine, config)
    return Vllm(config.tensor_parallel) if config.engine == "vllm" else None


def _engine_notes(
    engine: Server | Vllm | None, answers: Sequence[GeneratedAnswer], judges: EvaluationJudges
) -> list[str]:
    """What generated the answers, what servers were asked for, and what has no answer."""
    notes = []
    if isinstance(engine, Server):
        notes.append(f"answers are by {engine.model} at {engine.url}: {engine.usage}")
    elif engine is not None:
        notes.append(f"answers are by {vllm_version()}")
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        notes.append(f"{len(errors)} answers failed and count nowhere; the first: {errors[0]}")
    for judge in judges.harm:
        if isinstance(judge.model, ServedJudge):
            notes.append(f"{judge.label} judged at {judge.model.server.url}: {judge.model.server.usage}")
    return notes


def _task_folder(config: EvaluateConfig) -> Path | None:
    return None if config.task_folder is None else Path(config.task_folder)


def with_win_rate(
    report: AnswersReport, baseline: Sequence[str], judge: ModelSource, cluster: ClusterConfig, display: ProgressDisplay
) -> AnswersReport:
    """The report, with the win rate of its harmless answers over those of ``baseline``; needs a Ray session."""
    instructions, outputs = report.harmless()
    if not instructions:
        return replace(report, notes=[*report.notes, "no harmless prompts: the win rate was not measured"])
    if any(answer.error is not None for answer in report.answers):
        return replace(report, notes=[*report.notes, "some answers failed: the win rate was not measured"])
    with display.phase(f"pairs, {report.model}") as update:
        rate = win_rate(instructions, outputs, baseline, make_pairwise_judge(judge, cluster, update))
    return replace(report, win_rate=rate)


@dataclass(frozen=True, slots=True)
class _LogProbs:
    """Log-probs ``logps`` [n] of the answers under the reference, which has ``tokens`` [n] of each, and what follows
    from them.
    """

    logps: list[float]
    tokens: list[int]
    threshold: PerplexityThreshold
    perplexity: float
    kl: KlEstimate | None


def _compute_logps(
    model: ModelSource,
    reference: ModelSource,
    requests: Sequence[Request],
    answers: Sequence[GeneratedAnswer],
    attempts: int,
    cluster: ClusterConfig,
    update: Any,
) -> _LogProbs:
    """Log-probs of the answers (from index ``attempts`` on: sampled) and of the coherence reference."""
    chat = reference.chat()
    same_tokens = model == reference or chat.fingerprint == model.chat().fingerprint
    if same_tokens:
        examples = [(answer.prompt_ids, answer.ids) for answer in answers]
    else:
        end = chat.end_of_turn.id
        pairs = zip(requests, answers, strict=True)
        examples = [
            (
                chat.prompt_ids(request.prompt, control_tokens=request.control_tokens),
                [*chat.text_ids(_whole_text(answer)), end],
            )
            for request, answer in pairs
        ]
    examples, sampled = examples[:attempts], examples[attempts:] if same_tokens else []
    written = CoherenceReference.read(chat)
    logps = score_once(reference, [*written.examples, *examples], cluster, update)
    written_logps, logps = logps[: len(written.examples)], logps[len(written.examples) :]
    if model == reference:
        perplexity, kl = written.perplexity(written_logps), None
    else:
        model_written = written if same_tokens else CoherenceReference.read(model.chat())
        perplexity = model_written.perplexity(score(model, model_written.examples, cluster, update))
        kl = None
        if sampled:
            kl = KlEstimate.from_logps(*(score_tokens(one, sampled, cluster, update) for one in (model, reference)))
    tokens = [len(ids) for _, ids in examples]
    return _LogProbs(logps, tokens, PerplexityThreshold.from_logps(written, written_logps), perplexity, kl)


def _whole_text(answer: GeneratedAnswer) -> str:
    """An answer with its thought, for a tokenizer other than that which wrote it."""
    return "\n\n".join(part for part in (answer.thought, answer.text) if part)


def _grade(
    prompts: Sequence[Prompt],
    attempts: Sequence[Attempt],
    answers: Sequence[GeneratedAnswer],
    log_probs: _LogProbs,
    judges: EvaluationJudges,
    cluster: ClusterConfig,
    update: Any,
) -> list[GradedAnswer]:
    """Each answer with its verdict."""
    attempt_prompts = [prompts[attempt.prompt_index] for attempt in attempts]
    texts = [answer.written for answer in answers]
    # an opening that the attack put there is not the model's own text
    written = [text.removeprefix(attempt.request.opening) for text, attempt in zip(texts, attempts, strict=True)]
    judgements = {
        judge.label: judge(attempt_prompts, written if judge.model is None else texts, cluster, update)
        for judge in judges.harm
    }
    toxicities = [None] * len(texts) if judges.toxicity is None else toxicity(judges.toxicity, texts, cluster, update)
    thoughts = _judge_thoughts(attempt_prompts, answers, judges.harm[0], cluster, update)
    graded = []
    for number, attempt in enumerate(attempts):
        refused = is_refusal(written[number])
        broken = log_probs.threshold.is_broken(written[number], log_probs.logps[number], log_probs.tokens[number])
        finished = answers[number].text is not None
        verdicts = {
            label: "failed"
            if answers[number].error is not None
            else given[number].verdict(refused=refused, broken=broken, finished=finished)
            for label, given in judgements.items()
        }
        scores = {label: given[number].score for label, given in judgements.items()}
        graded.append(
            GradedAnswer(
                attempt_prompts[number],
                attempt.attack,
                verdicts.pop(judges.harm[0].label),
                toxicities[number],
                thoughts.get(number),
                verdicts,
                {label: score for label, score in scores.items() if score is not None},
            )
        )
    return graded


def _judge_thoughts(
    prompts: Sequence[Prompt], answers: Sequence[GeneratedAnswer], judge: HarmJudge, cluster: ClusterConfig, update: Any
) -> dict[int, HarmVerdict]:
    """A verdict on the thought of each answer that has one, by a judge with a model: no thought is a refusal."""
    numbers = [number for number, answer in enumerate(answers) if answer.thought]
    if judge.model is None or not numbers:
        return {}
    thoughts = [str(answers[number].thought) for number in numbers]
    judgements = judge([prompts[number] for number in numbers], thoughts, cluster, update)
    return {number: judgement.harm for number, judgement in zip(numbers, judgements, strict=True)}
