"""Formats of examples: recognised by their columns, and converted to raydiv's example schema.

To add a format, add it to ``FORMATS`` with the function that converts a record to examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from raydiv.data.fields import (
    BadRow,
    Record,
    asked_turns,
    bool_field,
    conversation,
    describe,
    human_turns,
    prompt_field,
    response_field,
    spelling_of,
    text_field,
    text_list_field,
    valid_text,
)
from raydiv.data.notes import Note
from raydiv.model.chat import ChatPrompt, Response, as_messages
from raydiv.model.template import Messages


@dataclass(frozen=True, slots=True)
class Example:
    """One (prompt, response) with its label; see raydiv/data/README.md for the schema.

    ``prompt`` is text or chat messages; ``harmful`` is the prompt's label, None if the source has none; ``pair`` names
    the pair within its source; ``source`` is the file and line.
    """

    prompt: ChatPrompt
    response: Response
    aligned: bool
    harmful: bool | None
    pair: str | None
    source: str
    notes: Note = Note.NONE


Converter = Callable[[Record, str], list[Example]]
"""From a record and its file and line to its examples. Raises BadRow."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format: the columns that a record of it has, its converter, and the columns of the labels of its examples.

    ``name`` is for reports. ``optional``: further columns that the converter reads.
    """

    name: str
    columns: tuple[str, ...]
    convert: Converter
    label: str | None = None
    harmful: str = "harmful"
    optional: tuple[str, ...] = ("harmful",)

    def unread(self, record: Record) -> frozenset[str]:
        """The columns of a record that its converter does not read."""
        return frozenset(record).difference(self.columns, self.optional, CONTEXT_COLUMNS)


CONTEXT_COLUMNS = ("system", "tools", "chat_template_kwargs")
"""Columns that every format may have, for the chat template."""

HONOURED_ELSEWHERE = frozenset(
    {"images", "videos", "audios", "image", "video", "audio", "documents"}
    | {"history", "input", "system_prompt", "rejected_response"}
)
"""Columns that other tools read, and raydiv does not: without them a row means something else."""


@dataclass(frozen=True, slots=True)
class ConvertedRecord:
    """The examples of a record, its format, the columns that were not read, and how its labels are spelled."""

    examples: list[Example]
    format: Format
    unread: frozenset[str]
    label_spelling: str
    harmful_spelling: str


@dataclass(frozen=True, slots=True)
class RecordReader:
    """How a source's records are read: its names for a format's columns, and the values of columns that it lacks.

    ``ignore``: columns that are left out. ``prefer``: by which of its columns PKU-SafeRLHF's response is preferred.
    ``rendered``: prompts are taken as they are.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    prefer: str = "safer"
    rendered: bool = False

    def examples(self, record: Any, where: str) -> list[Example]:
        """The examples of a record. Raises BadRow."""
        return self.convert(record, where).examples

    def convert(self, record: Any, where: str) -> ConvertedRecord:
        """The examples of a record, and what is told of it. Raises BadRow."""
        return convert(self.rename_columns(record), where)

    def rename_columns(self, record: Any) -> Record:
        """The record with the column names of its format. Raises BadRow for a value that is not a record."""
        if not isinstance(record, Mapping):
            raise BadRow(f"a record is a mapping of columns, found {describe(record)}")
        missing = sorted(name for name in self.columns.values() if name not in record)
        if missing:
            raise BadRow(f"no column {', '.join(missing)}, which data.columns names")
        left_out = {*self.columns.values(), *self.ignore}
        unmapped = {name: value for name, value in record.items() if name not in left_out}
        renamed = {**self.constants, **unmapped, **{name: record[theirs] for name, theirs in self.columns.items()}}
        prompt = renamed.get("prompt")
        if isinstance(prompt, str) and not self.rendered:
            renamed["prompt"] = asked_turns(prompt) or prompt
        preference = f"{self.prefer}_response_id"
        if preference in renamed and "response_0" in renamed:
            renamed.setdefault(PREFERRED, renamed.pop(preference))
        return renamed


CANONICAL = RecordReader()
"""Reads records that have a format's column names already."""


