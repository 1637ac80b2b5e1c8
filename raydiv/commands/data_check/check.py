"""The content of a data set, its errors, and its overlap with evaluation prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydiv.commands.data_check.examples import shown_examples
from raydiv.config import Recipe
from raydiv.config.source import Source
from raydiv.data.index import Index, OpenSource, are_small
from raydiv.data.notes import NOTE_TEXTS
from raydiv.data.overlap import EvaluationPrompts, Overlap, find_overlaps
from raydiv.data.prompt_sets import PromptSets
from raydiv.data.readers import read_examples
from raydiv.data.sources import files_of
from raydiv.data.splits import invalid_pairs
from raydiv.data.tokenize import tokenize
from raydiv.data.tokens import KEY
from raydiv.model.chat import Chat, ChatPrompt
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session

HISTOGRAM_BINS = 12
"""Bins of the token-length histogram."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """The report on one source. ``facts`` is the object that ``--json`` prints."""

    facts: dict[str, Any]

    @property
    def valid(self) -> bool:
        """Whether the source has neither bad rows nor invalid pairs, and no prompts that are rendered already."""
        invalid = self.facts["bad_rows"]["count"], self.facts["pairs"]["broken"], self.facts["rendered"]
        return not any(invalid)


def check_data(
    recipe: Recipe,
    sources: Sequence[Source] | None = None,
    display: ProgressDisplay | None = None,
    show_text: bool = False,
) -> list[DataReport]:
    """A report on each source, by default of ``recipe.data.train``, at the recipe's tokenizer, template and lengths.

    Evaluation prompts are those of ``data.eval``, ``evaluate.prompts`` and ``separation.prompts``. Bad rows are
    reported, not raised. ``show_text`` adds examples with their tokens.

    Raises UserError for a source that cannot be read.
    """
    display, sources = display or ProgressDisplay(), sources or recipe.data.train
    for source in sources:
        files_of(source)  # a missing file is reported before a model is converted or downloaded
    evaluation_sets = _evaluation_prompts(recipe)
    directory = model_directory(recipe.model.id, recipe.model.revision)
    chat = Chat.from_recipe(recipe, directory)
    opened = [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources]
    cluster = recipe.cluster.model_copy(update={"num_workers": 1})  # nothing is trained
    with nullcontext() if are_small(opened) else ray_session(cluster):
        with display.phase("tokens") as update:
            indices = tokenize(opened, chat, recipe.cluster, quarantine=True, progress=update)
        reports = []
        for index in indices:
            with display.phase("overlap with evaluation prompts"):
                overlaps = list(find_overlaps(index.opened, evaluation_sets, recipe))
            facts = _facts(index, overlaps, recipe) | {"chat": chat.facts()}
            if show_text:
                facts["shown"] = [example.as_json() for example in shown_examples(index, chat)]
            reports.append(DataReport(facts))
    return reports


def _facts(index: Index, overlaps: Sequence[Overlap], recipe: Recipe) -> dict[str, Any]:
    columns = index.columns
    return {
        "source": index.opened.source.path,
        "files": len(index.opened.files),
        "formats": index.formats(),
        "labels": index.spellings(),
        "ignored": sorted({*index.unread, *index.opened.reader.ignore}),
        "rendered": index.rendered_error(),
        "examples": len(index),
        "classes": _classes(columns),
        "pairs": _pairs(index),
        "prompts": _prompts(columns),
        "duplicates": _duplicates(columns),
        "tokens": _lengths(columns, recipe),
        "notes": {
            note.name: {"meaning": NOTE_TEXTS[note], "count": len(noted), "rows": list(noted.as_json())}
            for note, noted in ((note, index.noted(note)) for note in NOTE_TEXTS)
            if len(noted)
        },
        "overlap": {overlap.name: overlap.as_json() for overlap in overlaps},
        "bad_rows": {
            "count": len(index.bad),
            "reasons": dict(Counter(index.bad.reasons).most_common()),
            "rows": list(index.bad.as_json()),
        },
    }


LABELS = {1: "harmful", 0: "harmless", -1: "unlabelled"}
"""Labels of the index column ``harmful``."""


def _classes(columns: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Counts of examples by class and by the prompt's label."""
    return {
        name: {
            label: int(((columns["aligned"] == aligned) & (columns["harmful"] == code)).sum())
            for code, label in LABELS.items()
        }
        for name, aligned in (("aligned", True), ("unaligned", False))
    }


