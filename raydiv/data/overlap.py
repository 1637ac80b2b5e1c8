"""Prompts that two sets share, word for word or nearly: evaluation prompts that were trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config import Recipe
from raydiv.data.fields import BadRow
from raydiv.data.formats import RecordReader
from raydiv.data.index import OpenSource, RowNotes, are_small
from raydiv.data.prompt_sets import Prompt
from raydiv.data.readers import parse_record
from raydiv.data.tokenize import RecordChunk, record_chunks
from raydiv.model.chat import Chat, ChatPrompt, as_messages
from raydiv.runtime.row_stream import map_stream

SHARED_TRIGRAMS = 0.5
"""Two prompts are near if they share this fraction of the shorter prompt's word trigrams ..."""

SHARED_WORDS = 0.6
"""... or this fraction of all words of both prompts, without stop words."""

HASH_BUCKETS = 2**20
"""Buckets of the hashed words and trigrams."""


@dataclass(frozen=True, slots=True)
class Match:
    """Evaluation prompt ``number`` and a similar record; ``same``: equal except for case, punctuation and spaces."""

    number: int
    same: bool
    file: int
    position: int


def normalized(prompt: ChatPrompt) -> str:
    """A prompt's words in lower case, without punctuation; of a conversation without its system turn."""
    text = (
        prompt
        if isinstance(prompt, str)
        else " ".join(str(m["content"]) for m in as_messages(prompt) if m["role"] != "system")
    )
    return " ".join(re.findall(r"\w+", text.casefold()))


class PromptMatcher:
    """A pool's actor: finds evaluation prompts (``texts``, normalized) among the prompts of record chunks."""

    def __init__(self, texts: Sequence[str], readers: Sequence[RecordReader]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        options: dict[str, Any] = {"n_features": HASH_BUCKETS, "binary": True, "norm": None, "alternate_sign": False}
        options |= {"tokenizer": str.split, "token_pattern": None}
        self._trigrams = HashingVectorizer(ngram_range=(3, 3), **options)
        self._words = HashingVectorizer(stop_words="english", **options)
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._evaluation = [(vectorizer, vectorizer.transform(texts)) for vectorizer in (self._trigrams, self._words)]
        self._readers = readers

    def __call__(self, chunks: list[RecordChunk]) -> list[list[Match]]:
        """The matches in each chunk, at most one per evaluation prompt."""
        return [self._matches(chunk) for chunk in chunks]

    def _matches(self, chunk: RecordChunk) -> list[Match]:
        positions, texts = [], []
        for position, content in chunk.records:
            try:
                prompt = self._readers[chunk.source].examples(parse_record(content), "")[0].prompt
            except BadRow:  # bad rows are reported when the source is tokenised
                continue
            positions.append(position)
            texts.append(normalized(prompt))
        if not texts:
            return []
        matches: dict[int, Match] = {}
        for row, number in zip(*np.nonzero(self.near(texts)), strict=True):
            matches.setdefault(int(number), Match(int(number), False, chunk.file, positions[int(row)]))
        for row, text in enumerate(texts):
            if text and text in self._numbers:  # a prompt without words matches nothing
                matches[self._numbers[text]] = Match(self._numbers[text], True, chunk.file, positions[row])
        return list(matches.values())

    def near(self, texts: Sequence[str]) -> np.ndarray:
        """Which of ``texts`` [n] are near which evaluation prompts [m]: booleans [n, m]."""
        near = np.zeros((len(texts), len(self._numbers)), dtype=bool)
        for (vectorizer, evaluation), fraction in zip(self._evaluation, (SHARED_TRIGRAMS, SHARED_WORDS), strict=True):
            features = vectorizer.transform(texts)
            shared = (features @ evaluation.T).toarray()
            sizes, others = np.asarray(features.sum(axis=1)), np.asarray(evaluation.sum(axis=1)).T
            total = np.minimum(sizes, others) if vectorizer is self._trigrams else sizes + others - shared
            near |= shared >= np.maximum(fraction * total, 1)
        return near


@dataclass(frozen=True, slots=True)
class Overlap:
    """Prompts that an evaluation set of ``prompts`` prompts shares with a source.

    Each shared prompt has its place in the evaluation set, its place in the source, and whether both are the ``same``.
    """

    name: str
    prompts: int
    evaluation_places: list[str]
    source_places: list[str]
    same: list[bool]

    def as_json(self) -> dict[str, Any]:
        columns = zip(self.evaluation_places, self.source_places, self.same, strict=True)
        shared = [{"prompt": prompt, "found": place, "same": same} for prompt, place, same in columns]
        same = sum(self.same)
        return {"prompts": self.prompts, "same": same, "near": len(shared) - same, "found": shared}


def overlap_with_training(recipe: Recipe, directory: Path, prompts: Mapping[str, Sequence[Prompt]]) -> list[Overlap]:
    """The overlap of each prompt set with each of the recipe's training sources; needs a Ray session.

    ``directory`` holds the recipe's tokenizer. Raises UserError for a source that no longer exists.
    """
    chat = Chat.from_recipe(recipe, directory)
    sources = [OpenSource(source, recipe.data, recipe.batch, chat) for source in recipe.data.train]
    evaluation_sets = [
        EvaluationPrompts.of(name, [(prompt.text, prompt.id) for prompt in members])
        for name, members in prompts.items()
    ]
    return [overlap for opened in sources for overlap in find_overlaps(opened, evaluation_sets, recipe)]


@dataclass(frozen=True, slots=True)
class EvaluationPrompts:
    """The distinct prompts of an evaluation set, normalized, and the place of each."""

    name: str
    texts: list[str]
    places: list[str]

    @classmethod
    def of(cls, name: str, prompts: Iterable[tuple[ChatPrompt, str]]) -> EvaluationPrompts:
        """From prompts and their places; of equal prompts, the first counts."""
        places: dict[str, str] = {}
        for prompt, place in prompts:
            places.setdefault(normalized(prompt), place)
        return cls(name, list(places), list(places.values()))


def find_overlaps(
    opened: OpenSource, evaluation_sets: Sequence[EvaluationPrompts], recipe: Recipe
) -> Iterator[Overlap]:
    """The overlap of each evaluation set with the source, in one pass through the source."""
    texts = list(dict.fromkeys(text for prompts in evaluation_sets for text in prompts.texts))
    best: dict[str, Match] = {}
    if texts:
        arguments = {"texts": texts, "readers": [opened.reader]}
        readers = record_chunks([opened])
        here = are_small([opened])
        for matches in map_stream(readers, PromptMatcher, arguments, cluster=recipe.cluster, here=here):
            for match in matches:
                text = texts[match.number]
                if text not in best or (match.same and not best[text].same):
                    best[text] = match
    for prompts in evaluation_sets:
        shared = [
            (place, best[text]) for text, place in zip(prompts.texts, prompts.places, strict=True) if text in best
        ]
        records = RowNotes.locate(opened.files, [(match.file, match.position, "") for _, match in shared])
        yield Overlap(
            prompts.name,
            len(prompts.texts),
            evaluation_places=[place for place, _ in shared],
            source_places=[f"{file}:{line}" for file, line in records.places],
            same=[match.same for _, match in shared],
        )
