"""Published prompt sets: by hub id their splits and configurations, and how their records are read.

To add a set, add a row to ``PUBLISHED``; for a file as its authors publish it, a row to ``FILES``. A source that names
its columns is read as any other source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from raydiv.config.source import Source
from raydiv.data.fields import BadRow, Record, describe
from raydiv.utils.errors import UserError

RecordParser = Callable[[Record], Record | None]
"""From a published record to prompt, harmful, kind and category; None for a record without a label."""


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """The record parser of each configuration of a set (the first is the default), its split, and an ungated copy.

    A set with a split for each label has ``labels`` instead of a split; both are read, unless the source names one.
    """

    parsers: dict[str | None, RecordParser]
    split: str = "train"
    labels: Mapping[str, bool] = field(default_factory=dict)
    alternative: str | None = None


def as_published(source: Source) -> list[tuple[Source, RecordParser]]:
    """The parts of the source with the split and configuration of its published set, and the parser of their records.

    A source that is not a published set is returned as it is. Raises UserError for an unknown configuration or split.
    """
    if source.columns is not None:
        return [(source, lambda record: record)]
    known = PUBLISHED.get(source.path.removeprefix("hf://")) if source.path.startswith("hf://") else None
    if known is None:
        return [(source, _record_of_file)]
    config = source.config or next(iter(known.parsers))
    if config not in known.parsers:
        names = ", ".join(str(name) for name in known.parsers)
        raise UserError(
            f"{source.path}: unknown config {config} (known: {names}); give columns to read it all the same"
        )
    if known.labels and source.split not in (None, *known.labels):
        raise UserError(f"{source.path}: unknown split {source.split} (known: {', '.join(known.labels)})")
    parse = known.parsers[config]
    constants = {name: value for name, value in source.constants.items() if name != "harmful"}

    def part(split: str) -> tuple[Source, RecordParser]:
        label = {"harmful": known.labels[split]} if known.labels else {}

        def parse_part(record: Record) -> Record | None:
            parsed = parse({**record, **label})
            return None if parsed is None else {**parsed, **constants}

        return source.model_copy(update={"split": split, "config": config}), parse_part

    return [part(split) for split in ([source.split] if source.split else known.labels or [known.split])]


def _record_of_file(record: Record) -> Record:
    """The record, or what its published columns say."""
    parse = next((parse for columns, parse in FILES.items() if columns <= record.keys()), None)
    return record if parse is None else {**record, **(parse(record) or {})}


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


def _harmless(prompt: str, category: str | None = None) -> RecordParser:
    """A set of harmless prompts that look harmful: the names of its columns."""

    def parse(record: Record) -> Record:
        topic = record.get(category) if category else None
        return {"prompt": record.get(prompt), "harmful": False, "kind": "alarming", "category": topic}

    return parse


def _harmbench(record: Record) -> Record:
    """HarmBench's behaviors, in its own columns or the hub's. A behavior follows its context, as in its direct request.

    Its functional categories are kinds: its classifier does not judge ``copyright``.
    """
    behavior = record.get("Behavior") or record.get("prompt")
    context = record.get("ContextString") or record.get("context")
    kind = str(record.get("FunctionalCategory") or ("contextual" if context else "standard"))
    return {
        "prompt": f"{context}\n\n---\n\n{behavior}" if context and behavior else behavior,
        "harmful": True,
        "kind": "harmful" if kind == "standard" else kind,
        "category": record.get("SemanticCategory") or record.get("category"),
        "behavior": behavior,
        "context": context,
    }


def _copyright(record: Record) -> Record:
    """HarmBench's copyright behaviors on the hub, whose category its columns do not say."""
    return {**_harmbench(record), "kind": "copyright"}


def _jailbreakbench(record: Record) -> Record:
    """JailbreakBench: a behavior that its split, or the recipe, labels harmful, or its harmless twin."""
    harmful = record.get("harmful")
    kind = {} if harmful is None else {"harmful": harmful, "kind": "harmful" if harmful else "alarming"}
    return {"prompt": record.get("Goal"), "category": record.get("Category"), **kind}


def _sorry_bench(record: Record) -> Record:
    """SORRY-Bench: one turn, plain (``base``) or rewritten in another style, which is its kind."""
    turns, style = record.get("turns"), str(record.get("prompt_style") or "base")
    prompt = turns[0] if isinstance(turns, list) and len(turns) == 1 else turns
    kind = "harmful" if style == "base" else style
    return {"prompt": prompt, "harmful": True, "kind": kind, "category": record.get("category")}


