"""The layout: ZeRO stage and micro-batch size, chosen or checked by the memory model."""

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
from raydiv.utils.units import size_text

MARGIN = 0.1
"""Fraction of a worker's memory that stays free. It covers the error of the forecast (tests/distributed/test_plan.py)
and, on a GPU, the CUDA context, NCCL's buffers and the allocator's fragmentation."""

EXAMINED_STEPS = 1000
"""Number of steps that are searched for the largest budget. A larger step after them takes one more micro-batch."""

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class WorkerBudget:
    """Tokens of the longest example, and of the largest part of a step that one worker gets, packed and padded."""

    longest: int
    packed: int
    padded: int

    def tokens(self, architecture: Architecture) -> int:
        return self.padded if architecture.packing == "none" else self.packed

    def with_workers(self, workers: int, new_workers: int) -> WorkerBudget:
        """The budget of a worker if there are ``new_workers`` instead of ``workers``."""
        packed, padded = (-(-tokens * workers // new_workers) for tokens in (self.packed, self.padded))
        return replace(self, packed=max(self.longest, packed), padded=max(self.longest, padded))

    def truncated(self, length: int) -> WorkerBudget:
        """The budget if examples are truncated to ``length`` tokens."""
        part = min(1.0, length / self.longest)
        return WorkerBudget(min(self.longest, length), round(part * self.packed), round(part * self.padded))


def largest_budget(plan: BatchPlan, steps: int, lengths: np.ndarray, workers: int) -> WorkerBudget:
    """The largest budget over the run's steps. ``lengths`` [n] are the tokens of each example of the set."""
    step_lengths = [lengths[plan.step(step).rows].tolist() for step in range(min(steps, EXAMINED_STEPS))]
    whole = int(lengths.max()) * max(map(len, step_lengths))

    def largest(packed: bool) -> int:
        layout = BatchLayout(whole, workers, "batch", packed)
        return max(layout.largest(layout.scoring(step), step) for step in step_lengths)

    return WorkerBudget(int(lengths.max()), largest(packed=True), largest(packed=False))


@dataclass(frozen=True, slots=True)
class LayoutFit:
    """A layout, the memory that a worker needs for it, and whether the worker has that memory.

    ``least_bytes`` is what the stage needs with the smallest micro-batch that the recipe allows.
    """

    stage: Stage
    tokens: int
    memory: Memory
    fits: bool
    least_bytes: int


def choose_layout(architecture: Architecture, recipe: Recipe, budget: WorkerBudget, memory: int) -> LayoutFit:
    """The lowest ZeRO stage that fits into ``memory`` bytes per worker, with the largest micro-batch that fits.

    A lower stage communicates less, and one micro-batch per worker makes every objective one pass. Values that the
    recipe fixes are checked and not changed. Raises UserError if nothing fits; the message lists changes that would
    fit.
    """
    fit = best_layout(architecture, recipe, budget, memory)
    if not fit.fits:
        raise UserError(_too_large_message(recipe, budget, memory, fit))
    return fit


def with_layout(recipe: Recipe, fit: LayoutFit) -> Recipe:
    """The recipe with the layout's stage and micro-batch size filled in."""
    engine = recipe.engine.model_copy(update={"zero_stage": fit.stage})
    batch = recipe.batch.model_copy(update={"tokens_per_microbatch": fit.tokens})
    return recipe.model_copy(update={"engine": engine, "batch": batch})


def best_layout(architecture: Architecture, recipe: Recipe, budget: WorkerBudget, memory: int) -> LayoutFit:
    """The layout that is chosen, whether it fits or not."""
    return lowest_fitting(recipe, list(stage_layouts(architecture, recipe, budget, memory)))


def lowest_fitting(recipe: Recipe, fits: Sequence[LayoutFit]) -> LayoutFit:
    """The lowest stage that fits, else the layout that needs least. ``fits`` are ordered by stage.

    In bf16, ``auto`` does not take stage 1: DeepSpeed then sums the gradients of all weights in fp32 on every worker
    (see raydiv.commands.plan.memory). Stage 2 sends no more, and keeps a worker's part of them.
    """
    skipped = {1} if recipe.engine.precision == "bf16" and recipe.engine.zero_stage == "auto" else set()
    fitting = (fit for fit in fits if fit.fits and fit.stage not in skipped)
    return next(fitting, min(fits, key=lambda fit: fit.least_bytes))


def stage_layouts(architecture: Architecture, recipe: Recipe, budget: WorkerBudget, memory: int) -> Iterator[LayoutFit]:
    """The best layout of each ZeRO stage that the recipe allows, by stage."""
    requested = recipe.engine.zero_stage
    for stage in STAGES if requested == "auto" else (requested,):
        at_stage = with_overrides(recipe, f"engine.zero_stage={stage}")
        if at_stage is not None:
            yield _fit_at_stage(architecture, at_stage, stage, budget, memory)


def _fit_at_stage(
    architecture: Architecture, recipe: Recipe, stage: Stage, budget: WorkerBudget, memory: int
) -> LayoutFit:
    """The largest micro-batch that fits: at most the whole budget, at least the longest example."""
    whole, workers = max(budget.longest, budget.tokens(architecture)), recipe.cluster.least_workers

    def needed(tokens: int) -> Memory:
        return memory_of(architecture, recipe, workers, stage, tokens, accumulates=tokens < whole)

    def fit(tokens: int) -> LayoutFit:
        required = needed(tokens)
        return LayoutFit(stage, tokens, required, required.total <= (1 - MARGIN) * memory, least)

    wanted = recipe.batch.tokens_per_microbatch
    least = needed(min(max(budget.longest, 0 if wanted == "auto" else wanted), whole)).total
    if wanted != "auto":
        return replace(fit(min(max(wanted, budget.longest), whole)), tokens=wanted)
    if fit(whole).fits:
        return fit(whole)
    low, high = budget.longest, whole - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle).fits else (low, middle - 1)
    return fit(low)


def with_overrides(recipe: Recipe, *overrides: str) -> Recipe | None:
    """The recipe with overrides, as on the command line; None where it does not allow them."""
    try:
        return load_recipe(recipe.model_dump(mode="json", by_alias=True), overrides)
    except UserError:
        return None


def _too_large_message(recipe: Recipe, budget: WorkerBudget, memory: int, fit: LayoutFit) -> str:
    """The message if nothing fits: what the smallest layout needs, and which changes would fit."""
    remedies = fitting_changes(recipe, budget, memory)
    advice = f"changes that fit: {', or '.join(remedies)}" if remedies else "no change that raydiv tries would fit"
    return (
        f"memory: a worker needs {size_text(fit.least_bytes)} at ZeRO stage {fit.stage} with micro-batches of "
        f"{fit.tokens} tokens, and {size_text((1 - MARGIN) * memory)} of its {size_text(memory)} may be used (set "
        f"cluster.worker_memory_gb if the worker has another amount); {advice}"
    )


REMEDIES = (
    "engine.zero_stage=auto",
    "batch.tokens_per_microbatch=auto",
    "engine.activation_checkpointing=true",
    "engine.precision=bf16",
    "engine.offload_optimizer=cpu",
    "engine.offload_parameters=cpu",
    "model.lora.r=16",
    "model.quantization=nf4",
)
"""Overrides that may save memory, in the order in which they are proposed."""

MOST_WORKERS = 64


def fitting_changes(recipe: Recipe, budget: WorkerBudget, memory: int) -> list[str]:
    """Changes of the recipe that fit, each with the memory that a worker then needs; pairs only if no single change
    fits.
    """
    singles = [_describe_if_fits(recipe, budget, memory, (change,)) for change in REMEDIES]
    singles += [_shorter_examples(recipe, budget, memory), _more_workers(recipe, budget, memory)]
    pairs = (_describe_if_fits(recipe, budget, memory, pair) for pair in combinations(REMEDIES, 2))
    return [change for change in singles if change] or [pair for pair in pairs if pair][:3]


def _describe_if_fits(recipe: Recipe, budget: WorkerBudget, memory: int, overrides: Sequence[str]) -> str | None:
    """The overrides and the memory that a worker then needs; None if they do not fit or change nothing."""
    changed = with_overrides(recipe, *overrides)
    if changed is None or changed == recipe:
        return None
    fit = best_layout(architecture_of(changed), changed, budget, memory)
    return f"{' '.join(overrides)} ({size_text(fit.least_bytes)})" if fit.fits else None


def _shorter_examples(recipe: Recipe, budget: WorkerBudget, memory: int) -> str | None:
    """The largest of a half, a quarter and an eighth of ``batch.max_length`` that fits."""
    for part in (2, 4, 8):
        length, prompt = recipe.batch.max_length // part, recipe.batch.max_prompt_length // part
        overrides = (f"batch.max_length={length}", f"batch.max_prompt_length={prompt}")
        description = _describe_if_fits(recipe, budget.truncated(length), memory, overrides) if prompt else None
        if description:
            return description
    return None


def _more_workers(recipe: Recipe, budget: WorkerBudget, memory: int) -> str | None:
    """The smallest number of workers, doubling, that fits."""
    workers = recipe.cluster.least_workers
    key, increased = "num_workers" if recipe.cluster.min_workers is None else "min_workers", 2 * workers
    while increased <= MOST_WORKERS:
        description = _describe_if_fits(
            recipe, budget.with_workers(workers, increased), memory, (f"cluster.{key}={increased}",)
        )
        if description:
            return description
        increased *= 2
    return None
