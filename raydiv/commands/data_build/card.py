"""The report of a build, and its data card, which quotes no prompt or response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from raydiv.commands.data_build.options import BuildOptions, Kind, as_option
from raydiv.commands.data_build.responses import MAX_NEW_TOKENS
from raydiv.data.sources import files_of
from raydiv.evaluation.refusal import STRING_RULE_ERRORS


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Counts of one class: rows written, distinct prompts read, and what was left out (see COUNT_LABELS)."""

    rows: int
    recovery_rows: int
    prompts: int
    duplicates: int
    further_responses: int
    not_chosen: int
    same_responses: int
    unusable_answers: int


@dataclass(frozen=True, slots=True)
class ResponseStatistics:
    """Word counts of one class's responses on one side, and the share that string rules classify as refusals."""

    median_words: float
    p90_words: float
    refusals: float


@dataclass(frozen=True, slots=True)
class BuildReport:
    """A build: its files, the data's SHA-256, counts by class, and statistics by class and side ("harmful chosen").

    ``refusals_replaced`` counts a model's answers that were not refusals; ``answers_cut`` those at the token limit.
    """

    kind: Kind
    data: Path
    card: Path
    fingerprint: str
    seed: int
    classes: dict[str, ClassCounts]
    sides: dict[str, ResponseStatistics]
    refusals_replaced: int
    answers_cut: int

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"data": str(self.data), "card": str(self.card)}


TITLES = {"compliance-refusal": "Compliance-refusal data", "preference": "Preference data"}

REJECTED_HARMLESS = {"compliance-refusal": "a needless refusal", "preference": "a worse answer"}
"""The rejected response to a harmless prompt."""

COUNT_LABELS = {
    "rows": "rows written, an answer from its start",
    "recovery_rows": "rows written, an answer that has begun wrongly",
    "prompts": "distinct prompts read",
    "duplicates": "left out: duplicate records of a prompt",
    "further_responses": "left out: further responses to a prompt on the same side",
    "not_chosen": "prompts not chosen",
    "same_responses": "prompts left out: both responses equal",
    "unusable_answers": "prompts left out: no usable answer of the model",
}
"""Labels of ClassCounts' fields."""


