"""Prompts of one set that another has too, word for word or nearly: evaluation prompts that were trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config import Recipe
from raydiv.data.formats import BadRow, RecordReader
from raydiv.data.index import OpenSource, RowNotes
from raydiv.data.prompt_sets import Prompt
from raydiv.data.sources import parse
from raydiv.data.tokenize import record_chunks
from raydiv.model.chat import Chat, Messages
from raydiv.runtime.actor_pool import map_stream

SHARED_RUNS = 0.5
"""Share of the shorter prompt's three-word runs that make two prompts near."""

SHARED_WORDS = 0.6
"""Share of both prompts' words, common ones apart, that make two prompts near."""

BUCKETS = 2**20
"""Of the hashed words and runs."""


@dataclass(frozen=True, slots=True)
class Match:
    """Evaluation prompt ``number`` and a record like it; ``same``: up to case, punctuation and spaces."""

    number: int
    same: bool
    file: int
    position: int


def plain(prompt: str | Messages) -> str:
    """A prompt's words, lower-case, without punctuation; of a conversation what was said, system turns apart."""
    said = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt if m["role"] != "system")
    return " ".join(re.findall(r"\w+", said.casefold()))


class PromptMatcher:
    """Finds evaluation prompts (``texts``, as ``plain`` gives them) among the prompts of bundles of records."""

    def __init__(self, texts: Sequence[str], readings: Sequence[RecordReader]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        common: dict[str, Any] = {"n_features": BUCKETS, "binary": True, "norm": None, "alternate_sign": False}
        common |= {"tokenizer": str.split, "token_pattern": None}
        self._runs = HashingVectorizer(ngram_range=(3, 3), **common)
        self._words = HashingVectorizer(stop_words="english", **common)
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._wanted = [(vectorizer, vectorizer.transform(texts)) for vectorizer in (self._runs, self._words)]
        self._readings = readings

    def __call__(self, bundles: list[Any]) -> list[list[Match]]:
        """The matches in each bundle, at most one for an evaluation prompt."""
        return [self._matches(bundle) for bundle in bundles]

    def _matches(self, bundle: Any) -> list[Match]:
        places, texts = [], []
        for position, raw in bundle.records:
            try:
                prompt = self._readings[bundle.source].examples(parse(raw), "")[0].prompt
            except BadRow:  # counted where rows are checked
                continue
            places.append(position)
            texts.append(plain(prompt))
        if not texts:
            return []
        found: dict[int, Match] = {}
        for row, number in zip(*np.nonzero(self.near(texts)), strict=True):
            found.setdefault(int(number), Match(int(number), False, bundle.file, places[int(row)]))
        for row, text in enumerate(texts):
            if text and text in self._numbers:  # what has no words is like nothing
                found[self._numbers[text]] = Match(self._numbers[text], True, bundle.file, places[row])
        return list(found.values())

    def near(self, texts: Sequence[str]) -> np.ndarray:
        """Which of ``texts`` [n] are near which evaluation prompts [m]: truth values [n, m]."""
        near = np.zeros((len(texts), len(self._numbers)), dtype=bool)
        for (vectorizer, wanted), share in zip(self._wanted, (SHARED_RUNS, SHARED_WORDS), strict=True):
            given = vectorizer.transform(texts)
            both = (given @ wanted.T).toarray()
            sizes = np.asarray(given.sum(axis=1)), np.asarray(wanted.sum(axis=1)).T
            least = np.minimum(*sizes) if vectorizer is self._runs else sizes[0] + sizes[1] - both
            near |= both >= np.maximum(share * least, 1)
        return near


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


def overlap_with_training(recipe: Recipe, directory: Path, prompts: Mapping[str, Sequence[Prompt]]) -> list[Overlap]:
    """What prompt sets share with each of the recipe's training sources; needs a Ray session.

    ``directory`` has the recipe's tokenizer. Raises UserError for a source that is not there any more.
    """
    chat = Chat(directory, recipe.data.template, recipe.model.trust_remote_code)
    opened = [OpenSource(source, recipe.data, recipe.batch, chat) for source in recipe.data.train]
    evaluated = [
        EvaluationPrompts.of(name, [(prompt.text, prompt.id) for prompt in own]) for name, own in prompts.items()
    ]
    return [overlap for one in opened for overlap in overlaps_of(one, evaluated, recipe)]


@dataclass(frozen=True, slots=True)
class EvaluationPrompts:
    """The different prompts of an evaluation set, as ``plain`` gives them, and where each stands."""

    name: str
    texts: list[str]
    where: list[str]

    @classmethod
    def of(cls, name: str, prompts: Iterable[tuple[str | Messages, str]]) -> EvaluationPrompts:
        """From prompts and where they stand, the first of those that are alike."""
        where: dict[str, str] = {}
        for prompt, place in prompts:
            where.setdefault(plain(prompt), place)
        return cls(name, list(where), list(where.values()))


def overlaps_of(opened: OpenSource, evaluated: Sequence[EvaluationPrompts], recipe: Recipe) -> Iterator[Overlap]:
    """Each evaluation set against the source, in one pass through it."""
    texts = list(dict.fromkeys(text for prompts in evaluated for text in prompts.texts))
    best: dict[str, Match] = {}
    if texts:
        arguments = {"texts": texts, "readings": [opened.reading]}
        makers = record_chunks([opened])
        for matches in map_stream(makers, PromptMatcher, arguments, cluster=recipe.cluster, model=False):
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
