"""``raydiv data check``: what is in a data set, what is wrong with it, and what of it evaluation prompts share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config import Recipe
from raydiv.config.source import Source
from raydiv.data.index import Index, OpenSource, RowNotes
from raydiv.data.overlap import Match, PromptMatcher, plain
from raydiv.data.prompt_sets import Prompt, PromptSets
from raydiv.data.sources import read_examples
from raydiv.data.splits import broken_pairs
from raydiv.data.tokenize import bundle_makers, tokenize
from raydiv.data.tokens import KEY
from raydiv.model.chat import Chat, Messages
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import Display
from raydiv.runtime.actor_pool import stream_through
from raydiv.runtime.session import ray_session

HISTOGRAM = 12
"""Bins of the token-length histogram."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Prompts of an evaluation set that a checked source has: ``where[i]`` of the set is like ``there[i]`` of the source."""

    name: str
    prompts: int
    where: list[str]
    there: list[str]
    same: list[bool]

    def as_json(self) -> dict[str, Any]:
        found = [
            {"prompt": where, "found": there, "same": same}
            for where, there, same in zip(self.where, self.there, self.same, strict=True)
        ]
        return {"prompts": self.prompts, "same": sum(self.same), "near": len(found) - sum(self.same), "found": found}


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was found in one source. ``facts`` is what ``--json`` prints."""

    facts: dict[str, Any]

    @property
    def sound(self) -> bool:
        """Whether nothing in it has to be changed: no bad rows, no pairs that are none."""
        return not self.facts["bad_rows"]["count"] and not self.facts["pairs"]["broken"]


def check_data(
    recipe: Recipe, sources: Sequence[Source] | None = None, display: Display | None = None
) -> list[DataReport]:
    """A report for each source (by default those of ``recipe.data.train``), at the recipe's tokenizer, template and lengths.

    Evaluation prompts are those of ``data.eval``, ``evaluate.prompts`` and ``separation.prompts``. Bad rows are listed, not
    raised. Raises UserError for a source that cannot be read at all.
    """
    display = display or Display()
    directory = model_directory(recipe.model.id, recipe.model.revision)
    chat = Chat(directory, recipe.data.template, recipe.model.trust_remote_code)
    opened = [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources or recipe.data.train]
    evaluated = _evaluation_prompts(recipe)
    with ray_session(recipe.cluster.model_copy(update={"num_workers": 1})):  # nothing is trained
        with display.phase("tokens") as update:
            indices = tokenize(opened, chat, recipe.cluster, quarantine=True, progress=update)
        reports = []
        for index in indices:
            with display.phase("overlap with evaluation prompts"):
                overlaps = list(_overlaps(index.opened, evaluated, recipe))
            reports.append(DataReport(_facts(index, overlaps, recipe)))
    return reports


def overlap_with_training(recipe: Recipe, directory: Path, prompts: Mapping[str, Sequence[Prompt]]) -> list[Overlap]:
    """What prompt sets share with each of the recipe's training sources; needs a Ray session.

    ``directory`` has the recipe's tokenizer. Raises UserError for a source that is not there any more.
    """
    chat = Chat(directory, recipe.data.template, recipe.model.trust_remote_code)
    opened = [OpenSource(source, recipe.data, recipe.batch, chat) for source in recipe.data.train]
    evaluated = [
        _EvaluationPrompts.of(name, [(prompt.text, prompt.id) for prompt in own]) for name, own in prompts.items()
    ]
    return [overlap for one in opened for overlap in _overlaps(one, evaluated, recipe)]


def _facts(index: Index, overlaps: Sequence[Overlap], recipe: Recipe) -> dict[str, Any]:
    columns = index.columns
    return {
        "source": index.opened.source.path,
        "files": len(index.opened.files),
        "examples": len(index),
        "classes": _classes(columns),
        "pairs": _pairs(index),
        "prompts": _prompts(columns),
        "duplicates": _duplicates(columns),
        "tokens": _lengths(columns, recipe),
        "overlap": {overlap.name: overlap.as_json() for overlap in overlaps},
        "bad_rows": {
            "count": len(index.bad),
            "reasons": dict(Counter(index.bad.reasons).most_common()),
            "rows": list(index.bad.lines()),
        },
    }


LABELS = {1: "harmful", 0: "harmless", -1: "unlabelled"}
"""What the index's ``harmful`` says."""


