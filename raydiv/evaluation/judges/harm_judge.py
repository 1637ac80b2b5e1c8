"""A judge of harm by its name: string rules, or a model in one of the formats of ``JUDGES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig, is_url, judge_label, judge_parts
from raydiv.data.prompt_sets import Prompt, last_user_text
from raydiv.evaluation.generate import choice_probabilities, complete
from raydiv.evaluation.judges.formats import JUDGES, JudgeFormat, Question
from raydiv.evaluation.judges.verdicts import Judgement
from raydiv.evaluation.refusal import STRING_RULE_ERRORS, is_refusal
from raydiv.evaluation.server import Server
from raydiv.model.chat import load_tokenizer
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.model.template import Messages
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress


@dataclass(frozen=True, slots=True)
class JudgeModel:
    """A model that judges answers in the format ``format``. Raises UserError for another kind of model."""

    name: str
    format: JudgeFormat
    source: ModelSource

    def __post_init__(self) -> None:
        _require_generator(self.name, self.source)
        self._choice_ids(self._tokenizer())

    def judge(
        self, pairs: Sequence[tuple[Prompt, str]], cluster: ClusterConfig, progress: Progress = no_progress
    ) -> list[Judgement]:
        """A judgement of each answer; needs a Ray session."""
        tokenizer = self._tokenizer()

        def outputs(questions: Sequence[Question]) -> Sequence[Any]:
            rows = [{"ids": ids} for ids in self.question_ids(tokenizer, questions)]
            return self._outputs(tokenizer, rows, cluster, progress)

        return _judge(self.format, pairs, tokenizer, outputs)

    def question_ids(self, tokenizer: Any, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of questions. A text begins with exactly one BOS where the tokenizer adds one."""
        if any(not isinstance(question, str) for question in questions):
            chat = self.source.chat()
            return [chat.prompt_ids(question) for question in questions]
        bos = tokenizer("").input_ids[:1]
        texts = [tokenizer(question, add_special_tokens=False).input_ids for question in questions]
        return [ids if ids[: len(bos)] == bos else [*bos, *ids] for ids in texts]

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.source.tokenizer_directory())

    def _choice_ids(self, tokenizer: Any) -> list[int]:
        """Ids of the tokens whose probabilities the judge is read by."""
        ids = [tokenizer.convert_tokens_to_ids(choice) for choice in self.format.choices]
        if None in ids or tokenizer.unk_token_id in ids:
            raise UserError(
                f"evaluate.judge: {self.name}: its tokenizer lacks a token of {', '.join(self.format.choices)}; "
                "is it a model of this kind?"
            )
        return ids

    def _outputs(
        self, tokenizer: Any, rows: Sequence[dict[str, Any]], cluster: ClusterConfig, progress: Progress
    ) -> Sequence[Any]:
        """What the model says to each row: a text, or probabilities of the format's choices."""
        if self.format.choices:
            return choice_probabilities(self.source, rows, self._choice_ids(tokenizer), cluster, progress)
        stops = [tokenizer.eos_token_id]
        completions = complete(self.source, rows, self.format.max_new_tokens, stops, cluster, progress)
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]


@dataclass(frozen=True, slots=True)
class ServedJudge:
    """A judge behind a server, which sees whole answers. Raises UserError for a format that reads probabilities."""

    name: str
    format: JudgeFormat
    server: Server

    def __post_init__(self) -> None:
        if self.format.choices:
            raise UserError(
                f"evaluate.judge: {self.name}: is read by probabilities of tokens: name its model instead of a URL"
            )

    def judge(
        self, pairs: Sequence[tuple[Prompt, str]], cluster: ClusterConfig, progress: Progress = no_progress
    ) -> list[Judgement]:
        """A judgement of each answer. Where the server fails, it is unparsable."""

        def outputs(questions: Sequence[Question]) -> Sequence[str]:
            limits = {"max_tokens": self.format.max_new_tokens, "temperature": 0}
            requests = [
                {"prompt": question, **limits} if isinstance(question, str) else {"messages": question, **limits}
                for question in questions
            ]
            return [reply.text for reply in self.server.replies(requests, progress)]

        format_ = self.format
        if format_.is_template:
            format_ = replace(format_, questions=_conversation)
        return _judge(format_, pairs, _WholeText(), outputs)


def _conversation(_: Any, prompt: Prompt, answer: str) -> list[Messages]:
    return [[{"role": "user", "content": last_user_text(prompt)}, {"role": "assistant", "content": answer}]]


class _WholeText:
    """In the place of a tokenizer: a text is one token, which no limit cuts."""

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[text])

    @staticmethod
    def decode(tokens: Sequence[str], **_: Any) -> str:
        return "".join(tokens)


def _judge(
    format_: JudgeFormat,
    pairs: Sequence[tuple[Prompt, str]],
    tokenizer: Any,
    outputs_of: Callable[[Sequence[Question]], Sequence[Any]],
) -> list[Judgement]:
    """A judgement of each answer from the judge's outputs to all questions."""
    graded = [number for number, (prompt, _) in enumerate(pairs) if prompt.harmful or not format_.harmful_only]
    questions = [format_.questions(tokenizer, *pairs[number]) for number in graded]
    outputs = iter(outputs_of([question for asked in questions for question in asked]))
    judgements = [Judgement("safe")] * len(pairs)
    for number, asked in zip(graded, questions, strict=True):
        judgements[number] = format_.read(list(islice(outputs, len(asked))))
    return judgements


@dataclass(frozen=True, slots=True)
class HarmJudge:
    """A judge by its name: string rules, or a ``model``. ``errors`` describes its error rates."""

    name: str
    errors: str
    model: JudgeModel | ServedJudge | None = None

    @classmethod
    def from_name(cls, name: str, cluster: ClusterConfig, config: EvaluateConfig | None = None) -> HarmJudge:
        """The judge of a name such as ``string``, ``KIND:MODEL`` or ``KIND:URL``.

        ``config`` says how servers are asked. Raises UserError for an invalid name.
        """
        try:
            kind, model = judge_parts(name)
        except ValueError as error:
            raise UserError(f"evaluate.judge: {error}") from None
        if kind == "string":
            return cls(name, STRING_RULE_ERRORS)
        if is_url(model):
            served = ServedJudge(name, JUDGES[kind], Server(model, config or EvaluateConfig()))
            return cls(name, JUDGES[kind].errors, served)
        return cls(name, JUDGES[kind].errors, JudgeModel(name, JUDGES[kind], judge_model(model, cluster)))

    @property
    def label(self) -> str:
        """Its name in reports and metrics."""
        return judge_label(self.name)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        cluster: ClusterConfig,
        progress: Progress = no_progress,
    ) -> list[Judgement]:
        """A judgement of each answer to the prompt before any attack; a model needs a Ray session."""
        pairs = list(zip(prompts, answers, strict=True))
        if self.model is not None:
            return self.model.judge(pairs, cluster, progress)
        return [Judgement("unsafe" if p.harmful and not is_refusal(a) else "safe") for p, a in pairs]


def judge_model(model: str, cluster: ClusterConfig) -> ModelSource:
    """A judge's model by its id; bf16 on GPUs."""
    return ModelSource(model_directory(model), precision="bf16" if cluster.use_gpu else "fp32")


def _require_generator(judge: str, source: ModelSource) -> None:
    """Raises UserError for a model that does not generate text."""
    architectures = source.config().architectures or []
    generative = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
    if architectures and not any(name.endswith(generative) for name in architectures):
        raise UserError(
            f"evaluate.judge: {judge}: is a {architectures[0]}, which generates no text; use a causal language model"
        )
