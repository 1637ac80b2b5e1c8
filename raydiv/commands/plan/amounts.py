"""The size of a recipe's data: examples, tokens, steps, and the largest part of a step that one worker gets.

The sizes are counted if the data are prepared already. They are sampled through the same code if the sources and the
tokenizer are local files. Otherwise every example is assumed to have ``batch.max_length`` tokens. Nothing is started,
downloaded or written.
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
from raydiv.data.fields import BadRow
from raydiv.data.formats import Example
from raydiv.data.index import OpenSource, read_index, rendered_error
from raydiv.data.prompt_sets import prompt_sets, read_prompts
from raydiv.data.readers import file_chunks, line_numbers, parse_record, read_chunk, record_reader
from raydiv.data.sources import File, files_of
from raydiv.data.splits import make_splits
from raydiv.model.chat import Chat
from raydiv.training.schedule import epoch_plan, total_steps
from raydiv.utils.errors import UserError

SAMPLE_RECORDS = 2000
"""Number of records that are tokenized, evenly spaced over all sources."""


@dataclass(frozen=True, slots=True)
class DataAmounts:
    """Examples and tokens (prompts included) of an epoch, optimizer updates of the run, and the budget of one worker.

    ``basis`` says how the tokens were determined. ``assumed``: every example has ``batch.max_length`` tokens. Unknown
    numbers are None. ``unavailable`` lists the sources that are not local files.
    """

    basis: Literal["counted", "sampled", "assumed"]
    examples: int | None
    tokens: int | None
    steps: int | None
    budget: WorkerBudget
    unavailable: list[str] = field(default_factory=list)

    def tokens_of_run(self, recipe: Recipe) -> int | None:
        """Tokens of all steps, prompts included; None if unknown."""
        if self.tokens is None or self.examples is None or self.steps is None:
            return None
        if recipe.optim.epochs is not None:
            return round(self.tokens * recipe.optim.epochs)
        return round(self.tokens / self.examples * min(recipe.batch.examples, self.examples) * self.steps)


def measure_data(recipe: Recipe, chat: Chat | None) -> DataAmounts:
    """Sizes of the recipe's data. Raises UserError for data that training would refuse."""
    sources = [*recipe.data.train, *recipe.data.eval_sources]
    unavailable = [source.path for source in sources if not _is_local(source.path)]
    for prompts, both_labels in prompt_sets(recipe):
        missing = [source.path for source in prompts if not _is_local(source.path)]
        unavailable += missing
        if not missing:
            read_prompts(prompts, both=both_labels)
    if any(source.path in unavailable for source in recipe.data.train):
        return _from_limits(recipe, None, unavailable)
    if chat is not None and not any(source.path in unavailable for source in sources):
        opened = [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources]
        if all(source.ready for source in opened):
            return _from_indices(recipe, opened, unavailable)
    sample = _Sample.draw(recipe)
    return (
        _from_limits(recipe, sample, unavailable) if chat is None else _from_sample(recipe, sample, chat, unavailable)
    )


def _is_local(path: str) -> bool:
    """Whether a source can be read without the network."""
    if path.startswith("bundled:"):
        return True
    return "://" not in path and bool(glob.glob(str(Path(path).expanduser())))