def _classes(columns: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Examples by class, and by their prompt's label."""
    return {
        name: {
            label: int(((columns["aligned"] == aligned) & (columns["harmful"] == code)).sum())
            for code, label in LABELS.items()
        }
        for name, aligned in (("aligned", True), ("unaligned", False))
    }


def _pairs(index: Index) -> dict[str, Any]:
    """Complete pairs, examples without a partner, and pairs that are none, by place."""
    pair = index.columns["pair"]
    _, inverse, members = np.unique(pair[pair >= 0], return_inverse=True, return_counts=True)
    alone = int((pair < 0).sum()) + int((members[inverse] == 1).sum())
    broken = list(broken_pairs(index))
    complete = int((members == 2).sum()) - sum(len(rows) == 2 for rows, _ in broken)
    return {"complete": complete, "without_partner": alone, "broken": [words for _, words in broken]}


def _prompts(columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Different prompts, and those that are labelled both harmful and harmless."""
    prompts = columns["prompt_text"]
    both = np.intersect1d(prompts[columns["harmful"] == 1], prompts[columns["harmful"] == 0])
    return {"different": len(np.unique(prompts)), "with_both_labels": len(both)}


def _duplicates(columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Examples that were there before, and (prompt, response) that are both aligned and unaligned."""
    keys = [columns[name].astype(KEY).view(np.uint8).reshape(-1, 16) for name in ("prompt_text", "response_key")]
    content = np.ascontiguousarray(np.concatenate(keys, axis=1)).view("V32").ravel()
    aligned, unaligned = (content[columns["aligned"] == label] for label in (True, False))
    repeated = len(content) - len(np.unique(aligned)) - len(np.unique(unaligned))
    return {"examples": repeated, "aligned_and_unaligned": len(np.intersect1d(aligned, unaligned))}


def _lengths(columns: dict[str, np.ndarray], recipe: Recipe) -> dict[str, Any]:
    """Tokens of prompts and of each class's responses before truncation, and what truncation takes at the recipe's lengths."""
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
    """Quantiles of lengths, and their histogram in bins that widen with length."""
    if not len(lengths):
        return {"examples": 0}
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, HISTOGRAM + 1).round().astype(int))
    counts, edges = (
        np.histogram(lengths, edges) if len(edges) > 1 else (np.array([len(lengths)]), np.append(edges, edges + 1))
    )
    quantiles = dict(
        zip(
            ("min", "p50", "p90", "p99", "max"),
            np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1]).round().astype(int).tolist(),
            strict=True,
        )
    )
    bins = [
        {"from": int(a), "to": int(b) - 1, "examples": int(n)}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return {"examples": len(lengths), **quantiles, "histogram": bins}


@dataclass(frozen=True, slots=True)
class _EvaluationPrompts:
    """The different prompts of an evaluation set, as ``plain`` gives them, and where each stands."""

    name: str
    texts: list[str]
    where: list[str]

    @classmethod
    def of(cls, name: str, prompts: Iterable[tuple[str | Messages, str]]) -> _EvaluationPrompts:
        """From prompts and where they stand, the first of those that are alike."""
        where: dict[str, str] = {}
        for prompt, place in prompts:
            where.setdefault(plain(prompt), place)
        return cls(name, list(where), list(where.values()))


def _evaluation_prompts(recipe: Recipe) -> list[_EvaluationPrompts]:
    found: dict[str, list[tuple[str | Messages, str]]] = {}
    for source in recipe.data.eval_sources:
        examples = read_examples(source, recipe.data.columns)
        found.setdefault(source.path, []).extend((example.prompt, example.source) for example in examples)
    for name, prompts in PromptSets.of(recipe).by_name(recipe).items():
        found.setdefault(name, []).extend((prompt.text, prompt.id) for prompt in prompts)
    return [_EvaluationPrompts.of(name, own) for name, own in found.items()]


def _overlaps(opened: OpenSource, evaluated: Sequence[_EvaluationPrompts], recipe: Recipe) -> Iterator[Overlap]:
    """Each evaluation set against the source, in one pass through it."""
    texts = list(dict.fromkeys(text for prompts in evaluated for text in prompts.texts))
    best: dict[str, Match] = {}
    if texts:
        arguments = {"texts": texts, "readings": [opened.reading]}
        makers = bundle_makers([opened])
        for matches in stream_through(makers, PromptMatcher, arguments, cluster=recipe.cluster, model=False):
            for match in matches:
                if texts[match.number] not in best or (match.same and not best[texts[match.number]].same):
                    best[texts[match.number]] = match
    for prompts in evaluated:
        where, found = [], []
        for text, place in zip(prompts.texts, prompts.where, strict=True):
            if text in best:
                where.append(place)
                found.append(best[text])
        places = RowNotes.found(opened.files, [(match.file, match.position, "") for match in found]).places
        there = [f"{file}:{line}" for file, line in places]
        yield Overlap(prompts.name, len(prompts.texts), where, there, [match.same for match in found])
