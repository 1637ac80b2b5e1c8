"""``raydiv data build``: sources read and held apart, prompts chosen, responses found, rows and card written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.commands.data_build.answered import AnsweredPrompt, CollectedPrompts, collect
from raydiv.commands.data_build.card import BuildReport, ClassCounts, Side, card
from raydiv.commands.data_build.counterparts import Models, read_bank, refusals_of, usable, worse_answers
from raydiv.commands.data_build.options import CLASSES, BuildOptions, Kind
from raydiv.config.cluster import ClusterConfig
from raydiv.config.source import Source
from raydiv.evaluation.refusal import is_refusal
from raydiv.model.chat import as_turns
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic, require_empty


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """A prompt with its two responses."""

    prompt: AnsweredPrompt
    chosen: str
    rejected: str

    def as_json(self, conversational: bool) -> dict[str, Any]:
        """In TRL's preference format, plain or conversational, with the prompt's label and place."""
        labels = {"harmful": self.prompt.harmful, "source": self.prompt.where}
        if not conversational:
            return {"prompt": self.prompt.prompt, "chosen": self.chosen, "rejected": self.rejected} | labels
        return {
            "prompt": as_turns(self.prompt.prompt),
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
    seed: int = 0,
    cluster: ClusterConfig | None = None,
    display: ProgressDisplay | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
) -> BuildReport:
    """``raydiv data build``: a set as the KLDO authors made theirs (arXiv 2502.00657), in the folder ``output``.

    A harmful prompt gets a refusal for its aligned response and keeps the source's compliance for its unaligned one. A
    harmless prompt keeps the source's answer; its unaligned response is a refusal (compliance-refusal) or a worse answer
    (preference).

    ``refusals``: bank (the bundled ones), constant (always the same), own (the harmful source's; harmless prompts get the
    bank's), model:ID, or a source with a column ``refusal``. ``worse``, of preference alone: own (the harmless source's
    unaligned responses; the default) or model:ID. ``prompts``: how many of each class; all by default. ``template`` and
    ``max_new_tokens`` (256 by default) are for the models asked.

    Raises UserError for options that do not fit, an ``output`` that is not empty, a record that is wrong, a response that
    is missing, a prompt that is in both sources, too few prompts, or a class that nothing remains of.
    """
    if worse is None and kind == "preference":
        worse = "own"
    plan = BuildOptions(harmful, harmless, kind, refusals, worse, prompts, seed, template, max_new_tokens)
    require_empty(output)
    bank = read_bank(plan)
    models = Models(plan, cluster or ClusterConfig(), display or ProgressDisplay())
    collected = {label: collect(source, label) for label, source in plan.sources.items()}
    _require_apart(collected)
    _require_responses(plan, collected)
    chosen = [prompt for label, found in collected.items() for prompt in _choose(plan, label, found)]
    with models.session():
        refused = refusals_of(plan, [prompt for prompt in chosen if plan.refuses(prompt)], bank, models)
        worse_ones = worse_answers(plan, [prompt for prompt in chosen if not plan.refuses(prompt)], models)
    rows, left_out = _rows(plan, chosen, refused.given | worse_ones)
    _require_both_classes(plan, rows, left_out)
    content = _lines(rows)
    report = BuildReport(
        kind=plan.kind,
        data=output / "data.jsonl",
        card=output / "README.md",
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        seed=plan.seed,
        classes={name: _counts(label, collected[label], rows, left_out) for label, name in CLASSES.items()},
        sides=_sides(rows),
        refusals_replaced=refused.replaced,
        answers_cut=models.cut,
    )
    output.mkdir(parents=True, exist_ok=True)
    _write(report.data, content)
    _write(report.card, card(plan, report, len(bank), models.fingerprints()))
    return report


def _require_apart(collected: Mapping[bool, CollectedPrompts]) -> None:
    """Refuse prompts that are in both sources."""
    harmful, harmless = collected[True].prompts, collected[False].prompts
    both = [key for key in harmful if key in harmless]
    if both:
        first = f"{harmful[both[0]].where} and {harmless[both[0]].where}"
        raise UserError(
            f"the sources share {len(both)} prompts, which cannot be harmful and harmless at once; the first is at {first}"
        )


def _require_responses(plan: BuildOptions, collected: Mapping[bool, CollectedPrompts]) -> None:
    """Refuse prompts without the responses that the plan takes from their source."""
    needed = [
        (True, False, "compliant response (an unaligned one)"),
        (False, True, "good answer (an aligned response)"),
    ]
    if plan.refusals == "own":
        needed.append((True, True, "refusal (an aligned response), and refusals: own takes the source's"))
    if plan.worse == "own":
        needed.append((False, False, "worse answer (an unaligned response), and worse: own takes the source's"))
    for label, aligned, words in needed:
        prompts = collected[label].prompts.values()
        without = [prompt.where for prompt in prompts if aligned not in prompt.responses]
        if without:
            raise UserError(
                f"{without[0]}: no {words}; so it is with {len(without)} of {len(prompts)} {CLASSES[label]} prompts"
            )


def _choose(plan: BuildOptions, label: bool, found: CollectedPrompts) -> list[AnsweredPrompt]:
    """As many prompts of a source as wanted."""
    prompts = sorted(found.prompts.values(), key=lambda prompt: plan.draw("choice", prompt))
    if plan.prompts is not None and len(prompts) < plan.prompts:
        raise UserError(
            f"prompts: {plan.prompts} are wanted of each class, and {plan.sources[label].path} has {len(prompts)}"
        )
    return prompts[: plan.prompts]


def _rows(
    plan: BuildOptions, chosen: Sequence[AnsweredPrompt], given: Mapping[str, str]
) -> tuple[list[ExampleRow], Counter[tuple[bool, str]]]:
    """The rows, classes mixed, and how many prompts of each class teach nothing, by why: these are left out."""
    rows: list[ExampleRow] = []
    left_out: Counter[tuple[bool, str]] = Counter()
    for prompt in sorted(chosen, key=lambda prompt: plan.draw("place", prompt)):
        row = _row(prompt, given[prompt.key])
        if not usable(given[prompt.key]):
            left_out[prompt.harmful, "unusable"] += 1
        elif row.chosen.split() == row.rejected.split():
            left_out[prompt.harmful, "same"] += 1
        else:
            rows.append(row)
    return rows, left_out


def _row(prompt: AnsweredPrompt, other: str) -> ExampleRow:
    """A prompt with what its source is read for, a compliance or a good answer, on the one side and ``other`` on the other."""
    if prompt.harmful:
        return ExampleRow(prompt, chosen=other, rejected=prompt.responses[False])
    return ExampleRow(prompt, chosen=prompt.responses[True], rejected=other)


def _require_both_classes(
    plan: BuildOptions, rows: Sequence[ExampleRow], left_out: Mapping[tuple[bool, str], int]
) -> None:
    for label, name in CLASSES.items():
        if all(row.prompt.harmful != label for row in rows):
            raise UserError(
                f"{plan.sources[label].path}: no {name} prompt is left: {left_out[label, 'same']} with two responses that are "
                f"the same, {left_out[label, 'unusable']} that a model has no usable answer to"
            )


def _lines(rows: Sequence[ExampleRow]) -> str:
    """The rows as JSONL, all of them conversational where one of them must be."""
    conversational = any(isinstance(row.prompt.prompt, list) for row in rows)
    return "".join(json.dumps(row.as_json(conversational), ensure_ascii=False) + "\n" for row in rows)


def _counts(
    label: bool, found: CollectedPrompts, rows: Sequence[ExampleRow], left_out: Mapping[tuple[bool, str], int]
) -> ClassCounts:
    kept = sum(row.prompt.harmful == label for row in rows)
    same, unusable = left_out[label, "same"], left_out[label, "unusable"]
    return ClassCounts(
        rows=kept,
        prompts=len(found.prompts),
        duplicates=found.duplicates,
        further_responses=found.further_responses,
        not_chosen=len(found.prompts) - kept - same - unusable,
        same_responses=same,
        unusable_answers=unusable,
    )


def _sides(rows: Sequence[ExampleRow]) -> dict[str, Side]:
    """Figures of each class's chosen and rejected responses."""
    sides = {}
    for label, name in CLASSES.items():
        of_class = [row for row in rows if row.prompt.harmful == label]
        sides[f"{name} chosen"] = _side([row.chosen for row in of_class])
        sides[f"{name} rejected"] = _side([row.rejected for row in of_class])
    return sides


def _side(responses: Sequence[str]) -> Side:
    median, p90 = np.percentile([len(response.split()) for response in responses], [50, 90])
    return Side(float(median), float(p90), sum(map(is_refusal, responses)) / len(responses))


def _write(path: Path, content: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
