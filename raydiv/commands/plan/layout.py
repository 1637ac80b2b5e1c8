"""Which ZeRO stage, and how large a micro-batch: decided by the model of memory, or checked where the recipe decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from raydiv.commands.plan.architecture import Architecture, architecture_of
from raydiv.commands.plan.memory import Memory, Stage, memory_of
from raydiv.config import Recipe, load_recipe
from raydiv.data.batching import BatchLayout, BatchPlan
from raydiv.utils.errors import UserError

MARGIN = 0.1
"""Of a worker's memory, what is left free: for what the prediction misses (see tests/distributed/test_plan.py),
and on a GPU for its context, NCCL's buffers and the gaps between an allocator's blocks."""

LOOKED_AT = 1000
"""Steps whose largest share is taken for the run's. A later step that is larger takes one micro-batch more."""

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class WorkerBudget:
    """Tokens of the longest example, and of the largest part of a step that a worker gets: packed, and padded."""

    longest: int
    packed: int
    padded: int

    def tokens(self, architecture: Architecture) -> int:
        return self.padded if architecture.packing == "none" else self.packed

    def among(self, workers: int, more: int) -> WorkerBudget:
        """The share of one of ``more`` workers, in place of ``workers``."""
        packed, padded = (-(-tokens * workers // more) for tokens in (self.packed, self.padded))
        return replace(self, packed=max(self.longest, packed), padded=max(self.longest, padded))

    def cut(self, length: int) -> WorkerBudget:
        """With examples of at most ``length`` tokens."""
        part = min(1.0, length / self.longest)
        return WorkerBudget(min(self.longest, length), round(part * self.packed), round(part * self.padded))


def largest_budget(plan: BatchPlan, steps: int, lengths: np.ndarray, workers: int) -> WorkerBudget:
    """The largest share of the run's steps; ``lengths`` [n] are tokens of each example of the set."""
    looked = [lengths[plan.step(step).rows].tolist() for step in range(min(steps, LOOKED_AT))]
    whole = int(lengths.max()) * max(map(len, looked))

    def largest(packed: bool) -> int:
        layout = BatchLayout(whole, workers, "batch", packed)
        return max(layout.largest(layout.scoring(own), own) for own in looked)

    return WorkerBudget(int(lengths.max()), largest(packed=True), largest(packed=False))


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout, the memory that it takes of a worker, and whether that is there.

    ``least``: bytes that the stage needs with the smallest micro-batch that the recipe allows.
    """

    stage: Stage
    tokens: int
    memory: Memory
    fits: bool
    least: int


def settle(architecture: Architecture, recipe: Recipe, share: WorkerBudget, memory: int) -> Fit:
    """The lowest ZeRO stage that fits into ``memory`` bytes a worker, with micro-batches as large as fit.

    A lower stage sends less, and a micro-batch that is a worker's whole share makes any objective one pass. What the recipe
    fixes is kept, and checked. Raises UserError where nothing fits, with what would.
    """
    found = best(architecture, recipe, share, memory)
    if not found.fits:
        raise UserError(_too_large(recipe, share, memory, found))
    return found


def with_layout(recipe: Recipe, found: Fit) -> Recipe:
    """The recipe that says the layout."""
    engine = recipe.engine.model_copy(update={"zero_stage": found.stage})
    batch = recipe.batch.model_copy(update={"tokens_per_microbatch": found.tokens})
    return recipe.model_copy(update={"engine": engine, "batch": batch})


def best(architecture: Architecture, recipe: Recipe, share: WorkerBudget, memory: int) -> Fit:
    """The layout that is taken."""
    return taken_of(list(layouts(architecture, recipe, share, memory)))


def taken_of(found: Sequence[Fit]) -> Fit:
    """Of layouts by stage: the lowest that fits, else the one that needs least."""
    return next((one for one in found if one.fits), min(found, key=lambda one: one.least))


def layouts(architecture: Architecture, recipe: Recipe, share: WorkerBudget, memory: int) -> Iterator[Fit]:
    """The layout at each stage that the recipe allows, by stage."""
    wanted = recipe.engine.zero_stage
    for stage in STAGES if wanted == "auto" else (wanted,):
        at_stage = changed(recipe, f"engine.zero_stage={stage}")
        if at_stage is not None:
            yield _at_stage(architecture, at_stage, stage, share, memory)


def _at_stage(architecture: Architecture, recipe: Recipe, stage: Stage, share: WorkerBudget, memory: int) -> Fit:
    """The largest micro-batch that fits, up to the share, and no smaller than the longest example."""
    whole, workers = max(share.longest, share.tokens(architecture)), recipe.cluster.least_workers

    def needed(tokens: int) -> Memory:
        return memory_of(architecture, recipe, workers, stage, tokens, accumulates=tokens < whole)

    def fit(tokens: int) -> Fit:
        found = needed(tokens)
        return Fit(stage, tokens, found, found.total <= (1 - MARGIN) * memory, least)

    wanted = recipe.batch.tokens_per_microbatch
    least = needed(min(max(share.longest, 0 if wanted == "auto" else wanted), whole)).total
    if wanted != "auto":
        return replace(fit(min(max(wanted, share.longest), whole)), tokens=wanted)
    if fit(whole).fits:
        return fit(whole)
    low, high = share.longest, whole - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle).fits else (low, middle - 1)
    return fit(low)


def changed(recipe: Recipe, *overrides: str) -> Recipe | None:
    """The recipe with overrides, as on the command line; None where it does not allow them."""
    try:
        return load_recipe(recipe.model_dump(mode="json", by_alias=True), overrides)
    except UserError:
        return None


def _too_large(recipe: Recipe, share: WorkerBudget, memory: int, found: Fit) -> str:
    """What to say where nothing fits: how much the layout that needs least does need, and what would do."""
    does = what_fits(recipe, share, memory)
    advice = f"these would fit: {', or '.join(does)}" if does else "no change that raydiv knows would fit"
    return (
        f"memory: a worker needs {_gib(found.least)} at ZeRO stage {found.stage} with micro-batches of {found.tokens} "
        f"tokens, and {_gib((1 - MARGIN) * memory)} of its {_gib(memory)} may be used (cluster.worker_memory_gb, where that is "
        f"not what it has); {advice}"
    )


CHANGES = (
    "engine.zero_stage=auto",
    "batch.tokens_per_microbatch=auto",
    "engine.activation_checkpointing=true",
    "engine.precision=bf16",
    "engine.offload_optimizer=cpu",
    "engine.offload_parameters=cpu",
    "model.lora.r=16",
    "model.quantization=nf4",
)
"""Changes that may save memory, in the order in which they are proposed."""

MOST_WORKERS = 64


def what_fits(recipe: Recipe, share: WorkerBudget, memory: int) -> list[str]:
    """Changes of the recipe that make it fit, each with what a worker then needs: single ones, else pairs."""
    singles = [_told(recipe, share, memory, (change,)) for change in CHANGES]
    singles += [_shorter(recipe, share, memory), _more_workers(recipe, share, memory)]
    pairs = (_told(recipe, share, memory, pair) for pair in combinations(CHANGES, 2))
    return [told for told in singles if told] or [told for told in pairs if told][:3]


def _told(recipe: Recipe, share: WorkerBudget, memory: int, overrides: Sequence[str]) -> str | None:
    """The changes and what a worker then needs, where they fit and change anything."""
    other = changed(recipe, *overrides)
    if other is None or other == recipe:
        return None
    found = best(architecture_of(other), other, share, memory)
    return f"{' '.join(overrides)} ({_gib(found.least)})" if found.fits else None


def _shorter(recipe: Recipe, share: WorkerBudget, memory: int) -> str | None:
    """The longest examples, of halves and quarters of what is allowed, that fit."""
    for part in (2, 4, 8):
        length, prompt = recipe.batch.max_length // part, recipe.batch.max_prompt_length // part
        overrides = (f"batch.max_length={length}", f"batch.max_prompt_length={prompt}")
        told = _told(recipe, share.cut(length), memory, overrides) if prompt else None
        if told:
            return told
    return None


def _more_workers(recipe: Recipe, share: WorkerBudget, memory: int) -> str | None:
    """The smallest number of workers, doubling, at which it fits."""
    workers = recipe.cluster.least_workers
    key, more = "num_workers" if recipe.cluster.min_workers is None else "min_workers", 2 * workers
    while more <= MOST_WORKERS:
        told = _told(recipe, share.among(workers, more), memory, (f"cluster.{key}={more}",))
        if told:
            return told
        more *= 2
    return None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
