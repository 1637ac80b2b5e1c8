"""Formats of examples: what is recognised by its columns, and how a record becomes raydiv's example schema.

To add a format, add its columns to ``FORMATS`` with the function that turns a record into examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raydiv.model.chat import Messages

Record = Mapping[str, Any]

LONGEST_TEXT = 1_000_000
"""Characters beyond which a text is taken for a mistake."""


class BadRow(ValueError):  # noqa: N818 - a row, not an error of the program
    """A record that is not an example; the message says why, without its text."""


class Cells(dict[str, Any]):
    """A record of text alone, as CSV has it: its labels are still to be read."""


@dataclass(frozen=True, slots=True)
class Example:
    """One (prompt, response) with its label; see raydiv/data/README.md for the schema.

    ``prompt`` is text or chat messages; ``harmful`` is the prompt's label, None where the source has none; ``pair`` names
    the pair within its source; ``source`` is the file and line. ``spelling`` says how the source writes ``harmful``, where
    it has several ways.
    """

    prompt: str | Messages
    response: str
    aligned: bool
    harmful: bool | None
    pair: str | None
    source: str
    spelling: str = ""


@dataclass(frozen=True, slots=True)
class RecordReader:
    """How to read a source's records: what it calls a format's columns, and the values of those that it lacks."""

    columns: Mapping[str, str]
    constants: Mapping[str, Any]

    def examples(self, record: Any, where: str) -> list[Example]:
        """The examples of a record. Raises BadRow."""
        record = self.rename(record)
        return format_of(record)(record, where)

    def rename(self, record: Any) -> Record:
        """The record under the names that formats know."""
        if not isinstance(record, Mapping):
            raise BadRow(f"a record is a mapping of columns, found {brief(record)}")
        missing = sorted(theirs for theirs in self.columns.values() if theirs not in record)
        if missing:
            raise BadRow(f"no column {', '.join(missing)}, which data.columns names")
        taken = set(self.columns.values())
        kept = {name: value for name, value in record.items() if name not in taken}
        renamed = {**self.constants, **kept, **{ours: record[theirs] for ours, theirs in self.columns.items()}}
        if isinstance(record, Cells):
            renamed |= {
                name: TRUTH.get(str(renamed[name]).strip().lower(), renamed[name]) for name in LABELS & renamed.keys()
            }
        return renamed


AS_IT_IS = RecordReader({}, {})


def text(record: Record, field: str) -> str:
    """A field that must hold text."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{field} must be non-empty text, found {brief(value)}")
    return _sane(value, field)


def _sane(value: str, field: str) -> str:
    """Text that a tokenizer can take."""
    if len(value) > LONGEST_TEXT:
        raise BadRow(f"{field} has {len(value):,} characters, and more than {LONGEST_TEXT:,} are taken for a mistake")
    if "\0" in value:
        raise BadRow(f"{field} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{field} is not UTF-8: it holds half a character") from None
    return value


def flag(record: Record, field: str) -> bool:
    """A field that must be true or false."""
    value = record.get(field)
    if not isinstance(value, bool):
        raise BadRow(f"{field} must be true or false, found {brief(value)}")
    return value


def prompt_of(record: Record) -> str | Messages:
    """The prompt, as text or as chat messages."""
    return messages(record["prompt"], "prompt") if isinstance(record.get("prompt"), list) else text(record, "prompt")


def messages(value: Any, field: str) -> Messages:
    """A conversation: a list of messages with role and content."""
    if not value or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        raise BadRow(f"{field} must be text or a list of messages with role and content, found {brief(value)}")
    turns = []
    for turn in value:
        role, content = _sane(turn["role"], "role"), _sane(turn["content"], "content")
        # an empty system turn is a way of having none; the others must say something
        turns.append({"role": role, "content": content if role == "system" else text(turn, "content")})
    return turns


def brief(value: Any) -> str:
    """Kind of a value, without its text: harmful text stays out of messages."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _response(record: Record, field: str) -> str:
    """A response given as text, or as one assistant message."""
    if not isinstance(record.get(field), list):
        return text(record, field)
    turns = messages(record[field], field)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(f"{field} must be one assistant message, found {len(turns)} messages")
    return text(turns[0], "content")


def _own(record: Record, where: str) -> list[Example]:
    """Raydiv's schema: prompt, response, aligned, harmful, pair, source."""
    pair = record.get("pair")
    name = None if pair is None else _sane(str(pair), "pair")
    return [
        Example(
            prompt_of(record), _response(record, "response"), flag(record, "aligned"), _harmful(record), name, where
        )
    ]


