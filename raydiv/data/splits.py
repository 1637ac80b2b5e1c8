"""The training and the held-out set: mixed from sources, split by prompt, paired, and checked against the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.config import Recipe
from raydiv.config.loss import LossConfig
from raydiv.data.index import Index, RowNotes
from raydiv.data.tokens import KEY, StoredExamples, TokenShards
from raydiv.losses import objective_names
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """Counts of a set's examples, by class and by the prompt's label, of its tokens, and of its truncated examples."""

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
class Split:
    """A set's examples and their counts."""

    examples: StoredExamples
    counts: ExampleCounts


@dataclass(frozen=True, slots=True)
class Splits:
    """Training and held-out set (None without ``data.eval``), bad and truncated rows, number of shared prompts."""

    train: Split
    eval: Split | None
    bad: RowNotes
    truncated: RowNotes
    shared_prompts: int


def make_splits(recipe: Recipe, train: Sequence[Index], held_out: Sequence[Index]) -> Splits:
    """The recipe's training and held-out set, from its prepared sources.

    Raises UserError for a source without a good row, a set without a class that the loss needs, invalid pairs,
    prompts that are rendered already, unpaired examples under a paired loss, or a split that leaves one set empty.
    """
    for index in (*train, *held_out):
        if not len(index):
            path = index.opened.source.path
            raise UserError(f"{path}: every row is bad; raydiv data check {path} lists them")
        if message := index.rendered_error():
            raise UserError(message)
    mixtures = [_Mixture.of(train)]
    if held_out:
        mixtures.append(_Mixture.of(held_out))
    elif isinstance(recipe.data.eval, float):
        mixtures = list(mixtures[0].split(recipe.data.eval, recipe.seed))
    names = [", ".join(source.path for source in sources) for sources in (recipe.data.train, recipe.data.eval_sources)]
    for mixture, key, name in zip(mixtures, ("data.train", "data.eval"), names, strict=False):
        _require_fit(recipe.loss, f"{key}: {name or recipe.data.eval}", mixture.examples)
    if recipe.loss.position.kind == "common-length" and not (mixtures[0].examples.units[:, 1] >= 0).any():
        raise UserError(
            f"loss.position.kind: common-length has no effect: data.train: {names[0]} has no pairs; set another kind"
        )
    if recipe.loss.position.kind == "rewarded" and not mixtures[0].examples.aligned.any():
        raise UserError(
            f"loss.position.kind: rewarded has no effect: data.train: {names[0]} has no aligned examples; set "
            "another kind"
        )
    shared = len(np.intersect1d(mixtures[0].prompts, mixtures[1].prompts)) if len(mixtures) > 1 else 0
    indices, no_notes = (*train, *held_out), RowNotes([], [])
    splits = [Split(mixture.examples, mixture.counts()) for mixture in mixtures]
    return Splits(
        train=splits[0],
        eval=splits[1] if len(splits) > 1 else None,
        bad=sum((index.bad for index in indices), no_notes),
        truncated=sum((index.truncated() for index in indices), no_notes),
        shared_prompts=shared,
    )


class _Mixture:
    """Examples of several prepared sources, with the index columns that splitting and counting need beside them."""

    def __init__(self, examples: StoredExamples, columns: dict[str, np.ndarray]) -> None:
        self.examples, self._columns = examples, columns

    @classmethod
    def of(cls, indices: Sequence[Index]) -> _Mixture:
        """All examples of the sources."""
        columns = _concatenated(indices, "prompt_text", "harmful", "prompt_cut", "response_cut")
        return cls(examples_of(indices), columns)

    def _select(self, rows: np.ndarray) -> _Mixture:
        return _Mixture(self.examples.select(rows), {name: column[rows] for name, column in self._columns.items()})

    @property
    def prompts(self) -> np.ndarray:
        """Digests [n] of the prompts' texts."""
        return self._columns["prompt_text"]

    def split(self, fraction: float, seed: int) -> tuple[_Mixture, _Mixture]:
        """Training and held-out examples. Prompts are split, so that no prompt is in both, whatever its examples."""
        prompts, numbers = np.unique(self.prompts, return_inverse=True)
        count = round(fraction * len(prompts))
        if count in (0, len(prompts)):
            raise UserError(f"data.eval: {fraction} of {len(prompts)} prompts leaves one side without a prompt")
        order = np.array([hashlib.sha256(b"%d/" % seed + prompt).digest()[:16] for prompt in prompts.tolist()], KEY)
        held_out = np.zeros(len(prompts), dtype=bool)
        held_out[np.argsort(order)[:count]] = True
        return self._select(np.flatnonzero(~held_out[numbers])), self._select(np.flatnonzero(held_out[numbers]))

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
    """Index columns of several sources, concatenated."""
    return {name: np.concatenate([index.columns[name] for index in indices]) for name in names}