def _pairs(index: Index) -> dict[str, Any]:
    """Numbers of complete pairs and of examples without a partner, and a message about each invalid pair."""
    pair = index.columns["pair"]
    _, inverse, members = np.unique(pair[pair >= 0], return_inverse=True, return_counts=True)
    unpaired = int((pair < 0).sum()) + int((members[inverse] == 1).sum())
    invalid = list(invalid_pairs(index))
    complete = int((members == 2).sum()) - sum(len(rows) == 2 for rows, _ in invalid)
    return {"complete": complete, "without_partner": unpaired, "broken": [message for _, message in invalid]}


def _prompts(columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Numbers of distinct prompts, and of those that are labelled both harmful and harmless."""
    prompts = columns["prompt_text"]
    both = np.intersect1d(prompts[columns["harmful"] == 1], prompts[columns["harmful"] == 0])
    return {"different": len(np.unique(prompts)), "with_both_labels": len(both)}


def _duplicates(columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Numbers of duplicate examples, and of (prompt, response) that are both aligned and unaligned."""
    keys = [columns[name].astype(KEY).view(np.uint8).reshape(-1, 16) for name in ("prompt_key", "response_key")]
    content = np.ascontiguousarray(np.concatenate(keys, axis=1)).view("V32").ravel()
    aligned, unaligned = (content[columns["aligned"] == label] for label in (True, False))
    repeated = len(content) - len(np.unique(aligned)) - len(np.unique(unaligned))
    return {"examples": repeated, "aligned_and_unaligned": len(np.intersect1d(aligned, unaligned))}


def _lengths(columns: dict[str, np.ndarray], recipe: Recipe) -> dict[str, Any]:
    """Token lengths of prompts and of each class's responses before truncation, and numbers of truncated ones."""
    prompts = columns["prompt_length"] + columns["prompt_cut"]
    responses = columns["response_length"] + columns["response_cut"]
    aligned = columns["aligned"]
    return {
        "prompts": _spread(prompts),
        "aligned responses": _spread(responses[aligned]),
        "unaligned responses": _spread(responses[~aligned]),
        "truncated": {
            "prompts": int((columns["prompt_cut"] > 0).sum()),
            "responses": int((columns["response_cut"] > 0).sum()),
            "max_prompt_length": recipe.batch.max_prompt_length,
            "max_length": recipe.batch.max_length,
        },
    }


def _spread(lengths: np.ndarray) -> dict[str, Any]:
    """Quantiles and histogram of lengths; bins widen with length."""
    if not len(lengths):
        return {"examples": 0}
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, HISTOGRAM_BINS + 1).round().astype(int))
    if len(edges) > 1:
        counts, edges = np.histogram(lengths, edges)
    else:
        counts, edges = np.array([len(lengths)]), np.append(edges, edges + 1)
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1]).round().astype(int).tolist()
    bins = [
        {"from": int(start), "to": int(stop) - 1, "examples": int(count)}
        for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    names = ("min", "p50", "p90", "p99", "max")
    return {"examples": len(lengths), **dict(zip(names, quantiles, strict=True)), "histogram": bins}


def _evaluation_prompts(recipe: Recipe) -> list[EvaluationPrompts]:
    """The prompts of each held-out source and prompt set of the recipe."""
    sets: dict[str, list[tuple[ChatPrompt, str]]] = {}
    for source in recipe.data.eval_sources:
        examples = read_examples(source, recipe.data)
        sets.setdefault(source.path, []).extend((example.prompt, example.source) for example in examples)
    for name, prompts in PromptSets.of(recipe).by_name(recipe).items():
        sets.setdefault(name, []).extend((prompt.text, prompt.id) for prompt in prompts)
    return [EvaluationPrompts.of(name, prompts) for name, prompts in sets.items()]
