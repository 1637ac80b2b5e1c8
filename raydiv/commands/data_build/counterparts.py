"""The response that a prompt's source does not give: refusals, from a bank, the source or a model, and worse answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from raydiv.commands.data_build.answered import AnsweredPrompt
from raydiv.commands.data_build.options import BuildOptions
from raydiv.config.cluster import ClusterConfig
from raydiv.data.formats import BadRow, Record, text
from raydiv.data.sources import iterate_records
from raydiv.evaluation.coherence import is_degenerate
from raydiv.evaluation.refusal import is_refusal
from raydiv.model.chat import Messages, as_turns
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

CONSTANT = "I'm sorry, but I can't help with that."
"""The refusal of ``refusals: constant``."""

DECLINE = (
    "Decline the user's request, whatever it is. Answer in one to three polite sentences of your own words. Repeat nothing "
    "of the request that could do harm, give no part of what it asks for, and do not argue."
)
"""What a model that writes refusals is told in its system turn."""

MAX_NEW_TOKENS = 256
"""Tokens of a model's answer, unless the user says otherwise."""


class Models:
    """The models that a plan asks. Raises UserError for one that cannot be asked, before any work is done.

    ``cut`` counts the answers that were as long as they might get.
    """

    def __init__(self, plan: BuildOptions, cluster: ClusterConfig, display: ProgressDisplay) -> None:
        self._cluster, self._display = cluster, display
        self._limit = plan.max_new_tokens or MAX_NEW_TOKENS
        self._sources = {name: _model(name, plan.template) for name in plan.models}
        self.cut = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """A Ray session, where any model is asked."""
        with ray_session(self._cluster) if self._sources else nullcontext():
            yield

    def ask(self, name: str, prompts: Sequence[str | Messages], what: str) -> list[str]:
        """A model's greedy answer to each prompt."""
        from raydiv.evaluation.generate import Request, generate

        requests = [Request(prompt) for prompt in prompts]
        with self._display.phase(f"{what}, {name}") as update:
            answers = generate(self._sources[name], requests, self._limit, self._cluster, update)
        self.cut += sum(len(answer.ids) >= self._limit for answer in answers)
        return [answer.text.strip() for answer in answers]

    def fingerprints(self) -> dict[str, str]:
        """A digest of each model's weights."""
        from raydiv.model.resolve import fingerprint

        return {name: fingerprint(source.directory) for name, source in self._sources.items()}


def _model(name: str, template: str | None) -> Any:
    # imported here, since torch comes with them, and most builds ask no model
    from raydiv.evaluation.models import sources_of

    (source,) = sources_of([name.removeprefix("model:")], template)
    source.chat()
    return source


@dataclass(frozen=True, slots=True)
class Refusals:
    """A refusal of each prompt by its key, and how many of them a model failed to give."""

    given: dict[str, str]
    replaced: int = 0


def read_bank(plan: BuildOptions) -> list[str]:
    """The refusals of the plan's bank. Raises UserError where there is none, or a record without one."""
    if plan.bank is None:
        return [CONSTANT]
    bank = []
    try:
        for where, record in iterate_records(plan.bank):
            bank.append(_refusal(record, where))
    except UserError as error:
        raise UserError(f"refusals: {error} (known: bank, constant, own, model:ID, or a source of refusals)") from None
    if not bank:
        raise UserError(f"refusals: {plan.bank.path}: holds none")
    return bank


def _refusal(record: Record, where: str) -> str:
    try:
        return text(record, "refusal")
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def refusals_of(plan: BuildOptions, prompts: Sequence[AnsweredPrompt], bank: Sequence[str], models: Models) -> Refusals:
    """Refusals as the plan has them; one of the bank where the source has none to give, or a model did not refuse."""
    drawn = {prompt.key: bank[plan.draw("refusal", prompt) % len(bank)] for prompt in prompts}
    if plan.refusals == "own":
        own = {prompt.key: prompt.responses[True] for prompt in prompts if prompt.harmful}
        return Refusals(drawn | own)
    if plan.refusals not in plan.models:
        return Refusals(drawn)
    told = [_told(prompt.prompt) for prompt in prompts]
    answers = models.ask(plan.refusals, told, "refusals")
    refused = {
        prompt.key: answer
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_refusal(answer) and not is_degenerate(answer) and usable(answer)
    }
    return Refusals(drawn | refused, len(prompts) - len(refused))


def worse_answers(plan: BuildOptions, prompts: Sequence[AnsweredPrompt], models: Models) -> dict[str, str]:
    """A worse answer to each prompt by its key, as the plan has them."""
    if plan.worse is None or plan.worse == "own":
        return {prompt.key: prompt.responses[False] for prompt in prompts}
    answers = models.ask(plan.worse, [prompt.prompt for prompt in prompts], "worse answers")
    return {prompt.key: answer for prompt, answer in zip(prompts, answers, strict=True)}


def usable(answer: str) -> bool:
    """Whether a model's answer is text that a source may hold."""
    try:
        return bool(text({"answer": answer}, "answer"))
    except BadRow:
        return False


def _told(prompt: str | Messages) -> Messages:
    """The prompt after a system turn that says to decline it; a system turn that is there already goes on with that."""
    turns = as_turns(prompt)
    words = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"]]
    others = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*words, DECLINE])}, *others]