def examples_of(indices: Sequence[Index]) -> StoredExamples:
    """The examples of prepared sources, concatenated. Raises UserError for invalid pairs."""
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
    """The pair [n] of each example as a number from 0, or -1 for no pair. Raises UserError for an invalid pair."""
    for _, message in invalid_pairs(index):
        raise UserError(message)
    pair = index.columns["pair"]
    paired = np.flatnonzero(pair >= 0)
    numbers = np.full(len(index), -1, dtype=np.int64)
    _, numbers[paired] = np.unique(pair[paired], return_inverse=True)
    return numbers


def invalid_pairs(index: Index) -> Iterator[tuple[np.ndarray, str]]:
    """The members of each pair other than one aligned and one unaligned example of one prompt, and a message."""
    pair, aligned, prompts = (index.columns[name] for name in ("pair", "aligned", "prompt_key"))
    order = np.argsort(pair, kind="stable")
    order = order[pair[order] >= 0]
    ranges = _invalid_ranges(pair[order], aligned[order], prompts[order])
    for members in (order[start:stop] for start, stop in ranges):
        count = int(aligned[members].sum())
        others = len(members) - count
        if max(count, others) > 1:
            reason = f"one pair with {count} aligned and {others} unaligned examples; a pair has one of each"
        else:
            reason = "one pair with two prompts; a pair is two responses to one"
        places = ", ".join(dict.fromkeys(index.where(int(row)) for row in members[:3]))
        yield members, f"{places}: {reason}"


def _invalid_ranges(pair: np.ndarray, aligned: np.ndarray, prompts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each invalid pair among examples sorted by ``pair``."""
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    if not len(starts):
        return
    stops = np.append(starts[1:], len(pair))
    aligned_counts = np.add.reduceat(aligned.astype(int), starts)
    prompt_changes = np.zeros(len(pair), dtype=int)
    prompt_changes[1:] = (pair[1:] == pair[:-1]) & (prompts[1:] != prompts[:-1])
    invalid = (
        (aligned_counts > 1) | (stops - starts - aligned_counts > 1) | (np.add.reduceat(prompt_changes, starts) > 0)
    )
    yield from zip(starts[invalid].tolist(), stops[invalid].tolist(), strict=True)


_LOSSES_FOR_ONE_CLASS = {
    True: objective_names(lambda objective: not objective.needs_unaligned and not objective.penalty),
    False: objective_names(lambda objective: not objective.needs_aligned),
}
_LOSSES_WITHOUT_PAIRS = objective_names(lambda objective: objective.data == "unpaired" and not objective.penalty)


def _require_fit(loss: LossConfig, source: str, examples: StoredExamples) -> None:
    """Raise UserError for data that the loss cannot be trained or evaluated on."""
    for aligned, name in ((True, "aligned"), (False, "unaligned")):
        needing = loss.aligned_terms if aligned else loss.unaligned_terms
        if not (examples.aligned == aligned).any() and needing:
            other = "unaligned" if aligned else "aligned"
            raise UserError(
                f"{source}: no {name} example, and the loss {needing[0]} needs some (losses for {other} examples "
                f"alone: {_LOSSES_FOR_ONE_CLASS[not aligned]})"
            )
    unpaired = int((examples.units[:, 1] < 0).sum())
    if loss.paired_terms and unpaired:
        raise UserError(
            f"{source}: {unpaired} of {len(examples)} examples have no partner, and the loss {loss.paired_terms[0]} "
            f"takes pairs (losses for unpaired data: {_LOSSES_WITHOUT_PAIRS})"
        )
