"""``raydiv data build``: reads sources, chooses prompts, completes their responses, writes rows and data card."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.commands.data_build.card import BuildReport, ClassCounts, ResponseStatistics, data_card
from raydiv.commands.data_build.options import CLASSES, BuildOptions, Kind
from raydiv.commands.data_build.prompts import AnsweredPrompt, CollectedPrompts, collect
from raydiv.commands.data_build.responses import AnswerModels, choose_refusals, is_usable, read_bank, worse_answers
from raydiv.config.cluster import ClusterConfig
from raydiv.config.source import Source
from raydiv.evaluation.refusal import is_refusal
from raydiv.model.chat import as_messages
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic, require_empty


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """A prompt with its two responses; with ``beginning`` both continue that beginning of an answer."""

    prompt: AnsweredPrompt
    chosen: str
    rejected: str
    beginning: str = ""

    @property
    def is_conversation(self) -> bool:
        return bool(self.beginning) or isinstance(self.prompt.prompt, list)

    def as_json(self, conversational: bool) -> dict[str, Any]:
        """The row in TRL's preference format, plain or conversational, with the prompt's label, file and line."""
        labels = {"harmful": self.prompt.harmful, "source": self.prompt.where}
        if not conversational:
            return {"prompt": self.prompt.prompt, "chosen": self.chosen, "rejected": self.rejected} | labels
        begun = [{"role": "assistant", "content": self.beginning}] if self.beginning else []
        return {
            "prompt": [*as_messages(self.prompt.prompt), *begun],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        } | labels


def build_data(
    harmful: Source,
    harmless: Source,
    output: Path,
    *,
    kind: Kind,
    refusals: str = "bank",
    worse: str | None = None,
    prompts: int | None = None,
    recovery: int | None = None,
    seed: int = 0,
    cluster: ClusterConfig | None = None,
    display: ProgressDisplay | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
) -> BuildReport:
    """``raydiv data build``: a set in the way of the KLDO authors (arXiv 2502.00657), in the folder ``output``.

    A harmful prompt gets a refusal as its aligned response, and keeps the source's compliance as its unaligned one. A
    harmless prompt keeps the source's answer; its unaligned response is a refusal (compliance-refusal) or a worse
    answer (preference).

    ``refusals``: bank (the bundled ones), constant (always the same), own (the harmful source's; harmless prompts get
    the bank's), model:ID, or a source with a column ``refusal``. ``worse``, for preference alone: own (the harmless
    source's unaligned responses; the default) or model:ID. ``prompts``: number of each class; all by default.
    ``recovery`` adds a row for each prompt whose answer has begun wrongly, by at most so many words: both responses
    continue it, the chosen one with the right answer (Qi et al., arXiv 2406.05946, section 4.1; see recovery_row).
    ``template`` and ``max_new_tokens`` (256 by default) apply to the models that answer.

    Raises UserError for options that do not apply, an ``output`` that is not empty, a bad row, a missing response, a
    prompt in both sources, too few prompts, or a class without any row.
    """
    if worse is None and kind == "preference":
        worse = "own"
    options = BuildOptions(harmful, harmless, kind, refusals, worse, prompts, recovery, seed, template, max_new_tokens)
    require_empty(output)
    bank = read_bank(options)
    models = AnswerModels(options, cluster or ClusterConfig(), display or ProgressDisplay())
    collected = {label: collect(source, label) for label, source in options.sources.items()}
    _require_disjoint(collected)
    _require_responses(options, collected)
    chosen = [prompt for label, prompts in collected.items() for prompt in _choose(options, label, prompts)]
    with models.session():
        refused = choose_refusals(options, [prompt for prompt in chosen if options.refuses(prompt)], bank, models)
        worse_by_prompt = worse_answers(options, [prompt for prompt in chosen if not options.refuses(prompt)], models)
    rows, left_out = _rows(options, chosen, refused.by_prompt | worse_by_prompt)
    _require_both_classes(options, rows, left_out)
    begun = _recovery_rows(options, rows, bank)
    content = _as_jsonl(options, [*rows, *begun])
    report = BuildReport(
        kind=options.kind,
        data=output / "data.jsonl",
        card=output / "README.md",
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        seed=options.seed,
        classes={name: _counts(label, collected[label], rows, begun, left_out) for label, name in CLASSES.items()},
        sides=_sides(rows),
        refusals_replaced=refused.replaced,
        answers_cut=models.truncated,
    )
    output.mkdir(parents=True, exist_ok=True)
    _write(report.data, content)
    _write(report.card, data_card(options, report, len(bank), models.fingerprints()))
    return report


def _require_disjoint(collected: Mapping[bool, CollectedPrompts]) -> None:
    """Raise UserError for prompts in both sources."""
    harmful, harmless = collected[True].prompts, collected[False].prompts
    shared = [key for key in harmful if key in harmless]
    if shared:
        raise UserError(
            f"harmful and harmless: {len(shared)} prompts are in both sources; the first is at "
            f"{harmful[shared[0]].where} and {harmless[shared[0]].where}"
        )


def _require_responses(options: BuildOptions, collected: Mapping[bool, CollectedPrompts]) -> None:
    """Raise UserError for prompts without a response that is taken from their source."""
    needed = [
        (True, False, "compliant response (an unaligned one)"),
        (False, True, "good answer (an aligned response)"),
    ]
    if options.refusals == "own":
        needed.append((True, True, "refusal (an aligned response), which refusals: own takes from the source"))
    if options.worse == "own":
        needed.append((False, False, "worse answer (an unaligned response), which worse: own takes from the source"))
    for label, aligned, description in needed:
        prompts = collected[label].prompts.values()
        missing = [prompt.where for prompt in prompts if aligned not in prompt.responses]
        if missing:
            raise UserError(
                f"{missing[0]}: no {description}; missing for {len(missing)} of {len(prompts)} {CLASSES[label]} prompts"
            )


def _choose(options: BuildOptions, label: bool, collected: CollectedPrompts) -> list[AnsweredPrompt]:
    """The requested number of a source's prompts, in an order drawn by seed and prompt."""
    prompts = sorted(collected.prompts.values(), key=lambda prompt: options.draw("choice", prompt))
    if options.prompts is not None and len(prompts) < options.prompts:
        raise UserError(
            f"prompts: {options.prompts} of each class, but {options.sources[label].path} has {len(prompts)}"
        )
    return prompts[: options.prompts]


def _rows(
    options: BuildOptions, chosen: Sequence[AnsweredPrompt], counterparts: Mapping[str, str]
) -> tuple[list[ExampleRow], Counter[tuple[bool, str]]]:
    """The rows, and the number of prompts left out, by class and reason."""
    rows: list[ExampleRow] = []
    left_out: Counter[tuple[bool, str]] = Counter()
    for prompt in chosen:
        row = _row(prompt, counterparts[prompt.key])
        if not is_usable(counterparts[prompt.key]):
            left_out[prompt.harmful, "unusable"] += 1
        elif row.chosen.split() == row.rejected.split():
            left_out[prompt.harmful, "same"] += 1
        else:
            rows.append(row)
    return rows, left_out


def _row(prompt: AnsweredPrompt, counterpart: str) -> ExampleRow:
    """A prompt with its source's response (compliance or good answer) on one side, ``counterpart`` on the other."""
    if prompt.harmful:
        return ExampleRow(prompt, chosen=counterpart, rejected=prompt.responses[False])
    return ExampleRow(prompt, chosen=prompt.responses[True], rejected=counterpart)


def _recovery_rows(options: BuildOptions, rows: Sequence[ExampleRow], bank: Sequence[str]) -> list[ExampleRow]:
    """A row for each of ``rows`` whose wrong answer can begin; none without ``recovery``.

    A harmful prompt's answer begins as a compliance, a harmless prompt's as a refusal.
    """
    if options.recovery is None:
        return []
    begun = []
    for row in rows:
        refused = options.kind == "preference" and not row.prompt.harmful
        wrong = bank[options.draw("refusal", row.prompt) % len(bank)] if refused else row.rejected
        begun.append(recovery_row(row, wrong, options.recovery, options.draw("recovery", row.prompt)))
    return [row for row in begun if row is not None]


def recovery_row(row: ExampleRow, wrong: str, limit: int, draw: int) -> ExampleRow | None:
    """A row whose answer has begun with the first k words of the answer ``wrong``.

    k is uniform on 1, ..., min(``limit``, words of ``wrong`` - 1) by ``draw``, a large random number. The chosen
    response is the row's own, the rejected one the rest of ``wrong``, each after a space. None where ``wrong`` has one
    word, or the prompt ends in an assistant message already.
    """
    ends = [match.end() for match in re.finditer(r"\S+", wrong)]
    if len(ends) < 2 or as_messages(row.prompt.prompt)[-1]["role"] == "assistant":
        return None
    end = ends[draw % min(limit, len(ends) - 1)]
    return ExampleRow(row.prompt, f" {row.chosen.lstrip()}", f" {wrong[end:].strip()}", wrong[:end].lstrip())


def _require_both_classes(
    options: BuildOptions, rows: Sequence[ExampleRow], left_out: Mapping[tuple[bool, str], int]
) -> None:
    for label, name in CLASSES.items():
        if all(row.prompt.harmful != label for row in rows):
            raise UserError(
                f"{options.sources[label].path}: no {name} prompt is left: {left_out[label, 'same']} have two equal "
                f"responses, {left_out[label, 'unusable']} no usable answer of a model"
            )


def _as_jsonl(options: BuildOptions, rows: Sequence[ExampleRow]) -> str:
    """The rows as JSONL, classes mixed: all conversational if any prompt is a conversation."""
    conversational = any(row.is_conversation for row in rows)
    rows = sorted(rows, key=lambda row: options.draw("recovery place" if row.beginning else "place", row.prompt))
    return "".join(json.dumps(row.as_json(conversational), ensure_ascii=False) + "\n" for row in rows)


def _counts(
    label: bool,
    collected: CollectedPrompts,
    rows: Sequence[ExampleRow],
    begun: Sequence[ExampleRow],
    left_out: Mapping[tuple[bool, str], int],
) -> ClassCounts:
    written = sum(row.prompt.harmful == label for row in rows)
    same, unusable = left_out[label, "same"], left_out[label, "unusable"]
    return ClassCounts(
        rows=written,
        recovery_rows=sum(row.prompt.harmful == label for row in begun),
        prompts=len(collected.prompts),
        duplicates=collected.duplicates,
        further_responses=collected.further_responses,
        not_chosen=len(collected.prompts) - written - same - unusable,
        same_responses=same,
        unusable_answers=unusable,
    )


def _sides(rows: Sequence[ExampleRow]) -> dict[str, ResponseStatistics]:
    """Statistics of each class's chosen and rejected responses."""
    sides = {}
    for label, name in CLASSES.items():
        members = [row for row in rows if row.prompt.harmful == label]
        sides[f"{name} chosen"] = _statistics([row.chosen for row in members])
        sides[f"{name} rejected"] = _statistics([row.rejected for row in members])
    return sides


def _statistics(responses: Sequence[str]) -> ResponseStatistics:
    median, p90 = np.percentile([len(response.split()) for response in responses], [50, 90])
    return ResponseStatistics(float(median), float(p90), sum(map(is_refusal, responses)) / len(responses))


def _write(path: Path, content: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
