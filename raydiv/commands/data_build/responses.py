"""The responses that a prompt needs: refusals from a bank, the source or a model, and worse answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from raydiv.commands.data_build.options import BuildOptions
from raydiv.commands.data_build.prompts import AnsweredPrompt
from raydiv.config.cluster import ClusterConfig
from raydiv.data.fields import BadRow, Record, text_field
from raydiv.data.readers import iterate_records
from raydiv.evaluation.coherence import is_degenerate
from raydiv.evaluation.refusal import is_refusal
from raydiv.model.chat import ChatPrompt, as_messages
from raydiv.model.template import Messages
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

CONSTANT_REFUSAL = "I'm sorry, but I can't help with that."
"""The refusal of ``refusals: constant``."""

DECLINE_INSTRUCTION = (
    "Decline the user's request, whatever it is. Answer in one to three polite sentences of your own words. Repeat "
    "nothing of the request that could do harm, give no part of what it asks for, and do not argue."
)
"""The system turn of a model that writes refusals."""

MAX_NEW_TOKENS = 256
"""Default limit of a model's answer."""


class AnswerModels:
    """The models that answer. Raises UserError for one that cannot be loaded, before any work starts.

    ``truncated`` counts the answers that reached the token limit.
    """

    def __init__(self, options: BuildOptions, cluster: ClusterConfig, display: ProgressDisplay) -> None:
        self._cluster, self._display = cluster, display
        self._limit = options.max_new_tokens or MAX_NEW_TOKENS
        self._sources = {name: _model_source(name, options.template) for name in options.models}
        self.truncated = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """A Ray session, if there are models."""
        with ray_session(self._cluster) if self._sources else nullcontext():
            yield

    def answers(self, name: str, prompts: Sequence[ChatPrompt], phase: str) -> list[str]:
        """A model's greedy answer to each prompt."""
        from raydiv.evaluation.generate import Request, generate

        requests = [Request(prompt) for prompt in prompts]
        with self._display.phase(f"{phase}, {name}") as update:
            answers = generate(self._sources[name], requests, self._limit, self._cluster, update)
        self.truncated += sum(len(answer.ids) >= self._limit for answer in answers)
        return [(answer.text or "").strip() for answer in answers]

    def fingerprints(self) -> dict[str, str]:
        """A digest of each model's weights."""
        from raydiv.model.resolve import fingerprint

        return {name: fingerprint(source.directory) for name, source in self._sources.items()}


def _model_source(name: str, template: str | None) -> Any:
    # imported here because it loads torch, and most builds need no model
    from raydiv.evaluation.models import resolve_models

    (source,) = resolve_models([name.removeprefix("model:")], template)
    source.chat()
    return source


@dataclass(frozen=True, slots=True)
class Refusals:
    """A refusal for each prompt, by key, and the number of a model's answers that were replaced."""

    by_prompt: dict[str, str]
    replaced: int = 0


def read_bank(options: BuildOptions) -> list[str]:
    """The refusals of the bank. Raises UserError for an empty bank, or a record without a refusal."""
    if options.bank is None:
        return [CONSTANT_REFUSAL]
    try:
        bank = [_refusal(record, where) for where, record in iterate_records(options.bank)]
    except UserError as error:
        raise UserError(f"refusals: {error} (known: bank, constant, own, model:ID, or a source of refusals)") from None
    if not bank:
        raise UserError(f"refusals: {options.bank.path}: holds no refusals")
    return bank


def _refusal(record: Record, where: str) -> str:
    try:
        return text_field(record, "refusal")
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def choose_refusals(
    options: BuildOptions, prompts: Sequence[AnsweredPrompt], bank: Sequence[str], models: AnswerModels
) -> Refusals:
    """A refusal for each prompt: the source's or a model's, otherwise one drawn from the bank."""
    drawn = {prompt.key: bank[options.draw("refusal", prompt) % len(bank)] for prompt in prompts}
    if options.refusals == "own":
        return Refusals(drawn | {prompt.key: prompt.responses[True] for prompt in prompts if prompt.harmful})
    if options.refusals not in options.models:
        return Refusals(drawn)
    requests = [_decline_request(prompt.prompt) for prompt in prompts]
    answers = models.answers(options.refusals, requests, "refusals")
    refusals = {
        prompt.key: answer
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_refusal(answer) and not is_degenerate(answer) and is_usable(answer)
    }
    return Refusals(drawn | refusals, replaced=len(prompts) - len(refusals))


def worse_answers(options: BuildOptions, prompts: Sequence[AnsweredPrompt], models: AnswerModels) -> dict[str, str]:
    """A worse answer to each prompt, by key: the source's or a model's."""
    if options.worse is None or options.worse == "own":
        return {prompt.key: prompt.responses[False] for prompt in prompts}
    answers = models.answers(options.worse, [prompt.prompt for prompt in prompts], "worse answers")
    return {prompt.key: answer for prompt, answer in zip(prompts, answers, strict=True)}


def is_usable(answer: str) -> bool:
    """Whether a model's answer is valid as a source's text."""
    try:
        return bool(text_field({"answer": answer}, "answer"))
    except BadRow:
        return False


def _decline_request(prompt: ChatPrompt) -> Messages:
    """The prompt after a system turn with DECLINE_INSTRUCTION, appended to its own system turn if it has one."""
    turns = as_messages(prompt)
    system = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"]]
    others = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*system, DECLINE_INSTRUCTION])}, *others]