def _from_indices(recipe: Recipe, opened: Sequence[OpenSource], unavailable: list[str]) -> DataAmounts:
    """Sizes from the indices of prepared sources."""
    indices = [read_index(source) for source in opened]
    train = len(recipe.data.train)
    examples = make_splits(recipe, indices[:train], indices[train:]).train.examples
    epochs = epoch_plan(recipe, examples)
    steps = total_steps(recipe, epochs.steps_in)
    budget = largest_budget(epochs, steps, examples.lengths, recipe.cluster.least_workers)
    weights = np.array([source.weight for source in recipe.data.train])[examples.source]
    tokens = round(float((weights * examples.lengths).sum()))
    return DataAmounts("counted", round(float(weights.sum())), tokens, steps, budget, unavailable)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Examples of evenly spaced records. ``records[s][r]`` holds record r of source s; ``stride`` is the spacing."""

    records: list[list[list[Example]]]
    stride: int

    @classmethod
    def draw(cls, recipe: Recipe) -> _Sample:
        sources = [_records(source) for source in recipe.data.train]
        counts = [sum(1 for _ in source) for source in sources]
        stride = max(1, sum(counts) // SAMPLE_RECORDS)
        records = [list(_examples(source, recipe, stride)) for source in recipe.data.train]
        for source, sampled in zip(recipe.data.train, records, strict=True):
            if not sampled:
                raise UserError(f"{source.path}: holds no examples")
        return cls(records, stride)

    @property
    def has_pairs(self) -> bool:
        return any(len(record) == 2 and record[0].pair is not None for source in self.records for record in source)

    def epoch_plan(self, recipe: Recipe) -> EpochPlan:
        """The epoch plan of the sample, as if it were the training set. Its rows are the examples, source by source."""
        records = [record for source in self.records for record in source]
        source_numbers = np.repeat(np.arange(len(self.records)), [len(source) for source in self.records])
        starts = np.cumsum([0, *map(len, records)])
        units: list[tuple[int, int]] = []
        unit_sources: list[int] = []
        for start, record, source in zip(starts.tolist(), records, source_numbers.tolist(), strict=False):
            paired = len(record) == 2 and record[0].pair is not None
            record_units = [(start, start + 1)] if paired else [(start + row, -1) for row in range(len(record))]
            units += record_units
            unit_sources += [source] * len(record_units)
        weights = [source.weight for source in recipe.data.train]
        return EpochPlan(np.array(units), recipe.batch.examples, recipe.seed, "sample", np.array(unit_sources), weights)

    def epoch_sum(self, recipe: Recipe, values: Sequence[Sequence[float]]) -> float:
        """The sum over an epoch's training examples, extrapolated from the sample's ``values`` [source][example]."""
        train_fraction = 1 - recipe.data.eval if isinstance(recipe.data.eval, float) else 1.0
        sources = zip(recipe.data.train, values, strict=True)
        return train_fraction * self.stride * sum(source.weight * sum(numbers) for source, numbers in sources)


def _records(source: Source) -> Iterator[tuple[File, tuple[int, Any]]]:
    """(file, raw record) pairs of a source, in order."""
    for file in files_of(source):
        for piece in file_chunks(file):
            yield from ((file, raw) for raw in read_chunk(piece))


def _examples(source: Source, recipe: Recipe, stride: int) -> Iterator[list[Example]]:
    """Examples of one record in ``stride``. Raises UserError for a bad row unless ``data.on_bad_row`` leaves it out."""
    reader = record_reader(source, recipe.data)
    for file, (position, raw) in itertools.islice(_records(source), 0, None, stride):
        try:
            yield reader.examples(parse_record(raw), f"{file.name}@{position}")
        except BadRow as error:
            if recipe.data.on_bad_row == "error":
                raise UserError(f"{file.name}:{line_numbers(file, [position])[position]}: {error}") from None


def _from_sample(recipe: Recipe, sample: _Sample, chat: Chat, unavailable: list[str]) -> DataAmounts:
    """Sizes from the tokenized sample."""
    batch = recipe.batch
    lengths = []
    for source, records in zip(recipe.data.train, sample.records, strict=True):
        examples = [example for record in records for example in record]
        rendered = sum(chat.is_rendered(example.prompt) for example in examples) if chat.template.renders else 0
        if message := rendered_error(source.path, rendered, len(examples)):
            raise UserError(message)
        try:
            tokens = chat.tokenize(
                [example.prompt for example in examples],
                [example.response for example in examples],
                batch.max_prompt_length,
                batch.max_length,
                trained=True,
            )
        except ValueError as error:
            raise UserError(f"data.template: {error}") from None
        lengths.append([len(example.prompt) + len(example.response) for example in tokens])
    return _extrapolate(recipe, sample, lengths, "sampled", unavailable)


def _from_limits(recipe: Recipe, sample: _Sample | None, unavailable: list[str]) -> DataAmounts:
    """Sizes if every example has ``batch.max_length`` tokens; their number is known if the sources could be read."""
    longest = recipe.batch.max_length
    if sample is not None:
        lengths = [[longest for record in source for _ in record] for source in sample.records]
        return _extrapolate(recipe, sample, lengths, "assumed", unavailable)
    tokens = -(-recipe.batch.examples // recipe.cluster.least_workers) * longest
    return DataAmounts("assumed", None, None, recipe.optim.steps, WorkerBudget(longest, tokens, tokens), unavailable)


def _extrapolate(
    recipe: Recipe,
    sample: _Sample,
    lengths: list[list[int]],
    basis: Literal["sampled", "assumed"],
    unavailable: list[str],
) -> DataAmounts:
    """Sizes of all records from the sample's ``lengths`` [source][example]."""
    examples = sample.epoch_sum(recipe, [[1.0] * len(source) for source in lengths])
    units = examples / 2 if sample.has_pairs else examples
    size = max(1, recipe.batch.examples // (2 if sample.has_pairs else 1))
    steps = total_steps(recipe, lambda epochs: max(1, round(epochs * -(-round(units) // size))))
    flat = np.array([length for source in lengths for length in source])
    budget = largest_budget(sample.epoch_plan(recipe), steps, flat, recipe.cluster.least_workers)
    tokens = sample.epoch_sum(recipe, [[float(length) for length in source] for source in lengths])
    return DataAmounts(basis, round(examples), round(tokens), steps, budget, unavailable)
