"""The learning rate as a pure function of the optimizer update."""

from __future__ import annotations

import math

from raydiv.config.recipe import OptimConfig


def learning_rate(optim: OptimConfig, update: int, updates: int) -> float:
    """Rate of ``update`` (from 0) of ``updates``.

    Rises linearly to ``optim.lr`` over ``optim.warmup`` updates, then holds, or falls to 0 at the end of the run linearly or
    along half a cosine.
    """
    if update < optim.warmup:
        return optim.lr * (update + 1) / optim.warmup
    done = (update - optim.warmup) / max(1, updates - optim.warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return optim.lr * factor[optim.schedule]