def convert(record: Record, where: str) -> ConvertedRecord:
    """The examples of a record with a format's column names. Raises BadRow."""
    if record.get("aligned") is not None and record.get("label") is not None:
        raise BadRow("has both aligned and label, two columns for one label; keep one (data.columns can rename)")
    form = format_of(record) or _unknown_format(record)
    unread = form.unread(record)
    honoured = [name for name in sorted(unread & HONOURED_ELSEWHERE) if record[name] not in (None, "", [])]
    if honoured:
        raise BadRow(
            f"column {honoured[0]} changes what a row means in other tools, and raydiv does not read it; leave it out "
            f"with data.ignore=[{honoured[0]}]"
        )
    label = "" if form.label is None else spelling_of(record[form.label])
    return ConvertedRecord(form.convert(record, where), form, unread, label, spelling_of(record.get(form.harmful)))


def format_of(record: Record) -> Format | None:
    """The first format whose columns a record has."""
    return next((form for form in FORMATS if all(column in record for column in form.columns)), None)


def _unknown_format(record: Record) -> NoReturn:
    # a CSV file without a header has its first row for column names: text that must not be shown
    names = sorted(str(name) for name in record if str(name).isidentifier() and len(str(name)) <= 30)
    others = f" and {len(record) - len(names)} that are not identifiers" if len(names) < len(record) else ""
    known = "; ".join(", ".join(form.columns) for form in FORMATS)
    raise BadRow(
        f"unknown format: columns {', '.join(names)}{others} (known formats: {known}); map the names with data.columns"
    )


def _harmful(record: Record) -> bool | None:
    return None if record.get("harmful") is None else bool_field(record, "harmful")


def _pair(prompt: ChatPrompt, sides: tuple[Response, Response], record: Record, where: str) -> list[Example]:
    """A pair of a preferred and another response to a prompt."""
    harmful = _harmful(record)
    return [
        Example(prompt, response, aligned, harmful, where, where)
        for response, aligned in zip(sides, (True, False), strict=True)
    ]


def _from_raydiv(record: Record, where: str) -> list[Example]:
    """Raydiv's schema: prompt, response, aligned, harmful, pair."""
    pair = None if record.get("pair") is None else valid_text(str(record["pair"]), "pair")
    prompt, response = prompt_field(record), response_field(record, "response")
    return [Example(prompt, response, bool_field(record, "aligned"), _harmful(record), pair, where)]


def _from_preference(record: Record, where: str) -> list[Example]:
    """TRL's prompt/chosen/rejected; ``harmful`` is optional. Both sides may be whole conversations (UltraFeedback)."""
    conversations = [_repeated_conversation(record[field]) for field in ("chosen", "rejected")]
    if all(conversations):
        _require_repeated_prompt(record["prompt"], conversations)
        whole = {"chosen": conversations[0], "rejected": conversations[1]}
        return _from_implicit_preference({**record, **whole}, where)
    sides = response_field(record, "chosen"), response_field(record, "rejected")
    return _pair(prompt_field(record), sides, record, where)


def _repeated_conversation(side: Any) -> list[Any]:
    """A side that is a conversation and not an answer alone: several messages, or text of turns after Human:."""
    turns = human_turns(side) if isinstance(side, str) and side.lstrip().startswith("Human:") else side
    return turns if isinstance(turns, list) and len(turns) > 1 else []


def _require_repeated_prompt(asked: Any, conversations: Sequence[Any]) -> None:
    """Raise BadRow unless both conversations have the prompt at their beginning, or before their last answer."""
    prompt = (
        conversation(asked, "prompt")
        if isinstance(asked, list)
        else as_messages(text_field({"prompt": asked}, "prompt"))
    )
    for side, name in zip(conversations, ("chosen", "rejected"), strict=True):
        context = conversation(side, name)[:-1]
        first = int(context[0]["role"] == "system" and prompt[0]["role"] != "system")
        if prompt not in (context[first : first + len(prompt)], context[-len(prompt) :]):
            raise BadRow(f"{name} is a conversation that does not have the prompt in it")


