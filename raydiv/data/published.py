"""Prompt sets that are known by their hub id: split, configuration, and what a record of each says.

A new one is a row of ``PUBLISHED``. A source that names columns of its own is read as any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from raydiv.config.source import Source
from raydiv.data.formats import BadRow, Record, brief
from raydiv.utils.errors import UserError

RecordParser = Callable[[Record], Record]
"""From a record as published to prompt, harmful, kind and category."""


@dataclass(frozen=True, slots=True)
class Published:
    """A set's split, how its records are read by configuration (the first is the default), and who has it without asking."""

    split: str
    read: dict[str | None, RecordParser]
    instead: str | None = None


def published(source: Source) -> tuple[Source, RecordParser]:
    """The source under the split and configuration that its set is published in, and how its records are read.

    Raises UserError for a configuration that is not known of it.
    """
    known = PUBLISHED.get(source.path.removeprefix("hf://")) if source.path.startswith("hf://") else None
    if known is None or source.columns is not None:
        return source, lambda record: record
    config = source.config or next(iter(known.read))
    if config not in known.read:
        there = ", ".join(str(name) for name in known.read)
        raise UserError(
            f"{source.path}: config {config} is not known (known: {there}); give columns to read it all the same"
        )
    read = known.read[config]
    constants = {name: value for name, value in source.constants.items() if name != "harmful"}
    return (
        source.model_copy(update={"split": source.split or known.split, "config": config}),
        lambda record: {**read(record), **constants},
    )


def instead_of(source: Source) -> str:
    """What to say of a set that could not be had, where others have it too."""
    known = PUBLISHED.get(source.path.removeprefix("hf://"))
    return f"; it may need the hub's permission, {known.instead} does not" if known and known.instead else ""


def _harmful(prompt: str, category: str | None = None, kind: str = "harmful") -> RecordParser:
    """A set of harmful prompts alone, and its columns."""

    def read(record: Record) -> Record:
        about = _plain(record.get(category)) if category else None
        return {"prompt": record.get(prompt), "harmful": True, "kind": kind, "category": about}

    return read


def _plain(category: object) -> object:
    """A category without its number, such as O1: or S3:."""
    return re.sub(r"^[A-Z]?\d+:\s*", "", category) if isinstance(category, str) else category


def _alert(kind: str) -> RecordParser:
    """ALERT's prompts stand in an instruction template of its own; the model's chat template takes its place."""

    def read(record: Record) -> Record:
        prompt = record.get("prompt")
        if isinstance(prompt, str):
            prompt = re.sub(r"\s*###\s*(?:Instruction|Response):\s*", "\n", prompt).strip()
        return {"prompt": prompt, "harmful": True, "kind": kind, "category": record.get("category")}

    return read


def _xstest(record: Record) -> Record:
    """Safe prompts that look unsafe, and unsafe ones in contrast to them; some copies have a type alone."""
    label, about = record.get("label"), str(record.get("type"))
    if label not in ("safe", "unsafe", None):
        raise BadRow(f"label must be safe or unsafe, found {brief(label)}")
    harmful = about.startswith("contrast") if label is None else label == "unsafe"
    kind = "harmful" if harmful else "alarming"
    return {"prompt": record.get("prompt"), "harmful": harmful, "kind": kind, "category": about}


def _toxigen(record: Record) -> Record:
    """Statements about groups; toxic where the annotators of both columns together say so (more than 5.5 of 10)."""
    scores = [record.get(name) for name in ("toxicity_ai", "toxicity_human")]
    if not all(isinstance(score, int | float) for score in scores):
        raise BadRow("toxicity_ai and toxicity_human must be numbers")
    toxic = sum(score for score in scores if isinstance(score, int | float)) > 5.5
    kind = "harmful" if toxic else "ordinary"
    return {"prompt": record.get("text"), "harmful": toxic, "kind": kind, "category": record.get("target_group")}


def _toxigen_seeds(record: Record) -> Record:
    """Lists of statements for a model to go on with."""
    toxic = record.get("prompt_label") == 1
    kind = "harmful" if toxic else "ordinary"
    return {"prompt": record.get("prompt"), "harmful": toxic, "kind": kind, "category": record.get("group")}


_XSTEST: dict[str | None, RecordParser] = {None: _xstest}
_TOXIGEN: dict[str | None, RecordParser] = {"annotated": _toxigen, "train": _toxigen_seeds}

PUBLISHED: dict[str, Published] = {
    "walledai/AdvBench": Published("train", {None: _harmful("prompt")}, "hf://mlabonne/harmful_behaviors"),
    "mlabonne/harmful_behaviors": Published("train", {None: _harmful("text")}),
    "walledai/MaliciousInstruct": Published("train", {None: _harmful("prompt")}),
    "Babelscape/ALERT": Published("test", {"alert": _alert("harmful"), "alert_adversarial": _alert("adversarial")}),
    "Paul/XSTest": Published("train", _XSTEST),
    "walledai/XSTest": Published("test", _XSTEST, "hf://Paul/XSTest"),
    "natolambert/xstest-v2-copy": Published("prompts", _XSTEST),
    "OpenSafetyLab/Salad-Data": Published(
        "train",
        {
            "base_set": _harmful("question", "1-category"),
            "attack_enhanced_set": _harmful("augq", "1-category", "adversarial"),
        },
    ),
    "toxigen/toxigen-data": Published("train", _TOXIGEN),
    "skg/toxigen-data": Published("train", _TOXIGEN),
}
"""By hub id."""
