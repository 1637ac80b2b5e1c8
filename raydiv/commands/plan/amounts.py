"""How much a recipe trains on: examples, tokens, steps, and what a worker gets of a step; counted, sampled, or assumed.

Counted where ``raydiv prepare`` has been here; sampled through the same code where sources and tokenizer are at hand; else
every example is taken to be as long as it may be. Nothing is started, downloaded or written.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydiv.commands.plan.layout import WorkerBudget, largest_budget
from raydiv.config import Recipe
from raydiv.config.source import Source
from raydiv.data.batching import EpochPlan
from raydiv.data.formats import BadRow, Example
from raydiv.data.index import OpenSource, read_index
from raydiv.data.prompt_sets import prompt_sets, read_prompts
from raydiv.data.sources import File, file_chunks, files_of, locate, parse, read, reading_of
from raydiv.data.splits import make_splits
from raydiv.model.chat import Chat
from raydiv.training.order import epochs_of, total_steps
from raydiv.utils.errors import UserError

SAMPLED = 2000
"""Records that are tokenised, evenly spaced over all sources."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """Examples and tokens (prompts included) of an epoch, optimizer updates of the run, and a worker's share of one.

    ``how`` the tokens are known: counted, sampled, or assumed to be the most that ``batch.max_length`` allows. What is not
    known is None. ``unread`` sources were not at hand.
    """

    how: Literal["counted", "sampled", "assumed"]
    examples: int | None
    tokens: int | None
    steps: int | None
    share: WorkerBudget
    unread: list[str] = field(default_factory=list)

    def tokens_of_run(self, recipe: Recipe) -> int | None:
        """Tokens of all steps."""
        if self.tokens is None or self.examples is None or self.steps is None:
            return None
        if recipe.optim.epochs is not None:
            return round(self.tokens * recipe.optim.epochs)
        return round(self.tokens / self.examples * min(recipe.batch.examples, self.examples) * self.steps)


def amounts_of(recipe: Recipe, chat: Chat | None) -> Amounts:
    """Amounts of the recipe's data. Raises UserError for data that training would refuse."""
    sources = [*recipe.data.train, *recipe.data.eval_sources]
    unread = [source.path for source in sources if not _at_hand(source.path)]
    for prompts, both in prompt_sets(recipe):
        far = [source.path for source in prompts if not _at_hand(source.path)]
        unread += far
        if not far:
            read_prompts(prompts, both=both)
    if any(source.path in unread for source in recipe.data.train):
        return _assumed(recipe, None, unread)
    if chat is not None and not any(source.path in unread for source in sources):
        opened = [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources]
        if all(one.ready for one in opened):
            return _counted(recipe, opened, unread)
    sample = _Sample.of(recipe)
    return _assumed(recipe, sample, unread) if chat is None else _sampled(recipe, sample, chat, unread)


def _at_hand(place: str) -> bool:
    """Whether a source can be read without asking another machine."""
    if place.startswith("bundled:"):
        return True
    return "://" not in place and bool(glob.glob(str(Path(place).expanduser())))