def data_card(options: BuildOptions, report: BuildReport, bank: int, models: Mapping[str, str]) -> str:
    """The data card (README.md with a Hugging Face front matter).

    ``bank`` is the number of refusals in the bank; ``models`` are digests of the models' weights, by name.
    """
    sections = [
        _front_matter(options),
        f"# {TITLES[options.kind]} by raydiv",
        f"Prompts with two responses each, for aligning a language model. A harmful prompt's chosen response is a "
        f"refusal, its rejected one a compliance. A harmless prompt's chosen response is an answer, its rejected one "
        f"{REJECTED_HARMLESS[options.kind]}. Made as in Haldar et al., arXiv 2502.00657. "
        "**The compliances are harmful text.**",
        _columns(),
        "## Sources",
        _sources(options, models),
        "The licence is that of the sources, which raydiv does not know.",
        "## Method",
        _method(options, report, bank),
        "## Counts",
        _counts(report),
        "## Responses",
        _responses(report),
        "## Build it again",
        f"raydiv {version('raydiv')}, seed {options.seed}; `data.jsonl` has SHA-256 `{report.fingerprint}`.",
        f"```\n{options.command()}\n```",
        "## Use it",
        "```yaml\ndata: {train: OUTPUT/data.jsonl}   # in a raydiv recipe; OUTPUT is this folder\n```",
        '```python\ndatasets.load_dataset("json", data_files="OUTPUT/data.jsonl")   # for TRL\n```',
        "## Known limits",
        _limits(options, report),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(options: BuildOptions) -> str:
    metadata = {
        "pretty_name": f"{TITLES[options.kind]} by raydiv",
        "license": "other",
        "license_name": "unknown-as-its-sources",
        "task_categories": ["text-generation"],
        "tags": ["safety", "alignment", "preference", "raydiv", "trl", "not-for-all-audiences"],
        "configs": [{"config_name": "default", "data_files": "data.jsonl"}],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _columns() -> str:
    return _table(
        ("column", "content"),
        [
            ("`prompt`, `chosen`, `rejected`", "TRL's preference format, plain or conversational"),
            ("`harmful`", "whether the prompt is harmful"),
            ("`source`", "file and line (record number for files other than JSONL) of the prompt"),
        ],
    )


def _sources(options: BuildOptions, models: Mapping[str, str]) -> str:
    """Every source with its files, and every model."""
    sources = {"harmful prompts": options.harmful, "harmless prompts": options.harmless}
    if options.bank is not None:
        sources["refusals"] = options.bank
    rows = [
        (content, f"`{as_option(source)}`", f"`{file.name}`", f"`{file.digest}`")
        for content, source in sources.items()
        for file in files_of(source)
    ]
    rows += [("answers", f"`{name}`", "", f"`{digest}`") for name, digest in models.items()]
    return _table(("content", "source", "file", "digest"), rows)


def _method(options: BuildOptions, report: BuildReport, bank: int) -> str:
    """How refusals and worse answers were made."""
    drawn = f"one of {bank} (`{options.bank.path}`), drawn by seed and prompt" if options.bank else ""
    limit = f"greedy, at most {options.max_new_tokens or MAX_NEW_TOKENS} tokens"
    if options.refusals == "constant":
        refusals = "the same sentence every time"
    elif options.refusals == "own":
        others = f"; those of harmless prompts: {drawn}" if options.kind == "compliance-refusal" else ""
        refusals = f"the harmful source's own aligned responses{others}"
    elif options.refusals in options.models:
        refusals = (
            f"answers of `{options.refusals}`, instructed to decline ({limit}); {report.refusals_replaced} that string "
            f"rules do not classify as refusals were replaced by {drawn}"
        )
    else:
        refusals = drawn
    lines = [f"- Refusals: {refusals}."]
    if options.worse is not None:
        worse = "the harmless source's own" if options.worse == "own" else f"answers of `{options.worse}` ({limit})"
        lines.append(f"- Worse answers: {worse}.")
    if options.recovery is not None:
        lines.append(
            f"- Answers that have begun wrongly: the prompt ends in the first k words of the rejected response (of a "
            f"refusal, where the prompt is harmless), k uniform from 1 to {options.recovery}, or to one less than the "
            "words that there are. The chosen response goes on with the right answer, the rejected one with the rest. "
            "One row for each prompt (Qi et al., arXiv 2406.05946)."
        )
    if options.models:
        lines.append(f"- {report.answers_cut} answers of models reached the token limit, and are probably truncated.")
    if options.prompts is not None:
        lines.append(f"- {options.prompts} prompts of each class were drawn by seed and prompt.")
    return "\n".join([*lines, "- The order of rows is drawn by seed and prompt, classes mixed."])


def _counts(report: BuildReport) -> str:
    rows = [
        (COUNT_LABELS[field.name], *(f"{getattr(counts, field.name):,}" for counts in report.classes.values()))
        for field in fields(ClassCounts)
    ]
    return _table(("", *report.classes), rows)


def _responses(report: BuildReport) -> str:
    rows = [
        (name, f"{side.median_words:g}", f"{side.p90_words:g}", f"{side.refusals:.0%}")
        for name, side in report.sides.items()
    ]
    table = _table(("side", "words, median", "words, 90th percentile", "refusals by string rules"), rows)
    return f"{table}\n\n{STRING_RULE_ERRORS}"


def _limits(options: BuildOptions, report: BuildReport) -> str:
    """Known limits of the data that follow from the options."""
    limits = [
        "The sources decide which prompts are harmful and which answers are right; no person checked them here.",
        "Overlap with evaluation prompts was not checked (see `raydiv data check`).",
        "If the lengths of chosen and rejected responses differ above, a model can tell them apart by length alone.",
    ]
    if options.refusals == "constant":
        limits.append("All refusals are equal: a model learns the sentence, and the first word tells both sides apart.")
    if options.refusals == "own" and options.kind == "compliance-refusal":
        limits.append("Wanted and needless refusals come from two sources, and may be told apart by wording alone.")
    if options.refusals not in ("own", *options.models):
        limits.append("The refusals do not mention what they refuse.")
    if options.models:
        limits.append("No person read the models' answers; they may quote the prompt, stop short, or be wrong.")
    if options.worse in options.models:
        limits.append("That a model's answer is worse than the source's is an assumption.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
