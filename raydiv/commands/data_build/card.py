"""What was built: its figures, and the data card, in which no prompt or response is ever quoted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from raydiv.commands.data_build.counterparts import MAX_NEW_TOKENS
from raydiv.commands.data_build.options import BuildOptions, Kind, written
from raydiv.data.sources import files_of
from raydiv.evaluation.refusal import ERRORS


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Of one class: rows written, distinct prompts found, and what was left out, by why."""

    rows: int
    prompts: int
    duplicates: int
    further_responses: int
    not_chosen: int
    same_responses: int
    unusable_answers: int


@dataclass(frozen=True, slots=True)
class Side:
    """Of one class and side: words of its responses, and the share of them that string rules take for refusals."""

    median_words: float
    p90_words: float
    refusals: float


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built: files, SHA-256 of the data, counts by class, and each side ("harmful chosen") in figures.

    ``refusals_replaced`` counts a model's answers that were no refusals, ``answers_cut`` those as long as they might get.
    """

    kind: Kind
    data: Path
    card: Path
    fingerprint: str
    seed: int
    classes: dict[str, ClassCounts]
    sides: dict[str, Side]
    refusals_replaced: int
    answers_cut: int

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"data": str(self.data), "card": str(self.card)}


TITLES = {"compliance-refusal": "Compliance-refusal data", "preference": "Preference data"}

WHAT = {
    "compliance-refusal": "a harmless prompt's chosen response is an answer, and its rejected one a needless refusal",
    "preference": "a harmless prompt's chosen response is an answer, and its rejected one a worse answer",
}

WHY = {
    "rows": "rows written",
    "prompts": "distinct prompts found",
    "duplicates": "left out: records with nothing new about a prompt that came before",
    "further_responses": "left out: further responses to a prompt on the same side",
    "not_chosen": "prompts not chosen",
    "same_responses": "prompts left out: both responses the same",
    "unusable_answers": "prompts left out: the model's answer was no usable text",
}
"""What the counts of a class mean."""


def card(plan: BuildOptions, report: BuildReport, bank: int, models: Mapping[str, str]) -> str:
    """The data card (README.md with a Hugging Face front matter); ``bank`` counts its refusals, ``models`` are digests."""
    sections = [
        _front_matter(plan),
        f"# {TITLES[plan.kind]} by raydiv",
        f"Prompts with two responses each, for aligning a language model: a harmful prompt's chosen response is a refusal, and "
        f"its rejected one a compliance; {WHAT[plan.kind]}. Made as in Haldar et al., arXiv 2502.00657. "
        "**The compliances are harmful text.**",
        _columns(),
        "## From what",
        _origins(plan, models),
        "The licence is that of the sources, which raydiv does not know: what holds for them holds for this.",
        "## How",
        _ways(plan, report, bank),
        "## Counts",
        _counts(report),
        "## Responses",
        _responses(report),
        "## Build it again",
        f"raydiv {version('raydiv')}, seed {plan.seed}; `data.jsonl` has SHA-256 `{report.fingerprint}`.",
        f"```\n{plan.command()}\n```",
        "## Use it",
        "```yaml\ndata: {train: OUTPUT/data.jsonl}   # in a raydiv recipe; OUTPUT is this folder\n```",
        '```python\ndatasets.load_dataset("json", data_files="OUTPUT/data.jsonl")   # for TRL\n```',
        "## Known limits",
        _limits(plan, report),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(plan: BuildOptions) -> str:
    facts = {
        "pretty_name": f"{TITLES[plan.kind]} by raydiv",
        "license": "other",
        "license_name": "unknown-as-its-sources",
        "task_categories": ["text-generation"],
        "tags": ["safety", "alignment", "preference", "raydiv", "trl", "not-for-all-audiences"],
        "configs": [{"config_name": "default", "data_files": "data.jsonl"}],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _columns() -> str:
    return _table(
        ("column", "content"),
        [
            ("`prompt`, `chosen`, `rejected`", "TRL's preference format, plain or conversational"),
            ("`harmful`", "whether the prompt is"),
            ("`source`", "file and line (of other kinds than JSONL: record) of the prompt"),
        ],
    )


def _origins(plan: BuildOptions, models: Mapping[str, str]) -> str:
    """Every source with its files, and every model."""
    sources = {"harmful prompts": plan.harmful, "harmless prompts": plan.harmless}
    if plan.bank is not None:
        sources["refusals"] = plan.bank
    rows = [
        (what, f"`{written(source)}`", f"`{file.name}`", f"`{file.digest}`")
        for what, source in sources.items()
        for file in files_of(source)
    ]
    rows += [("answers", f"`{name}`", "", f"`{digest}`") for name, digest in models.items()]
    return _table(("what", "source", "file", "digest"), rows)


def _ways(plan: BuildOptions, report: BuildReport, bank: int) -> str:
    """How refusals and worse answers were had."""
    drawn = f"one of {bank} (`{plan.bank.path}`), drawn by seed and prompt" if plan.bank else ""
    limit = f"greedy, of at most {plan.max_new_tokens or MAX_NEW_TOKENS} tokens"
    if plan.refusals == "constant":
        refusals = "the same sentence every time"
    elif plan.refusals == "own":
        others = f"; those of harmless prompts: {drawn}" if plan.kind == "compliance-refusal" else ""
        refusals = f"the harmful source's own aligned responses{others}"
    elif plan.refusals in plan.models:
        refusals = (
            f"answers of `{plan.refusals}`, told to decline ({limit}); {report.refusals_replaced} that string rules "
            f"took for no refusal were replaced by {drawn}"
        )
    else:
        refusals = drawn
    lines = [f"- Refusals: {refusals}."]
    if plan.worse is not None:
        worse = "the harmless source's own" if plan.worse == "own" else f"answers of `{plan.worse}` ({limit})"
        lines.append(f"- Worse answers: {worse}.")
    if plan.models:
        lines.append(f"- {report.answers_cut} answers of models were as long as they might get, and probably cut off.")
    if plan.prompts is not None:
        lines.append(f"- {plan.prompts} prompts of each class were chosen by seed and prompt.")
    return "\n".join([*lines, "- Rows are in an order that follows from seed and prompt, classes mixed."])


def _counts(report: BuildReport) -> str:
    rows = [
        (WHY[one.name], *(f"{getattr(counts, one.name):,}" for counts in report.classes.values()))
        for one in fields(ClassCounts)
    ]
    return _table(("", *report.classes), rows)


def _responses(report: BuildReport) -> str:
    rows = [
        (name, f"{side.median_words:g}", f"{side.p90_words:g}", f"{side.refusals:.0%}")
        for name, side in report.sides.items()
    ]
    table = _table(("side", "words, median", "words, 90th percentile", "refusals by string rules"), rows)
    return f"{table}\n\n{ERRORS}"


def _limits(plan: BuildOptions, report: BuildReport) -> str:
    """What is wrong with such data, as far as the plan tells."""
    limits = [
        "Whether prompts are harmful, and answers right, is the sources' word; nothing here was checked by a person.",
        "Overlap with prompts that models are evaluated on was not looked for.",
        "Where lengths above differ between chosen and rejected, a model can tell them apart by length alone.",
    ]
    if plan.refusals == "constant":
        limits.append(
            "One refusal for all: a model learns the sentence, and telling the two laws apart takes its first word."
        )
    if plan.refusals == "own" and plan.kind == "compliance-refusal":
        limits.append(
            "Wanted and needless refusals come from two places, and may be told apart by their wording alone."
        )
    if plan.refusals not in ("own", *plan.models):
        limits.append("The refusals say nothing about what they refuse.")
    if plan.models:
        limits.append("Answers of models were read by no one; they may quote the prompt, stop short, or be wrong.")
    if plan.worse in plan.models:
        limits.append("That a model's answer is worse than the source's is assumed.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
