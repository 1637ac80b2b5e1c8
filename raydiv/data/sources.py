"""Sources of examples: what is recognised by its columns, and how it becomes raydiv's example schema.

To add a format, add its columns to ``FORMATS`` with the function that turns a record into examples.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.bundled import bundled_file
from raydiv.errors import UserError

Messages = list[dict[str, str]]
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One (prompt, response) with its label; see the schema in the README.

    ``prompt`` is text or chat messages; ``harmful`` is the prompt's label, None where the source has none; ``pair`` names
    the pair within its source; ``source`` is the file and line, for messages.
    """

    prompt: str | Messages
    response: str
    aligned: bool
    harmful: bool | None
    pair: str | None
    source: str


def read_examples(source: str) -> list[Example]:
    """All examples of a source, in its order.

    Raises UserError for a source that does not exist, holds no example, has unknown columns, or a record with a missing,
    empty or ill-typed field, naming file and record.
    """
    examples = [
        example for where, record in iterate_records(source) for example in _format_of(record, where)(record, where)
    ]
    if not examples:
        raise UserError(f"{source}: holds no examples")
    return examples


def iterate_records(source: str) -> Iterator[tuple[str, Record]]:
    """(where, record) of a file, a saved ``datasets`` directory, a hub data set or a bundled set."""
    if source.startswith("bundled:"):
        path = bundled_file(source)
        yield from ((f"{source}:{line}", record) for line, record in _jsonl(path))
        return
    if source.startswith("hf://"):
        rows = _from_hub(source)
    else:
        path = Path(source)
        if not path.exists():
            raise UserError(f"{source}: no such file or directory")
        if path.is_dir():
            rows = _saved_dataset(path)
        elif path.suffix == ".jsonl":
            yield from ((f"{source}:{line}", record) for line, record in _jsonl(path))
            return
        elif path.suffix in FILES:
            rows = FILES[path.suffix](path)
        else:
            raise UserError(
                f"{path}: unknown kind of file (known: .jsonl, {', '.join(FILES)}, a saved datasets directory)"
            )
    yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, start=1))


def _jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None


