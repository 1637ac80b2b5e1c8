"""The layout that fits: the lowest ZeRO stage, then the largest micro-batch, by the model of memory.

A lower stage sends less, and a micro-batch that is a worker's whole share of the step makes any objective one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.config import Recipe
from raydiv.data.plan import Plan
from raydiv.errors import UserError
from raydiv.planning.architecture import Architecture
from raydiv.planning.memory import Memory, Stage, memory_of

MARGIN = 0.1
"""Of a worker's memory, what is left free: the model of memory is right to 15%, mostly below; allocators need some, and on a GPU
its context and NCCL.
"""

LOOKED_AT = 1000
"""Steps whose sizes are looked at; where a later one is larger it makes one micro-batch more."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A layout and the memory that it needs; ``fits`` in the worker's."""

    stage: Stage
    tokens: int
    memory: Memory
    fits: bool


def largest_share(plan: Plan, steps: int, lengths: np.ndarray, workers: int) -> int:
    """Tokens of the largest share of a step that a worker may get; ``lengths`` [n] of all examples, prompt and response."""
    chosen = (lengths[plan.step(step).rows] for step in range(min(steps, LOOKED_AT)))
    return max(int(-(-own.sum() // workers) + (own.max() if workers > 1 else 0)) for own in chosen)


def stages(recipe: Recipe) -> Sequence[Stage]:
    """The ZeRO stages that a recipe may take, lowest first."""
    engine = recipe.engine
    if engine.zero_stage != "auto":
        return [engine.zero_stage]
    least: int = 3 if engine.offload_parameters != "none" else 0
    if engine.offload_optimizer != "none" or engine.precision == "bf16":
        least = max(least, 1)
    most = 2 if recipe.model.quantization is not None else 3
    known: tuple[Stage, ...] = (0, 1, 2, 3)
    return [stage for stage in known if least <= stage <= most]


def best(architecture: Architecture, recipe: Recipe, share: int, memory: int) -> Settled:
    """The layout for workers of ``memory`` bytes whose shares of a step have up to ``share`` tokens.

    Where none fits, the one that needs least.
    """
    workers, found = recipe.cluster.num_workers, []
    for stage in stages(recipe):
        for tokens in _sizes(recipe, share):
            accumulates = tokens < share
            needed = memory_of(architecture, recipe, workers, stage, min(tokens, share), accumulates)
            found.append(Settled(stage, tokens, needed, needed.total <= (1 - MARGIN) * memory))
            if found[-1].fits:
                return found[-1]
    return min(found, key=lambda one: one.memory.total)


def _sizes(recipe: Recipe, share: int) -> Iterator[int]:
    """Tokens of a micro-batch that are tried: the whole share and its fractions, down to the longest example."""
    if recipe.batch.tokens_per_microbatch != "auto":
        yield recipe.batch.tokens_per_microbatch
        return
    least, tokens = recipe.batch.max_length, max(share, recipe.batch.max_length)
    while tokens > least:
        yield tokens
        tokens //= 2
    yield least


def settle(architecture: Architecture, recipe: Recipe, share: int, memory: int) -> Recipe:
    """The recipe with a ZeRO stage and a size of micro-batches; what it says already is kept.

    Raises UserError where nothing fits, with what would.
    """
    chosen = best(architecture, recipe, share, memory)
    if not chosen.fits:
        raise UserError(too_large(architecture, recipe, share, memory, chosen))
    engine = recipe.engine.model_copy(update={"zero_stage": chosen.stage})
    batch = recipe.batch.model_copy(update={"tokens_per_microbatch": chosen.tokens})
    return recipe.model_copy(update={"engine": engine, "batch": batch})


def too_large(architecture: Architecture, recipe: Recipe, share: int, memory: int, chosen: Settled) -> str:
    """That a worker needs more memory than it has, and what would do."""
    remedies = [
        f"{words} ({found.memory.total / 2**30:.1f} GiB)"
        for words, other in remedies_of(recipe)
        if (
            found := best(architecture, other, share * recipe.cluster.num_workers // other.cluster.num_workers, memory)
        ).fits
    ]
    advice = f"these would fit: {', '.join(remedies)}" if remedies else "neither more workers nor offload would do"
    return (
        f"memory: a worker needs {chosen.memory.total / 2**30:.1f} GiB at least, at ZeRO stage {chosen.stage} with micro-batches of "
        f"{chosen.tokens} tokens, and {(1 - MARGIN) * memory / 2**30:.1f} of its {memory / 2**30:.1f} GiB may be used; {advice}"
    )


def remedies_of(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Changes that need less memory, as the recipe would say them, and the recipe with each."""
    engine, workers = recipe.engine, recipe.cluster.num_workers
    free = engine.model_copy(update={"zero_stage": "auto"})
    small = recipe.batch.model_copy(update={"tokens_per_microbatch": "auto"})
    if engine.zero_stage != "auto":
        yield "engine.zero_stage=auto", recipe.model_copy(update={"engine": free})
    if recipe.batch.tokens_per_microbatch != "auto":
        yield "batch.tokens_per_microbatch=auto", recipe.model_copy(update={"batch": small})
    if not engine.activation_checkpointing:
        checkpointed = engine.model_copy(update={"activation_checkpointing": True})
        yield "engine.activation_checkpointing=true", recipe.model_copy(update={"engine": checkpointed})
    if engine.offload_optimizer == "none" and recipe.cluster.use_gpu and engine.zero_stage != 0:
        offloaded = engine.model_copy(update={"offload_optimizer": "cpu"})
        yield "engine.offload_optimizer=cpu", recipe.model_copy(update={"engine": offloaded})
    for factor in (2, 4, 8):
        more = recipe.cluster.model_copy(update={"num_workers": factor * workers})
        yield f"cluster.num_workers={factor * workers}", recipe.model_copy(update={"cluster": more})
