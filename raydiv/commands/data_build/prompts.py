"""The prompts of one class with the responses that their source has, in any format."""

from __future__ import annotations

from dataclasses import dataclass, field

from raydiv.config.source import Source
from raydiv.data.fields import BadRow, Record, text_field
from raydiv.data.formats import Example, convert, format_of
from raydiv.data.readers import iterate_records
from raydiv.model.chat import ChatPrompt, Conversation, in_one_notation
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt, its file and line, and its source's first aligned and first unaligned response (by ``aligned``)."""

    key: str
    prompt: ChatPrompt
    harmful: bool
    where: str
    responses: dict[bool, str]


@dataclass(slots=True)
class CollectedPrompts:
    """A source's prompts by key, and counts of duplicate rows and of further responses on one side, both left out."""

    prompts: dict[str, AnsweredPrompt] = field(default_factory=dict)
    duplicates: int = 0
    further_responses: int = 0


def collect(source: Source, harmful: bool) -> CollectedPrompts:
    """The prompts of a source that fits into this process; all are ``harmful``, or none.

    Besides the known formats, the source may have columns ``prompt, response`` or Alpaca's ``instruction, input,
    output``. The response to a harmful prompt then counts as unaligned (a compliance), that to a harmless prompt as
    aligned. Raises UserError, naming file and line, for a bad row or one with the other label, and for a source without
    prompts.
    """
    collected = CollectedPrompts()
    for where, record in iterate_records(source):
        try:
            examples = _examples(record, where, harmful)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
        prompt = _canonical(examples[0].prompt)
        key = digest(prompt)
        answered = collected.prompts.setdefault(key, AnsweredPrompt(key, prompt, harmful, where, {}))
        # a prompt's two sides may be in two rows; the first response of a side counts
        new = {e.aligned: str(e.response) for e in reversed(examples) if e.aligned not in answered.responses}
        answered.responses.update(new)
        collected.duplicates += not new
        collected.further_responses += len(examples) - len(new) if new else 0
    if not collected.prompts:
        raise UserError(f"{source.path}: holds no prompts")
    return collected


def _examples(record: Record, where: str, harmful: bool) -> list[Example]:
    """The examples of a record of a known format, or of one without labels. Raises BadRow."""
    examples = convert(_labelled(record, harmful), where).examples
    if isinstance(examples[0].prompt, Conversation) or not all(isinstance(e.response, str) for e in examples):
        raise BadRow(
            "has tools, chat_template_kwargs, reasoning_content or tool_calls, which data build does not write"
        )
    if examples[0].harmful is (not harmful):
        label, expected = ("harmless", "harmful") if harmful else ("harmful", "harmless")
        raise BadRow(f"is labelled {label}, in the source of {expected} prompts")
    return examples


def _labelled(record: Record, harmful: bool) -> Record:
    """A record of a known format, or of a prompt and one response or Alpaca's columns in raydiv's. Raises BadRow."""
    if format_of(record) is not None:
        return record
    if {"instruction", "output"} <= record.keys():
        record = {**record, "prompt": _alpaca_prompt(record), "response": record["output"]}
    if not {"prompt", "response"} <= record.keys():
        try:
            convert(record, "")
        except BadRow as error:
            raise BadRow(f"{error}; known here also: prompt, response, or instruction, input, output") from None
    return {name: record.get(name) for name in ("prompt", "response", "harmful")} | {"aligned": not harmful}


def _alpaca_prompt(record: Record) -> str:
    """The instruction, followed by the input if there is one (Alpaca has an empty text for none)."""
    columns = ["instruction"] if record.get("input") in (None, "") else ["instruction", "input"]
    return "\n\n".join(text_field(record, column) for column in columns)


def _canonical(prompt: ChatPrompt) -> ChatPrompt:
    """The prompt in one notation: text without surrounding spaces for a conversation of a single user turn."""
    prompt = prompt if isinstance(prompt, Conversation) else in_one_notation(prompt)
    return prompt.strip() if isinstance(prompt, str) else prompt
