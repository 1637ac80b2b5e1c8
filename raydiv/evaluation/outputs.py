"""Models' answers in AlpacaEval's format, a JSON list of instruction, output and generator.

So they may be compared with published ones, and taken to alpaca_eval.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What ``generator`` answered to an instruction."""

    instruction: str
    output: str
    generator: str


def read_outputs(path: Path) -> list[ModelOutput]:
    """Records of a file in AlpacaEval's format. Raises UserError for another, naming the first record that is wrong."""
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: AlpacaEval's format is a list of records, found {_kind(records)}")
    return [_output(record, f"{path}: record {number}", path.stem) for number, record in enumerate(records, start=1)]


def format_outputs(outputs: Sequence[ModelOutput]) -> str:
    """The content of a file in AlpacaEval's format, which ``read_outputs`` gives back."""
    return json.dumps([asdict(one) for one in outputs], indent=1, ensure_ascii=False) + "\n"


def match_outputs(instructions: Sequence[str], outputs: Sequence[ModelOutput], path: Path) -> list[str]:
    """The outputs to these instructions, of those that ``path`` holds; an instruction given twice takes two records.

    Raises UserError where some have none.
    """
    known: dict[str, deque[str]] = defaultdict(deque)
    for one in outputs:
        known[one.instruction].append(one.output)
    found = [known[instruction].popleft() if known[instruction] else None for instruction in instructions]
    missing = found.count(None)
    if missing:
        raise UserError(
            f"{path}: has no output to {missing} of the {len(found)} prompts (number {found.index(None) + 1} first); "
            "an instruction must be the prompt's text exactly"
        )
    return [output for output in found if output is not None]


def _output(record: Any, where: str, generator: str) -> ModelOutput:
    """One record; ``generator`` where it names none, and its ``input`` after its instruction, as AlpacaEval has it."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a mapping of instruction, output and generator, found {_kind(record)}")
    texts = {"input": "", "generator": generator} | record
    for key in ("instruction", "output", "generator", "input"):
        if not isinstance(texts.get(key), str):
            raise UserError(f"{where}: {key} must be text, found {_kind(texts[key]) if key in texts else 'none'}")
    instruction = "\n\n".join(part for part in (texts["instruction"], texts["input"]) if part)
    return ModelOutput(instruction, texts["output"], texts["generator"])


def _kind(value: Any) -> str:
    """What a value is, and not what it says: no message may hold a prompt."""
    return "an empty list" if value == [] else type(value).__name__
