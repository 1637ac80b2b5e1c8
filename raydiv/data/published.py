"""Published prompt sets, by their hub id: split, configurations, and how their records are read.

To add a set, add a row to ``PUBLISHED``. A source that names its columns is read as any other source.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from raydiv.config.source import Source
from raydiv.data.fields import BadRow, Record, describe
from raydiv.utils.errors import UserError

RecordParser = Callable[[Record], Record]
"""From a published record to prompt, harmful, kind and category."""


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """A set's split, the record parser of each configuration (the first is the default), and an ungated copy."""

    split: str
    parsers: dict[str | None, RecordParser]
    alternative: str | None = None


def as_published(source: Source) -> tuple[Source, RecordParser]:
    """The source with the split and configuration of its published set, and the parser of its records.

    A source that is not a published set is returned as it is. Raises UserError for an unknown configuration.
    """
    known = PUBLISHED.get(source.path.removeprefix("hf://")) if source.path.startswith("hf://") else None
    if known is None or source.columns is not None:
        return source, lambda record: record
    config = source.config or next(iter(known.parsers))
    if config not in known.parsers:
        names = ", ".join(str(name) for name in known.parsers)
        raise UserError(
            f"{source.path}: unknown config {config} (known: {names}); give columns to read it all the same"
        )
    parse = known.parsers[config]
    constants = {name: value for name, value in source.constants.items() if name != "harmful"}
    return (
        source.model_copy(update={"split": source.split or known.split, "config": config}),
        lambda record: {**parse(record), **constants},
    )


def alternative_hint(source: Source) -> str:
    """The end of a message about a published set that cannot be loaded: its ungated copy, if there is one."""
    known = PUBLISHED.get(source.path.removeprefix("hf://"))
    return f"; it may need permission on the hub, {known.alternative} does not" if known and known.alternative else ""


def _harmful(prompt: str, category: str | None = None, kind: str = "harmful") -> RecordParser:
    """A set of harmful prompts alone: the names of its columns, and the kind of its prompts."""

    def parse(record: Record) -> Record:
        topic = _without_number(record.get(category)) if category else None
        return {"prompt": record.get(prompt), "harmful": True, "kind": kind, "category": topic}

    return parse


def _without_number(category: object) -> object:
    """A category without its number, such as O1: or S3:."""
    return re.sub(r"^[A-Z]?\d+:\s*", "", category) if isinstance(category, str) else category


def _alert(kind: str) -> RecordParser:
    """ALERT: its prompts are in an instruction template, which the model's chat template replaces."""

    def parse(record: Record) -> Record:
        prompt = record.get("prompt")
        if isinstance(prompt, str):
            prompt = re.sub(r"\s*###\s*(?:Instruction|Response):\s*", "\n", prompt).strip()
        return {"prompt": prompt, "harmful": True, "kind": kind, "category": record.get("category")}

    return parse


def _xstest(record: Record) -> Record:
    """XSTest: safe prompts that look unsafe, and unsafe contrasts; some copies have the type but no label."""
    label, topic = record.get("label"), str(record.get("type"))
    if label not in ("safe", "unsafe", None):
        raise BadRow(f"label must be safe or unsafe, found {describe(label)}")
    harmful = topic.startswith("contrast") if label is None else label == "unsafe"
    kind = "harmful" if harmful else "alarming"
    return {"prompt": record.get("prompt"), "harmful": harmful, "kind": kind, "category": topic}


def _toxigen(record: Record) -> Record:
    """ToxiGen: statements about groups; toxic if both annotations together exceed 5.5 of 10."""
    scores = [record.get(name) for name in ("toxicity_ai", "toxicity_human")]
    if not all(isinstance(score, int | float) for score in scores):
        raise BadRow("toxicity_ai and toxicity_human must be numbers")
    toxic = sum(score for score in scores if isinstance(score, int | float)) > 5.5
    kind = "harmful" if toxic else "ordinary"
    return {"prompt": record.get("text"), "harmful": toxic, "kind": kind, "category": record.get("target_group")}


def _toxigen_seeds(record: Record) -> Record:
    """ToxiGen's prompts: lists of statements that a model continues."""
    toxic = record.get("prompt_label") == 1
    kind = "harmful" if toxic else "ordinary"
    return {"prompt": record.get("prompt"), "harmful": toxic, "kind": kind, "category": record.get("group")}


_XSTEST: dict[str | None, RecordParser] = {None: _xstest}
_TOXIGEN: dict[str | None, RecordParser] = {"annotated": _toxigen, "train": _toxigen_seeds}

PUBLISHED: dict[str, PublishedSet] = {
    "walledai/AdvBench": PublishedSet("train", {None: _harmful("prompt")}, "hf://mlabonne/harmful_behaviors"),
    "mlabonne/harmful_behaviors": PublishedSet("train", {None: _harmful("text")}),
    "walledai/MaliciousInstruct": PublishedSet("train", {None: _harmful("prompt")}),
    "Babelscape/ALERT": PublishedSet("test", {"alert": _alert("harmful"), "alert_adversarial": _alert("adversarial")}),
    "Paul/XSTest": PublishedSet("train", _XSTEST),
    "walledai/XSTest": PublishedSet("test", _XSTEST, "hf://Paul/XSTest"),
    "natolambert/xstest-v2-copy": PublishedSet("prompts", _XSTEST),
    "OpenSafetyLab/Salad-Data": PublishedSet(
        "train",
        {
            "base_set": _harmful("question", "1-category"),
            "attack_enhanced_set": _harmful("augq", "1-category", "adversarial"),
        },
    ),
    "toxigen/toxigen-data": PublishedSet("train", _TOXIGEN),
    "skg/toxigen-data": PublishedSet("train", _TOXIGEN),
}
"""The published sets, by hub id."""
