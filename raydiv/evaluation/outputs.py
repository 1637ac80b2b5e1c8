"""Models' answers in AlpacaEval's format, a JSON list of instruction, output and generator.

It allows comparison with published outputs, and use of the files in alpaca_eval.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raydiv.utils.errors import UserError, one_line


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """The output of a model, ``generator``, to an instruction."""

    instruction: str
    output: str
    generator: str


def read_outputs(path: Path) -> list[ModelOutput]:
    """Records of a file in AlpacaEval's format. Raises UserError that names the first invalid record."""
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {one_line(error, 200)}") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: AlpacaEval's format is a list of records, found {_kind(records)}")
    return [_output(record, f"{path}: record {number}", path.stem) for number, record in enumerate(records, start=1)]


def format_outputs(outputs: Sequence[ModelOutput]) -> str:
    """The content of a file in AlpacaEval's format, as ``read_outputs`` reads it."""
    return json.dumps([asdict(output) for output in outputs], indent=1, ensure_ascii=False) + "\n"


def match_outputs(instructions: Sequence[str], outputs: Sequence[ModelOutput], path: Path) -> list[str]:
    """The output to each instruction, from the ``outputs`` of file ``path``. Each record is used once.

    Raises UserError for instructions without output.
    """
    queues: dict[str, deque[str]] = defaultdict(deque)
    for record in outputs:
        queues[record.instruction].append(record.output)
    matched = [queues[instruction].popleft() if queues[instruction] else None for instruction in instructions]
    missing = matched.count(None)
    if missing:
        raise UserError(
            f"{path}: has no output to {missing} of the {len(matched)} prompts (number {matched.index(None) + 1} "
            "first); an instruction must equal the prompt's text"
        )
    return [output for output in matched if output is not None]


def _output(record: Any, where: str, generator: str) -> ModelOutput:
    """One record; ``generator`` is the default, and ``input`` is appended to the instruction, as AlpacaEval does."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a mapping of instruction, output and generator, found {_kind(record)}")
    texts = {"input": "", "generator": generator} | record
    for key in ("instruction", "output", "generator", "input"):
        if not isinstance(texts.get(key), str):
            raise UserError(f"{where}: {key} must be text, found {_kind(texts[key]) if key in texts else 'none'}")
    instruction = "\n\n".join(part for part in (texts["instruction"], texts["input"]) if part)
    return ModelOutput(instruction, texts["output"], texts["generator"])


def _kind(value: Any) -> str:
    """The type of a value, not its content: messages must not contain prompts."""
    return "an empty list" if value == [] else type(value).__name__