def _counted(recipe: Recipe, opened: Sequence[OpenSource], unread: list[str]) -> Amounts:
    """From the indices of prepared sources."""
    indices = [read_index(one) for one in opened]
    train = len(recipe.data.train)
    examples = make_splits(recipe, indices[:train], indices[train:]).train.examples
    epochs = epochs_of(recipe, examples)
    steps = total_steps(recipe, epochs.steps_per_epoch)
    share = largest_budget(epochs, steps, examples.lengths, recipe.cluster.least_workers)
    weights = np.array([source.weight for source in recipe.data.train])[examples.source]
    tokens = round(float((weights * examples.lengths).sum()))
    return Amounts("counted", round(float(weights.sum())), tokens, steps, share, unread)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Examples of evenly spaced records: ``taken[s][r]`` of source s; ``every``: one in so many records is among them."""

    taken: list[list[list[Example]]]
    every: int

    @classmethod
    def of(cls, recipe: Recipe) -> _Sample:
        sources = [_records(source) for source in recipe.data.train]
        records = [sum(1 for _ in source) for source in sources]
        every = max(1, sum(records) // SAMPLED)
        taken = [list(_examples(source, recipe, every)) for source in recipe.data.train]
        for source, found in zip(recipe.data.train, taken, strict=True):
            if not found:
                raise UserError(f"{source.path}: holds no examples")
        return cls(taken, every)

    @property
    def pairs(self) -> bool:
        return any(len(record) == 2 and record[0].pair is not None for source in self.taken for record in source)

    def epochs(self, recipe: Recipe) -> EpochPlan:
        """The order of the sample as that of a training set: rows are its examples, source by source."""
        records = [record for source in self.taken for record in source]
        number = np.repeat(np.arange(len(self.taken)), [len(source) for source in self.taken])
        starts = np.cumsum([0, *map(len, records)])
        units: list[tuple[int, int]] = []
        of: list[int] = []
        for start, record, source in zip(starts.tolist(), records, number.tolist(), strict=False):
            paired = len(record) == 2 and record[0].pair is not None
            own = [(start, start + 1)] if paired else [(start + row, -1) for row in range(len(record))]
            units += own
            of += [source] * len(own)
        weights = [source.weight for source in recipe.data.train]
        return EpochPlan(np.array(units), recipe.batch.examples, recipe.seed, "sample", np.array(of), weights)

    def weighted(self, recipe: Recipe, of_example: Sequence[Sequence[float]]) -> float:
        """Sum over an epoch's training examples of what ``of_example`` [source][example of the sample] says of each."""
        kept = 1 - recipe.data.eval if isinstance(recipe.data.eval, float) else 1.0
        own = zip(recipe.data.train, of_example, strict=True)
        return kept * self.every * sum(source.weight * sum(values) for source, values in own)


def _records(source: Source) -> Iterator[tuple[File, tuple[int, Any]]]:
    """(file, raw record) of a source, in order."""
    for file in files_of(source):
        for piece in file_chunks(file):
            yield from ((file, raw) for raw in read(piece))


def _examples(source: Source, recipe: Recipe, every: int) -> Iterator[list[Example]]:
    """Examples of one in ``every`` records. Raises UserError for a bad row, where the recipe does not leave it out."""
    reading = reading_of(source, recipe.data.columns or {})
    for file, (position, raw) in itertools.islice(_records(source), 0, None, every):
        try:
            yield reading.examples(parse(raw), f"{file.name}@{position}")
        except BadRow as error:
            if recipe.data.on_bad_row == "error":
                raise UserError(f"{file.name}:{locate(file, [position])[position]}: {error}") from None


def _sampled(recipe: Recipe, sample: _Sample, chat: Chat, unread: list[str]) -> Amounts:
    """From the sample's tokens."""
    batch = recipe.batch
    lengths = []
    for source in sample.taken:
        examples = [example for record in source for example in record]
        try:
            tokens = chat.examples(
                [e.prompt for e in examples], [e.response for e in examples], batch.max_prompt_length, batch.max_length
            )
        except ValueError as error:
            raise UserError(f"data.template: {error}") from None
        lengths.append([len(one.prompt) + len(one.response) for one in tokens])
    return _extrapolated(recipe, sample, lengths, "sampled", unread)


def _assumed(recipe: Recipe, sample: _Sample | None, unread: list[str]) -> Amounts:
    """With examples as long as they may be; how many there are, where their sources could be read."""
    longest = recipe.batch.max_length
    if sample is not None:
        lengths = [[longest for record in source for _ in record] for source in sample.taken]
        return _extrapolated(recipe, sample, lengths, "assumed", unread)
    most = -(-recipe.batch.examples // recipe.cluster.least_workers) * longest
    return Amounts("assumed", None, None, recipe.optim.steps, WorkerBudget(longest, most, most), unread)


def _extrapolated(
    recipe: Recipe,
    sample: _Sample,
    lengths: list[list[int]],
    how: Literal["sampled", "assumed"],
    unread: list[str],
) -> Amounts:
    """Amounts of all records from ``lengths`` [source][example] of the sample's."""
    examples = sample.weighted(recipe, [[1.0] * len(own) for own in lengths])
    units = examples / 2 if sample.pairs else examples
    size = max(1, recipe.batch.examples // (2 if sample.pairs else 1))
    steps = total_steps(recipe, max(1, -(-round(units) // size)))
    flat = np.array([length for own in lengths for length in own])
    share = largest_budget(sample.epochs(recipe), steps, flat, recipe.cluster.least_workers)
    tokens = sample.weighted(recipe, [[float(length) for length in own] for own in lengths])
    return Amounts(how, round(examples), round(tokens), steps, share, unread)
