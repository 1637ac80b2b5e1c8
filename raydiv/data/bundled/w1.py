"""The pairs of W1, the reference workload of ``raydiv bench``: random words in compliance-refusal lengths.

They are generated at first use, identically on every machine, and cached. In a recipe, ``bundled:w1`` is both the model
and the pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raydiv.model.w1 import MODEL, SPECIAL, word
from raydiv.utils.cache import cache_dir, digest
from raydiv.utils.storage import atomic

PAIRS = 256
PROMPT_WORDS, REFUSAL_WORDS = (6, 20), (8, 15)
ANSWER_MEDIAN, ANSWER_SIGMA, MAX_ANSWER_WORDS = 130, 0.6, 400
"""Words of an answer: log-normal with this median and this standard deviation of the logarithm, cut at the maximum."""


def w1_pairs() -> Path:
    """A JSONL file of pairs. Every other prompt is labelled harmful, with the refusal as its chosen response."""
    shape = (MODEL["vocab_size"], PAIRS, PROMPT_WORDS, REFUSAL_WORDS, ANSWER_MEDIAN, ANSWER_SIGMA, MAX_ANSWER_WORDS)
    path = cache_dir("workloads") / f"w1-{digest(shape)[:8]}.jsonl"
    if not path.is_file():
        with atomic(path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in _random_pairs()))
    return path


def _random_pairs() -> list[dict[str, Any]]:
    import numpy as np

    generator = np.random.default_rng(0)

    def text(words: int) -> str:
        numbers = generator.integers(len(SPECIAL), MODEL["vocab_size"], words)
        return " ".join(word(number) for number in numbers.tolist())

    def between(minimum: int, maximum: int) -> int:
        return int(generator.integers(minimum, maximum + 1))

    rows = []
    for number in range(PAIRS):
        prompt, refusal = text(between(*PROMPT_WORDS)), text(between(*REFUSAL_WORDS))
        answer = text(min(MAX_ANSWER_WORDS, round(float(generator.lognormal(np.log(ANSWER_MEDIAN), ANSWER_SIGMA)))))
        harmful = number % 2 == 0
        chosen, rejected = (refusal, answer) if harmful else (answer, refusal)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "harmful": harmful})
    return rows