def _preference(record: Record, where: str) -> list[Example]:
    """TRL's prompt/chosen/rejected, with the prompt's label in ``harmful`` where there is one."""
    prompt, harmful = prompt_of(record), _harmful(record)
    return [
        Example(prompt, _response(record, field), aligned, harmful, where, where)
        for field, aligned in (("chosen", True), ("rejected", False))
    ]


def _implicit_preference(record: Record, where: str) -> list[Example]:
    """TRL's chosen/rejected conversations that both hold the prompt: it is what they begin with alike."""
    sides = [
        messages(record[field], field) if isinstance(record[field], list) else [] for field in ("chosen", "rejected")
    ]
    if not all(sides):
        raise BadRow("chosen and rejected must be conversations where there is no prompt beside them")
    same = next((n for n, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
    explicit = {
        "prompt": sides[0][:same],
        "chosen": sides[0][same:],
        "rejected": sides[1][same:],
        "harmful": record.get("harmful"),
    }
    return _preference(explicit, where)


def _unpaired(record: Record, where: str) -> list[Example]:
    """TRL's prompt/completion/label."""
    response = _response(record, "completion")
    return [Example(prompt_of(record), response, flag(record, "label"), _harmful(record), None, where)]


SAFETY = {
    "safe": (False, "safe"),
    "unsafe": (True, "safe"),
    "1": (False, "1"),
    "0": (True, "1"),
    "true": (False, "true"),
    "false": (True, "true"),
}
"""What the KLDO authors' ``safety`` may say: whether the prompt is harmful, and which spelling that is."""


def _kldo_authors(record: Record, where: str) -> list[Example]:
    """The KLDO authors' safety, prompt, acc_responses, rej_responses: the n-th of both make a pair, the rest stand alone."""
    safety = str(record.get("safety", "")).strip().lower()
    if safety not in SAFETY:
        raise BadRow(f"safety must be safe or unsafe, found {brief(record.get('safety'))}")
    harmful, spelling = SAFETY[safety]
    sides = [_several(record, field) for field in ("acc_responses", "rej_responses")]
    complete = min(map(len, sides))
    if not any(sides):
        raise BadRow("acc_responses and rej_responses are both empty")
    prompt = prompt_of(record)
    return [
        Example(prompt, response, aligned, harmful, f"{where}#{n}" if n < complete else None, where, spelling)
        for responses, aligned in zip(sides, (True, False), strict=True)
        for n, response in enumerate(responses)
    ]


def _several(record: Record, field: str) -> list[str]:
    value = record.get(field)
    return [text({field: item}, field) for item in (value if isinstance(value, list) else [value])]


def _harmful(record: Record) -> bool | None:
    return None if record.get("harmful") is None else flag(record, "harmful")


FORMATS: list[tuple[frozenset[str], Callable[[Record, str], list[Example]]]] = [
    (frozenset({"prompt", "response", "aligned"}), _own),
    (frozenset({"prompt", "chosen", "rejected"}), _preference),
    (frozenset({"prompt", "completion", "label"}), _unpaired),
    (frozenset({"safety", "prompt", "acc_responses", "rej_responses"}), _kldo_authors),
    (frozenset({"chosen", "rejected"}), _implicit_preference),
]
"""Columns that tell a format, and the function from a record to its examples."""

LABELS = {"aligned", "label", "harmful"}
"""Columns of true or false."""

TRUTH = {"true": True, "false": False}
"""What a label may say where all is text."""


def format_of(record: Record) -> Callable[[Record, str], list[Example]]:
    """The function for a record's columns. Raises BadRow where no format has them, or two spellings of a label stand."""
    if record.get("aligned") is not None and record.get("label") is not None:
        raise BadRow("has both aligned and label, two spellings of one label; keep one (data.columns can rename)")
    for columns, convert in FORMATS:
        if columns <= record.keys():
            return convert
    # a file without a header has its first row for column names: text that must not be shown
    names = sorted(str(name) for name in record if str(name).isidentifier() and len(str(name)) <= 30)
    others = f" and {len(record) - len(names)} that are no names" if len(names) < len(record) else ""
    known = "; ".join(", ".join(sorted(columns)) for columns, _ in FORMATS)
    raise BadRow(
        f"columns {', '.join(names)}{others} are of no known format (known: {known}); data.columns names others"
    )
