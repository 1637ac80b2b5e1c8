"""The pairs of W1, the workload that ``raydiv bench`` is read on: random words with compliance-refusal lengths.

Built at first use, the same everywhere, and kept in the cache. A recipe names model and pairs as ``bundled:w1``.
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
ANSWER_MEDIAN, ANSWER_SPREAD, ANSWER_MOST = 130, 0.6, 400
"""Words of an answer: log-normal, with this spread of the logarithm, and cut."""


def w1_pairs() -> Path:
    """A JSONL file of pairs, every other prompt harmful by its label: chosen is then the refusal, else the answer."""
    shape = (MODEL["vocab_size"], PAIRS, PROMPT_WORDS, REFUSAL_WORDS, ANSWER_MEDIAN, ANSWER_SPREAD, ANSWER_MOST)
    target = cache_dir("workloads") / f"w1-{digest(shape)[:8]}.jsonl"
    if not target.is_file():
        with atomic(target) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in _random_pairs()))
    return target


def _random_pairs() -> list[dict[str, Any]]:
    import numpy as np

    draw = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(word(number) for number in draw.integers(len(SPECIAL), MODEL["vocab_size"], words).tolist())

    def between(least: int, most: int) -> int:
        return int(draw.integers(least, most + 1))

    rows = []
    for number in range(PAIRS):
        prompt, refusal = text(between(*PROMPT_WORDS)), text(between(*REFUSAL_WORDS))
        answer = text(min(ANSWER_MOST, round(float(draw.lognormal(np.log(ANSWER_MEDIAN), ANSWER_SPREAD)))))
        harmful = number % 2 == 0
        chosen, rejected = (refusal, answer) if harmful else (answer, refusal)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "harmful": harmful})
    return rows
