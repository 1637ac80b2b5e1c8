"""Prompts of one set that another has too, word for word or nearly: evaluation prompts that were trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydiv.data.formats import BadRow, Reading
from raydiv.data.sources import parse
from raydiv.model.chat import Messages

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

    def __init__(self, texts: Sequence[str], readings: Sequence[Reading]) -> None:
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