def _json(path: Path) -> Sequence[Record]:
    try:
        rows = json.loads(_utf8(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a list of records, found {_brief(rows)}")
    return rows


def _csv(path: Path) -> Sequence[Record]:
    """Rows of text; an empty field is none at all, and true or false in a column of labels is what it says."""
    truth = {"true": True, "false": False}
    rows = []
    for row in csv.DictReader(io.StringIO(_utf8(path), newline="")):
        fields: dict[str, Any] = {str(key): value or None for key, value in row.items()}
        for label in LABELS & fields.keys():
            fields[label] = truth.get(str(fields[label]).strip().lower(), fields[label])
        rows.append(fields)
    return rows


def _parquet(path: Path) -> Sequence[Record]:
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8, at byte {error.start}") from None


LABELS = {"aligned", "label", "harmful"}
"""Columns of true or false."""

FILES: dict[str, Callable[[Path], Sequence[Record]]] = {".json": _json, ".csv": _csv, ".parquet": _parquet}
"""Readers by a file's ending, JSONL apart, whose lines are numbered."""


def _saved_dataset(path: Path) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: a directory, but not one written by datasets' save_to_disk") from None
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise UserError(
                f"{path}: holds splits {', '.join(saved)}, and none is called train; name one directory below"
            )
        return saved["train"]
    return saved


def _from_hub(source: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.removeprefix("hf://"), split="train")
    except Exception as error:  # the hub client raises many unrelated types
        raise UserError(f"{source}: cannot be loaded from the hub: {' '.join(str(error).split())[:300]}") from None


def _text(record: Record, field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {field} must be non-empty text, found {_brief(value)}")
    return value


def read_flag(record: Record, field: str, where: str) -> bool:
    value = record.get(field)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {field} must be true or false, found {_brief(value)}")
    return value


def read_prompt(record: Record, where: str) -> str | Messages:
    return (
        _messages(record["prompt"], "prompt", where)
        if isinstance(record.get("prompt"), list)
        else _text(record, "prompt", where)
    )


def _messages(value: Any, field: str, where: str) -> Messages:
    if not value or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        raise UserError(
            f"{where}: {field} must be text or a list of messages with role and content, found {_brief(value)}"
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _response(record: Record, field: str, where: str) -> str:
    """A response given as text, or as one assistant message."""
    if not isinstance(record.get(field), list):
        return _text(record, field, where)
    turns = _messages(record[field], field, where)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise UserError(f"{where}: {field} must be one assistant message, found {len(turns)} messages")
    return _text(turns[0], "content", where)


def _brief(value: Any) -> str:
    """Kind of a value, without its text: harmful text stays out of messages."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _own(record: Record, where: str) -> list[Example]:
    """Raydiv's schema: prompt, response, aligned, harmful, pair, source."""
    pair = record.get("pair")
    return [
        Example(
            read_prompt(record, where),
            _response(record, "response", where),
            read_flag(record, "aligned", where),
            _harmful(record, where),
            None if pair is None else str(pair),
            where,
        )
    ]


def _preference(record: Record, where: str) -> list[Example]:
    """TRL's prompt/chosen/rejected, with the prompt's label in ``harmful`` where there is one."""
    prompt, harmful = read_prompt(record, where), _harmful(record, where)
    return [
        Example(prompt, _response(record, field, where), aligned, harmful, where, where)
        for field, aligned in (("chosen", True), ("rejected", False))
    ]


def _unpaired(record: Record, where: str) -> list[Example]:
    """TRL's prompt/completion/label."""
    response = _response(record, "completion", where)
    return [
        Example(
            read_prompt(record, where),
            response,
            read_flag(record, "label", where),
            _harmful(record, where),
            None,
            where,
        )
    ]


def _kldo_authors(record: Record, where: str) -> list[Example]:
    """The KLDO authors' safety, prompt, acc_responses, rej_responses: the n-th of both make a pair, the rest stand alone."""
    safety = str(record.get("safety", "")).strip().lower()
    if safety not in ("safe", "unsafe", "0", "1", "true", "false"):
        raise UserError(f"{where}: safety must be safe or unsafe, found {_brief(record.get('safety'))}")
    harmful = safety in ("unsafe", "0", "false")
    sides = [_several(record, field, where) for field in ("acc_responses", "rej_responses")]
    complete = min(map(len, sides))
    if not any(sides):
        raise UserError(f"{where}: acc_responses and rej_responses are both empty")
    return [
        Example(read_prompt(record, where), response, aligned, harmful, f"{where}#{n}" if n < complete else None, where)
        for responses, aligned in zip(sides, (True, False), strict=True)
        for n, response in enumerate(responses)
    ]


def _several(record: Record, field: str, where: str) -> list[str]:
    value = record.get(field)
    return [_text({field: item}, field, where) for item in (value if isinstance(value, list) else [value])]


def _harmful(record: Record, where: str) -> bool | None:
    return None if record.get("harmful") is None else read_flag(record, "harmful", where)


FORMATS: list[tuple[frozenset[str], Callable[[Record, str], list[Example]]]] = [
    (frozenset({"prompt", "response", "aligned"}), _own),
    (frozenset({"prompt", "chosen", "rejected"}), _preference),
    (frozenset({"prompt", "completion", "label"}), _unpaired),
    (frozenset({"safety", "prompt", "acc_responses", "rej_responses"}), _kldo_authors),
]
"""Columns that tell a format, and the function from a record to its examples."""


def _format_of(record: Record, where: str) -> Callable[[Record, str], list[Example]]:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a record is a mapping of columns, found {_brief(record)}")
    for columns, convert in FORMATS:
        if columns <= record.keys():
            return convert
    # a file without a header has its first row for column names: text that must not be shown
    names = sorted(str(name) for name in record if str(name).isidentifier() and len(str(name)) <= 30)
    others = f" and {len(record) - len(names)} that are no names" if len(names) < len(record) else ""
    known = "; ".join(", ".join(sorted(columns)) for columns, _ in FORMATS)
    raise UserError(f"{where}: columns {', '.join(names)}{others} are of no known format (known: {known})")
