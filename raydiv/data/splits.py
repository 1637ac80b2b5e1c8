"""The training and the held-out set: mixed from sources, split by prompt, pairs found, and checked against the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.config import Recipe
from raydiv.config.loss import LossConfig
from raydiv.data.index import Index, RowNotes
from raydiv.data.tokens import KEY, StoredExamples, TokenShards
from raydiv.losses import named
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """What was found, what was cut and what was left out, of one set."""

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
class ExamplesAndCounts:
    examples: StoredExamples
    counts: ExampleCounts


@dataclass(frozen=True, slots=True)
class Splits:
    """Training and held-out examples (None without ``data.eval``); the rows left out, and cut; prompts in both sets."""

    train: ExamplesAndCounts
    eval: ExamplesAndCounts | None
    bad: RowNotes
    cut: RowNotes
    shared_prompts: int


def make_splits(recipe: Recipe, train: Sequence[Index], held_out: Sequence[Index]) -> Splits:
    """The recipe's sets, from its prepared sources.

    Raises UserError for a single class, pairs that are none, paired losses without pairs, or a split with an empty side.
    """
    for index in (*train, *held_out):
        if not len(index):
            path = index.opened.source.path
            raise UserError(f"{path}: every row of it is bad; raydiv data check {path} lists them")
    sides = [_Mixture.of(train)]
    if held_out:
        sides.append(_Mixture.of(held_out))
    elif isinstance(recipe.data.eval, float):
        sides = list(sides[0].split(recipe.data.eval, recipe.seed))
    names = [", ".join(source.path for source in sources) for sources in (recipe.data.train, recipe.data.eval_sources)]
    for side, key, name in zip(sides, ("data.train", "data.eval"), names, strict=False):
        _require(recipe.loss, f"{key}: {name or recipe.data.eval}", side.examples)
    shared = len(np.intersect1d(sides[0].prompts, sides[1].prompts)) if len(sides) > 1 else 0
    nothing = RowNotes([], [])
    bad = sum((index.bad for index in (*train, *held_out)), nothing)
    cut = sum((index.cut() for index in (*train, *held_out)), nothing)
    done = [ExamplesAndCounts(side.examples, side.counts()) for side in sides]
    return Splits(done[0], done[1] if len(done) > 1 else None, bad, cut, shared)


class _Mixture:
    """The examples of several prepared sources, or some of them, with the columns that training has no use for."""

    def __init__(self, examples: StoredExamples, columns: dict[str, np.ndarray]) -> None:
        self.examples, self._columns = examples, columns

    @classmethod
    def of(cls, indices: Sequence[Index]) -> _Mixture:
        """All examples of the sources."""
        return cls(examples_of(indices), _concatenated(indices, "prompt_text", "harmful", "prompt_cut", "response_cut"))

    def _select(self, rows: np.ndarray) -> _Mixture:
        return _Mixture(self.examples.select(rows), {name: column[rows] for name, column in self._columns.items()})

    @property
    def prompts(self) -> np.ndarray:
        """Digest [n] of each example's prompt, as text."""
        return self._columns["prompt_text"]

    def split(self, share: float, seed: int) -> tuple[_Mixture, _Mixture]:
        """Training and held-out examples. It is prompts that are split: none is in both, whatever its examples."""
        prompts, number = np.unique(self.prompts, return_inverse=True)
        held_out = round(share * len(prompts))
        if held_out in (0, len(prompts)):
            raise UserError(f"data.eval: {share} of {len(prompts)} prompts leaves one side without a prompt")
        drawn = np.array([hashlib.sha256(b"%d/" % seed + prompt).digest()[:16] for prompt in prompts.tolist()], KEY)
        chosen = np.zeros(len(prompts), dtype=bool)
        chosen[np.argsort(drawn)[:held_out]] = True
        return self._select(np.flatnonzero(~chosen[number])), self._select(np.flatnonzero(chosen[number]))

    def counts(self) -> ExampleCounts:
        examples, harmful = self.examples, self._columns["harmful"]
        aligned = int(examples.aligned.sum())
        return ExampleCounts(
            examples=len(examples),
            aligned=aligned,
            unaligned=len(examples) - aligned,
            pairs=int((examples.units[:, 1] >= 0).sum()),
            harmful=int((harmful == 1).sum()),
            harmless=int((harmful == 0).sum()),
            unlabelled=int((harmful < 0).sum()),
            tokens=int(examples.lengths.sum(dtype=np.int64)),
            prompts_cut=int((self._columns["prompt_cut"] > 0).sum()),
            responses_cut=int((self._columns["response_cut"] > 0).sum()),
        )