def _from_implicit_preference(record: Record, where: str) -> list[Example]:
    """TRL's chosen/rejected conversations, or HH-RLHF's as text; their common beginning is the prompt.

    Where the sides part before their last turn, each last answer keeps the turns before it, and has no partner.
    """
    chosen, rejected = (_whole_conversation(record[field], field) for field in ("chosen", "rejected"))
    if chosen[:-1] == rejected[:-1]:
        explicit = {**record, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        sides = response_field(explicit, "chosen"), response_field(explicit, "rejected")
        return _pair(prompt_field(explicit), sides, record, where)
    examples = []
    for field_name, side, aligned in (("chosen", chosen, True), ("rejected", rejected, False)):
        last = {**record, "prompt": side[:-1], field_name: side[-1:]}
        prompt, response = prompt_field(last), response_field(last, field_name)
        examples.append(Example(prompt, response, aligned, _harmful(record), None, where, Note.OWN_CONTEXT))
    return examples


def _whole_conversation(value: Any, field: str) -> Messages:
    """A prompt and its answer, as messages or as text after Human: and Assistant:. Raises BadRow."""
    messages = conversation(human_turns(value) if isinstance(value, str) else value, field)
    if len(messages) < 2:
        raise BadRow(f"{field} must be a prompt and its answer, as there is no prompt column; found 1 message")
    return messages


def _from_unpaired(record: Record, where: str) -> list[Example]:
    """TRL's prompt/completion/label."""
    response, prompt = response_field(record, "completion"), prompt_field(record)
    return [Example(prompt, response, bool_field(record, "label"), _harmful(record), None, where)]


def _from_kldo_authors(record: Record, where: str) -> list[Example]:
    """The KLDO authors' columns: the n-th responses of both sides make a pair, the rest are unpaired."""
    spelling = spelling_of(record.get("safety"))
    if not spelling:
        raise BadRow(f"safety must be safe or unsafe, found {describe(record.get('safety'))}")
    safety = str(record["safety"]).strip().lower()
    harmful = safety == "unsafe" if spelling == "safe/unsafe" else not bool_field(record, "safety")
    accepted, rejected = (text_list_field(record, field) for field in ("acc_responses", "rej_responses"))
    pairs = min(len(accepted), len(rejected))
    if not accepted and not rejected:
        raise BadRow("acc_responses and rej_responses are both empty")
    prompt = prompt_field(record)
    return [
        Example(prompt, response, aligned, harmful, f"{where}#{n}" if n < pairs else None, where)
        for responses, aligned in ((accepted, True), (rejected, False))
        for n, response in enumerate(responses)
    ]


PREFERRED = "preferred_response_id"
"""The number of PKU-SafeRLHF's preferred response: by data.prefer, its ``safer_`` or its ``better_response_id``."""


def _from_safe_rlhf(record: Record, where: str) -> list[Example]:
    """PKU-SafeRLHF: two responses to a prompt, and which of them is preferred."""
    preferred = record[PREFERRED]
    if isinstance(preferred, bool) or str(preferred) not in ("0", "1"):
        raise BadRow(f"{PREFERRED} must be 0 or 1, found {describe(preferred)}")
    first, second = str(preferred), str(1 - int(preferred))
    sides = response_field(record, f"response_{first}"), response_field(record, f"response_{second}")
    chosen, rejected = _pair(prompt_field(record), sides, record, where)
    safe = f"is_response_{first}_safe"
    if record.get(safe) is not None and not bool_field(record, safe):
        chosen = replace(chosen, notes=Note.UNSAFE_PREFERRED)
    return [chosen, rejected]


def _from_beavertails(record: Record, where: str) -> list[Example]:
    """BeaverTails: one response to a prompt, and whether it is safe."""
    response, prompt = response_field(record, "response"), prompt_field(record)
    return [Example(prompt, response, bool_field(record, "is_safe"), _harmful(record), None, where)]


FORMATS = (
    Format("raydiv", ("prompt", "response", "aligned"), _from_raydiv, "aligned", optional=("harmful", "pair")),
    Format("preference", ("prompt", "chosen", "rejected"), _from_preference),
    Format("unpaired", ("prompt", "completion", "label"), _from_unpaired, "label"),
    Format(
        "KLDO authors", ("safety", "prompt", "acc_responses", "rej_responses"), _from_kldo_authors, harmful="safety"
    ),
    Format(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", PREFERRED),
        _from_safe_rlhf,
        optional=("harmful", "is_response_0_safe", "is_response_1_safe"),
    ),
    Format("BeaverTails", ("prompt", "response", "is_safe"), _from_beavertails, "is_safe"),
    Format("preference without a prompt", ("chosen", "rejected"), _from_implicit_preference),
)
"""All formats; the first one whose columns a record has applies."""
