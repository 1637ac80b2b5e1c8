"""Prompts of one class with the responses that their source has for them, whatever format it is in."""

from __future__ import annotations

from dataclasses import dataclass, field

from raydiv.config.source import Source
from raydiv.data.formats import AS_IT_IS, FORMATS, BadRow, Example, Record, format_of, text
from raydiv.data.sources import iterate_records
from raydiv.model.chat import Messages
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt, where it stands, and its source's first response of either kind, by whether it is aligned."""

    key: str
    prompt: str | Messages
    harmful: bool
    where: str
    responses: dict[bool, str]


@dataclass(slots=True)
class CollectedPrompts:
    """A source's prompts by their key, and what of it is left out: rows and single responses that came too late."""

    prompts: dict[str, AnsweredPrompt] = field(default_factory=dict)
    duplicates: int = 0
    further_responses: int = 0


def collect(source: Source, harmful: bool) -> CollectedPrompts:
    """The prompts of a source small enough for this process, all of them ``harmful`` or none.

    Besides the known formats it may hold ``prompt, response`` or Alpaca's ``instruction, input, output``: a lone response to
    a harmful prompt is a compliance, and one to a harmless prompt a good answer. Raises UserError for a record that is
    wrong or labelled otherwise, naming file and record, and for a source that holds none.
    """
    found = CollectedPrompts()
    for where, record in iterate_records(source):
        try:
            examples = _examples(record, where, harmful)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
        prompt = _plain(examples[0].prompt)
        key = digest(prompt)
        answered = found.prompts.setdefault(key, AnsweredPrompt(key, prompt, harmful, where, {}))
        # a prompt's two sides may stand in two rows; of several on one side the first stays
        fresh = {one.aligned: one.response for one in reversed(examples) if one.aligned not in answered.responses}
        answered.responses.update(fresh)
        found.duplicates += not fresh
        found.further_responses += len(examples) - len(fresh) if fresh else 0
    if not found.prompts:
        raise UserError(f"{source.path}: holds no prompts")
    return found


def _examples(record: Record, where: str, harmful: bool) -> list[Example]:
    """The examples of a record of any known format, or of one without labels. Raises BadRow."""
    known = any(columns <= record.keys() for columns, _ in FORMATS)
    examples = AS_IT_IS.examples(record if known else _labelled(record, harmful), where)
    if examples[0].harmful is (not harmful):
        label, others = ("harmless", "harmful") if harmful else ("harmful", "harmless")
        raise BadRow(f"is labelled {label}, and stands in the source of {others} prompts")
    return examples


def _labelled(record: Record, harmful: bool) -> Record:
    """A record of a prompt and one response, or of Alpaca's columns, as raydiv's own. Raises BadRow for others."""
    if {"instruction", "output"} <= record.keys():
        record = {**record, "prompt": _alpaca_prompt(record), "response": record["output"]}
    if not {"prompt", "response"} <= record.keys():
        try:
            format_of(record)
        except BadRow as error:
            raise BadRow(f"{error}; here also prompt, response, or instruction, input, output") from None
    own = {name: record.get(name) for name in ("prompt", "response", "harmful")}
    return own | {"aligned": not harmful}


def _alpaca_prompt(record: Record) -> str:
    """Instruction, and the input where there is any (Alpaca writes an empty text where there is none)."""
    parts = ["instruction"] if record.get("input") in (None, "") else ["instruction", "input"]
    return "\n\n".join(text(record, part) for part in parts)


def _plain(prompt: str | Messages) -> str | Messages:
    """The one way to write a prompt: a conversation of a single user turn is its text, without the space around it."""
    if isinstance(prompt, list) and [turn["role"] for turn in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    return prompt.strip() if isinstance(prompt, str) else prompt
