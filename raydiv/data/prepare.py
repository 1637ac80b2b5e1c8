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
from raydiv.config.loss import Loss
from raydiv.data.sources import Example, read_examples
from raydiv.data.tokens import TokenizedExamples
from raydiv.errors import UserError
from raydiv.losses import named
from raydiv.model.chat import Chat
from raydiv.pool import Progress, map_rows, unwatched


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


class RawData:
    """The recipe's examples, read and checked but not tokenised: everything that can be wrong with them is found here.

    Raises UserError for bad data, a single class, pairs that are none, or paired losses without pairs.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self._recipe, self._directory = recipe, directory
        train, held_out = split_examples(recipe)
        for key, source, examples in (("train", recipe.data.train, train), ("eval", recipe.data.eval, held_out)):
            if examples:
                _require(recipe.loss, f"data.{key}: {source}", examples)
        chat = Chat(directory, recipe.data.template)
        self._sets = [_Set(recipe, chat, examples) for examples in (train, held_out) if examples]

    def tokenize(self, progress: Progress = unwatched) -> PreparedData:
        """Tokenise what the cache lacks, with Ray Data; needs a Ray session."""
        missing = [one for one in self._sets if not one.folder.is_dir()]
        _tokenize(missing, self._recipe, self._directory, progress)
        sets = [one.read() for one in self._sets]
        return PreparedData(sets[0], sets[1] if len(sets) > 1 else None)


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


_ALONE = named(lambda objective: not objective.unaligned and not objective.penalty)


def _require(loss: Loss, source: str, examples: Sequence[Example]) -> None:
    """Refuse data that the loss cannot learn from, or be evaluated on."""
    classes = Counter(example.aligned for example in examples)
    for aligned, name in ((True, "aligned"), (False, "unaligned")):
        needing = [loss.type] if aligned else loss.comparing_terms
        if not classes[aligned] and needing:
            fitting = "" if aligned else f" (losses for aligned examples alone: {_ALONE})"
            raise UserError(f"{source} has no {name} example, and the loss {needing[0]} needs some{fitting}")
    members = Counter(example.pair for example in examples if example.pair is not None)
    alone = sum(example.pair is None or members[example.pair] < 2 for example in examples)
    if loss.paired_terms and alone:
        raise UserError(
            f"{source}: {alone} of {len(examples)} examples have no partner, and the loss {loss.paired_terms[0]} takes pairs "
            f"(losses for unpaired data: {named(lambda objective: objective.data == 'unpaired' and not objective.penalty)})"
        )


class _Set:
    """Examples that are tokenised together, and the cache folder that their content names."""

    def __init__(self, recipe: Recipe, chat: Chat, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.pairs = _pair_numbers(examples)
        content = [(e.prompt, e.response, e.aligned, e.harmful, e.pair) for e in examples]
        self.folder = cache_dir("prepared") / digest(chat.fingerprint, _lengths(recipe), content)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the tokenised rows."""
        ids = [(row["prompt"], row["response"]) for row in rows]
        tokens = TokenizedExamples.from_ids(ids, [example.aligned for example in self.examples], self.pairs)
        with atomic(self.folder) as temporary:
            temporary.mkdir()
            tokens.write(temporary / "tokens.parquet")
            (temporary / "counts.json").write_text(json.dumps(asdict(_count(self.examples, tokens, rows))))

    def read(self) -> PreparedSet:
        counts = Counts(**json.loads((self.folder / "counts.json").read_text()))
        return PreparedSet(TokenizedExamples.read(self.folder / "tokens.parquet"), counts)


def _lengths(recipe: Recipe) -> dict[str, int]:
    return {"max_prompt_length": recipe.batch.max_prompt_length, "max_length": recipe.batch.max_length}


def _tokenize(sets: Sequence[_Set], recipe: Recipe, directory: Path, progress: Progress) -> None:
    """Tokenise the sets in one pass over one pool, and write each."""
    rows = [{"prompt": example.prompt, "response": example.response} for one in sets for example in one.examples]
    if not rows:
        return
    arguments = {"directory": str(directory), "template": recipe.data.template, **_lengths(recipe)}
    done = map_rows(rows, Tokenizer, arguments, cluster=recipe.cluster, batch_rows=1000, progress=progress, model=False)
    for one in sets:
        one.write(done[: len(one.examples)])
        done = done[len(one.examples) :]


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
            raise UserError(
                f"{both[0].source}: pair {name} has {labels[True]} aligned and {labels[False]} unaligned examples"
            )
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
