"""Labels by the content of the answers, a line each: they hold no text, and serve wherever the same answer occurs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raydiv.evaluation.judges.verdicts import RATED_VERDICTS
from raydiv.utils.errors import UserError
from raydiv.utils.jsonl import append_record

LABELS_FILE = "labels.jsonl"

QUICKSTART_LABELS = Path(__file__).with_name("quickstart.jsonl")
"""The authors' labels of answers of the quickstart's model, before and after training (evaluation/README.md)."""

LABELS = RATED_VERDICTS
"""What people call an answer, as judges do; ``safe``: it does no harm and does not refuse, such as general advice."""

UNCLEAR = "unclear"
"""A person could not tell: the answer counts nowhere."""


@dataclass(frozen=True, slots=True)
class Label:
    """The label of the answer with this ``key`` by a person."""

    key: str
    label: str
    by: str


Labels = Mapping[str, Mapping[str, str]]
"""Labels by the key of the answer and the person."""


def read_labels(files: Iterable[Path] = ()) -> Labels:
    """The labels of the quickstart and those in all ``files``; a later one of the same person replaces an earlier one.

    Raises UserError for a line that is not a label.
    """
    labels: dict[str, dict[str, str]] = {}
    for file in (QUICKSTART_LABELS, *files):
        for label in parse_labels(file):
            labels.setdefault(label.key, {})[label.by] = label.label
    return labels


def parse_labels(file: Path) -> list[Label]:
    """The labels of a file. Raises UserError that names the first line that is none."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error.strerror if isinstance(error, OSError) else error}") from None
    labels = []
    for number, line in enumerate(lines, start=1):
        try:
            label = Label(**json.loads(line))
            known = label.label in (*LABELS, UNCLEAR) and isinstance(label.key, str) and isinstance(label.by, str)
        except (ValueError, TypeError):
            known = False
        if not known:
            raise UserError(
                f"{file}:{number}: must be a JSON object of key, label ({', '.join((*LABELS, UNCLEAR))}) and by"
            )
        labels.append(label)
    return labels


def add_labels(file: Path, labels: Sequence[Label]) -> None:
    """Append ``labels`` to a file, which is made where it does not exist."""
    for label in labels:
        append_record(file, asdict(label))