def _concatenated(indices: Sequence[Index], *names: str) -> dict[str, np.ndarray]:
    """Columns of several sources, one source after another."""
    return {name: np.concatenate([index.columns[name] for index in indices]) for name in names}


def examples_of(indices: Sequence[Index]) -> StoredExamples:
    """The examples of prepared sources, one source after another. Raises UserError for pairs that are none."""
    shards, first_row, first_pair = TokenShards((), np.zeros(1, np.int64)), 0, 0
    rows, pairs = [], []
    for index in indices:
        shards = shards + index.shards
        rows.append(index.columns["row"] + first_row)
        numbers = _pair_numbers(index)
        pairs.append(np.where(numbers < 0, -1, numbers + first_pair))
        first_row, first_pair = int(shards.starts[-1]), first_pair + int(numbers.max(initial=-1)) + 1
    columns = _concatenated(indices, "prompt_length", "response_length", "aligned", "prompt_key", "response_key")
    return StoredExamples(
        shards,
        prompt_rows=np.concatenate(rows),
        response_rows=np.concatenate(rows),
        prompt_lengths=columns["prompt_length"],
        response_lengths=columns["response_length"],
        aligned=columns["aligned"],
        pair=np.concatenate(pairs),
        source=np.repeat(np.arange(len(indices), dtype=np.int16), [len(index) for index in indices]),
        prompt_keys=columns["prompt_key"],
        response_keys=columns["response_key"],
    )


def _pair_numbers(index: Index) -> np.ndarray:
    """The pair [n] of each example as a number from 0, -1 without.

    Raises UserError for a pair that is not one aligned and one unaligned example of one prompt.
    """
    for _, words in broken_pairs(index):
        raise UserError(words)
    pair = index.columns["pair"]
    paired = np.flatnonzero(pair >= 0)
    numbers = np.full(len(index), -1, dtype=np.int64)
    _, numbers[paired] = np.unique(pair[paired], return_inverse=True)
    return numbers


def broken_pairs(index: Index) -> Iterator[tuple[np.ndarray, str]]:
    """The members of each pair that is none, and what is said of it."""
    pair, aligned, prompts = (index.columns[name] for name in ("pair", "aligned", "prompt_text"))
    order = np.argsort(pair, kind="stable")
    order = order[pair[order] >= 0]
    starts = np.flatnonzero(np.diff(pair[order], prepend=-1))
    for members in (order[start:stop] for start, stop in _runs(pair[order], starts, aligned[order], prompts[order])):
        yes = int(aligned[members].sum())
        if max(yes, len(members) - yes) > 1:
            reason = f"one pair with {yes} aligned and {len(members) - yes} unaligned examples; a pair has one of each"
        else:
            reason = "one pair with two prompts; a pair is two responses to one"
        places = ", ".join(dict.fromkeys(index.where(int(row)) for row in members[:3]))
        yield members, f"{places}: {reason}"


def _runs(pair: np.ndarray, starts: np.ndarray, aligned: np.ndarray, prompts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where the pairs that are none begin and end, among examples sorted by ``pair``."""
    stops = np.append(starts[1:], len(pair))
    yes = np.add.reduceat(aligned.astype(int), starts) if len(starts) else starts
    apart = np.zeros(len(pair), dtype=int)
    apart[1:] = (pair[1:] == pair[:-1]) & (prompts[1:] != prompts[:-1])
    differ = np.add.reduceat(apart, starts) if len(starts) else starts
    bad = (yes > 1) | (stops - starts - yes > 1) | (differ > 0)
    yield from zip(starts[bad].tolist(), stops[bad].tolist(), strict=True)


_ALONE = named(lambda objective: not objective.unaligned and not objective.penalty)


def _require(loss: LossConfig, source: str, examples: StoredExamples) -> None:
    """Refuse data that the loss cannot learn from, or be evaluated on."""
    for aligned, name in ((True, "aligned"), (False, "unaligned")):
        needing = [loss.type] if aligned else loss.comparing_terms
        if not (examples.aligned == aligned).any() and needing:
            fitting = "" if aligned else f" (losses for aligned examples alone: {_ALONE})"
            raise UserError(f"{source} has no {name} example, and the loss {needing[0]} needs some{fitting}")
    alone = int((examples.units[:, 1] < 0).sum())
    if loss.paired_terms and alone:
        raise UserError(
            f"{source}: {alone} of {len(examples)} examples have no partner, and the loss {loss.paired_terms[0]} takes pairs "
            f"(losses for unpaired data: {named(lambda objective: objective.data == 'unpaired' and not objective.penalty)})"
        )