def _wildguard(record: Record) -> Record | None:
    """WildGuardMix: the label of the prompt by people; some prompts have none."""
    label = record.get("prompt_harm_label")
    if label is None:
        return None
    if label not in ("harmful", "unharmful"):
        raise BadRow(f"prompt_harm_label must be harmful or unharmful, found {describe(label)}")
    kind = _wild_kind(label == "harmful", bool(record.get("adversarial")))
    topic = record.get("subcategory")
    return {"prompt": record.get("prompt"), "harmful": label == "harmful", "kind": kind, "category": topic}


def _wildjailbreak(record: Record) -> Record:
    """WildJailbreak: ``data_type`` is vanilla or adversarial, harmful or benign, and names the prompt's column."""
    style, _, label = str(record.get("data_type")).partition("_")
    if style not in ("vanilla", "adversarial") or label not in ("harmful", "benign"):
        raise BadRow(f"data_type must be such as vanilla_benign, found {describe(record.get('data_type'))}")
    kind = _wild_kind(label == "harmful", style == "adversarial")
    return {"prompt": record.get(style), "harmful": label == "harmful", "kind": kind}


def _wild_kind(harmful: bool, adversarial: bool) -> str:
    if harmful:
        return "adversarial" if adversarial else "harmful"
    return "alarming" if adversarial else "ordinary"


def _coconot(record: Record) -> Record:
    """CoCoNot's requests that a model must not comply with; those without safety concerns are a kind of their own."""
    category = record.get("category")
    kind = "harmful" if category == "Requests with safety concerns" else "noncompliance"
    return {"prompt": record.get("prompt"), "harmful": True, "kind": kind, "category": category}


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
_SORRY_BENCH: dict[str | None, RecordParser] = {None: _sorry_bench}

PUBLISHED: dict[str, PublishedSet] = {
    "walledai/AdvBench": PublishedSet({None: _harmful("prompt")}, alternative="hf://mlabonne/harmful_behaviors"),
    "mlabonne/harmful_behaviors": PublishedSet({None: _harmful("text")}),
    "walledai/MaliciousInstruct": PublishedSet({None: _harmful("prompt")}),
    "Babelscape/ALERT": PublishedSet({"alert": _alert("harmful"), "alert_adversarial": _alert("adversarial")}, "test"),
    "Paul/XSTest": PublishedSet(_XSTEST),
    "walledai/XSTest": PublishedSet(_XSTEST, "test", alternative="hf://Paul/XSTest"),
    "natolambert/xstest-v2-copy": PublishedSet(_XSTEST, "prompts"),
    "OpenSafetyLab/Salad-Data": PublishedSet(
        {
            "base_set": _harmful("question", "1-category"),
            "attack_enhanced_set": _harmful("augq", "1-category", "adversarial"),
        },
    ),
    "toxigen/toxigen-data": PublishedSet(_TOXIGEN),
    "skg/toxigen-data": PublishedSet(_TOXIGEN),
    "walledai/HarmBench": PublishedSet(
        {"standard": _harmbench, "contextual": _harmbench, "copyright": _copyright}, alternative="its authors' CSV"
    ),
    "JailbreakBench/JBB-Behaviors": PublishedSet(
        {"behaviors": _jailbreakbench}, labels={"harmful": True, "benign": False}
    ),
    "walledai/StrongREJECT": PublishedSet({None: _harmful("prompt", "category")}, alternative="its authors' CSV"),
    "sorry-bench/sorry-bench-202503": PublishedSet(_SORRY_BENCH),
    "sorry-bench/sorry-bench-202406": PublishedSet(_SORRY_BENCH),
    "bench-llm/or-bench": PublishedSet(
        {
            "or-bench-hard-1k": _harmless("prompt", "category"),
            "or-bench-80k": _harmless("prompt", "category"),
            "or-bench-toxic": _harmful("prompt", "category"),
        },
    ),
    "allenai/wildguardmix": PublishedSet({"wildguardtest": _wildguard}, "test"),
    "allenai/wildjailbreak": PublishedSet({"eval": _wildjailbreak, "train": _wildjailbreak}),
    "allenai/coconot": PublishedSet({"original": _coconot, "contrast": _harmless("prompt", "category")}, "test"),
}
"""The published sets, by hub id."""

FILES: dict[frozenset[str], RecordParser] = {
    frozenset({"Behavior", "BehaviorID"}): _harmbench,
    frozenset({"Goal", "Behavior", "Category"}): _jailbreakbench,
    frozenset({"forbidden_prompt"}): _harmful("forbidden_prompt", "category"),
    frozenset({"turns", "prompt_style"}): _sorry_bench,
}
"""Files of published sets, by the columns that tell them."""
