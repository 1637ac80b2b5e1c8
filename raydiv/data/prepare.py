"""Prepare: a source's examples -> checked pairs -> tokens by Ray Data -> cached Parquet."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raydiv.cache import atomic, cache_dir, digest
from raydiv.config import Recipe
from raydiv.data.sources import Example, read_examples
from raydiv.data.tokens import TokenizedExamples
from raydiv.errors import UserError
from raydiv.model.chat import Chat
from raydiv.pool import Progress, map_rows


@dataclass(frozen=True, slots=True)
class Counts:
    """What was found and what was cut, of one set."""

    examples: int
    aligned: int
    unaligned: int
    pairs: int
    harmful: int
    harmless: int
    unlabelled: int
    tokens: int
    prompts_cut: int
    responses_cut: int


@dataclass(frozen=True, slots=True)
class PreparedSet:
    examples: TokenizedExamples
    counts: Counts


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenised training and held-out examples (None without ``data.eval``)."""

    train: PreparedSet
    eval: PreparedSet | None


def prepare_data(recipe: Recipe, directory: Path, progress: Progress = lambda done: None) -> PreparedData:
    """Tokenise the recipe's data for the model in ``directory``; a second call finds it in the cache.

    Raises UserError for bad data, a single class, pairs that are none, or paired losses without pairs.
    """
    train, held_out = split_examples(recipe)
    chat = Chat(directory, recipe.data.template)
    prepared = _tokenized(recipe, directory, chat, train, progress)
    _require(recipe, prepared, recipe.data.train)
    if not held_out:
        return PreparedData(prepared, None)
    return PreparedData(prepared, _tokenized(recipe, directory, chat, held_out, progress))


def split_examples(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. A share is split by prompt: no prompt is in both, whatever its examples."""
    train = read_examples(recipe.data.train)
    if recipe.data.eval is None:
        return train, []
    if isinstance(recipe.data.eval, str):
        return train, read_examples(recipe.data.eval)
    order = sorted({digest(recipe.seed, example.prompt) for example in train})
    held_out = set(order[: round(recipe.data.eval * len(order))])
    if not held_out or len(held_out) == len(order):
        raise UserError(f"data.eval: {recipe.data.eval} of {len(order)} prompts leaves one side without a prompt")
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in train:
        parts[digest(recipe.seed, example.prompt) in held_out].append(example)
    return parts


def _require(recipe: Recipe, prepared: PreparedSet, source: str) -> None:
    """Refuse data that the loss cannot learn from."""
    counts = prepared.counts
    for name, count in (("aligned", counts.aligned), ("unaligned", counts.unaligned)):
        if count == 0 and recipe.loss.needs_reference:
            raise UserError(f"data.train: {source} has no {name} example; loss.type {recipe.loss.type} compares two classes")
    if recipe.loss.needs_pairs and 2 * counts.pairs < counts.examples:
        raise UserError(
            f"data.train: {counts.examples - 2 * counts.pairs} of {counts.examples} examples of {source} have no partner, "
            f"and loss.type {recipe.loss.type} takes pairs (losses for unpaired data: bco, kldo, kto)"
        )


def _tokenized(
    recipe: Recipe, directory: Path, chat: Chat, examples: Sequence[Example], progress: Progress
) -> PreparedSet:
    lengths = {"max_prompt_length": recipe.batch.max_prompt_length, "max_length": recipe.batch.max_length}
    content = [(e.prompt, e.response, e.aligned, e.harmful, e.pair) for e in examples]
    folder = cache_dir("prepared") / digest(chat.fingerprint, lengths, content)
    if not folder.is_dir():
        pairs = _pair_numbers(examples)
        rows = [{"prompt": example.prompt, "response": example.response} for example in examples]
        arguments = {"directory": str(directory), "template": recipe.data.template, **lengths}
        done = map_rows(
            rows, Tokenizer, arguments, cluster=recipe.cluster, batch_rows=1000, progress=progress, model=False
        )
        ids = [(row["prompt"], row["response"]) for row in done]
        tokens = TokenizedExamples.from_ids(ids, [example.aligned for example in examples], pairs)
        with atomic(folder) as temporary:
            temporary.mkdir()
            tokens.write(temporary / "tokens.parquet")
            (temporary / "counts.json").write_text(json.dumps(asdict(_count(examples, tokens, done))))
    counts = Counts(**json.loads((folder / "counts.json").read_text()))
    return PreparedSet(TokenizedExamples.read(folder / "tokens.parquet"), counts)


def _pair_numbers(examples: Sequence[Example]) -> list[int]:
    """The pair of each example as a number, -1 without.

    Raises UserError for a pair that is not one aligned and one unaligned example of one prompt.
    """
    members: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.pair is not None:
            members[example.pair].append(example)
    for name, both in members.items():
        labels = Counter(example.aligned for example in both)
        if max(labels.values()) > 1:
            raise UserError(f"{both[0].source}: pair {name} has {labels[True]} aligned and {labels[False]} unaligned examples")
        if any(example.prompt != both[0].prompt for example in both):
            raise UserError(f"{both[-1].source}: pair {name} has two prompts; a pair is two responses to one")
    numbers = {name: number for number, name in enumerate(members)}
    return [-1 if example.pair is None else numbers[example.pair] for example in examples]


def _count(examples: Sequence[Example], tokens: TokenizedExamples, rows: Sequence[dict[str, Any]]) -> Counts:
    labels = Counter(example.harmful for example in examples)
    aligned = int(tokens.aligned.sum())
    return Counts(
        examples=len(tokens),
        aligned=aligned,
        unaligned=len(tokens) - aligned,
        pairs=len(tokens.pairs),
        harmful=labels[True],
        harmless=labels[False],
        unlabelled=labels[None],
        tokens=sum(tokens.lengths),
        prompts_cut=sum(row["prompt_cut"] > 0 for row in rows),
        responses_cut=sum(row["response_cut"] > 0 for row in rows),
    )


class Tokenizer:
    """Turns rows of text into rows of token ids."""

    def __init__(self, directory: str, template: str | None, max_prompt_length: int, max_length: int) -> None:
        self._chat = Chat(Path(directory), template)
        self._lengths = (max_prompt_length, max_length)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [asdict(self._chat.example(row["prompt"], row["response"], *self._lengths)) for row in rows]
