"""Tokenised examples: reading ids in any order, content keys, units, and KTO's mismatched examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.stored import NOWHERE, stored_examples, write_shards
from raydiv.data.tokens import ROW_GROUP_SIZE, StoredExamples, TokenizedExamples, TokenShards, content_key, mismatched

EOS = 2
quick = settings(max_examples=60, deadline=None)

# two complete pairs, one half of a pair, one unpaired example
IDS = [([5, 6], [7]), ([5], [8, 2]), ([9], [1, 2, 3]), ([5, 6], [4, 2]), ([5], [7, 2]), ([1], [70000, 2])]
ALIGNED = [True, False, True, False, True, True]
PAIR = [0, 1, -1, 0, 1, 2]


def keys_of(examples: StoredExamples) -> list[bytes]:
    keys: list[bytes] = examples.keys.to_pylist()
    return keys


def test_key_depends_on_the_ids_alone() -> None:
    assert content_key(np.array([1, 2], np.int64)) == content_key((1, 2)) == content_key([1, 2])
    assert len(content_key([])) == len(content_key(range(1000))) == 16
    different: list[list[int]] = [[], [0], [0, 0], [1, 2], [2, 1], [1, 2, 0], [12], [70000], [70000 - 65536]]
    assert len({content_key(ids) for ids in different}) == len(different)


def test_examples_from_ids_have_lengths_pairs_and_units() -> None:
    examples = TokenizedExamples.from_ids(IDS, ALIGNED, PAIR)
    assert len(examples) == 6
    assert examples.lengths == [3, 3, 4, 4, 3, 3]
    assert examples.prompt_lengths.tolist() == [2, 1, 1, 2, 1, 1]
    assert examples.response_lengths.tolist() == [1, 2, 3, 2, 2, 2]
    assert examples.pairs.tolist() == [[0, 3], [4, 1]]
    assert sorted(map(sorted, examples.units)) == [[0, 3], [1, 4], [2], [5]]
    for row, (prompt, response) in enumerate(IDS):
        assert [ids.tolist() for ids in examples[row]] == [prompt, response]


def test_no_pairs_is_an_empty_table() -> None:
    assert TokenizedExamples.from_ids([([1], [2])], [True], [-1]).pairs.shape == (0, 2)
    assert TokenizedExamples.from_ids([], [], []).pairs.shape == (0, 2)
    assert TokenizedExamples.from_ids([], [], []).units == []


def test_ids_of_another_rank_raise() -> None:
    stored = stored_examples(IDS, ALIGNED, PAIR)
    rows, pair = np.array([3, 5, 0, 2]), np.array([8, -1, 8, 4])
    elsewhere = stored.without_ids(rows, pair)
    assert elsewhere.lengths == [4, 3, 3, 4]
    assert elsewhere.aligned.tolist() == [False, True, True, True]
    assert elsewhere.pairs.tolist() == [[2, 0]]
    assert sorted(elsewhere.units) == [[1], [2, 0], [3]]
    for row in range(4):
        with pytest.raises(LookupError, match=str(row)):
            elsewhere[row]
    ids = (np.array([5, 6]), np.array([4, 2])), (np.array([9]), np.array([1, 2, 3]))
    held = elsewhere.with_ids([0, 3], ids)
    assert [ids.tolist() for ids in held[0]] == [[5, 6], [4, 2]]
    assert [ids.tolist() for ids in held[3]] == [[9], [1, 2, 3]]
    for row in (1, 2):
        with pytest.raises(LookupError):
            held[row]
    with pytest.raises(LookupError):  # the original is unchanged
        elsewhere[0]
    assert (held.lengths, held.units) == (elsewhere.lengths, elsewhere.units)


SHARDS = (300, 1, 0, 128, 129, 0, 40)
"""Rows of the files, which have 3, 1, 0, 1, 2, 0 and 1 row groups."""


@pytest.fixture(scope="module")
def ids() -> list[tuple[list[int], list[int]]]:
    generator = np.random.default_rng(3)
    return [
        (generator.integers(0, 10**9, 1 + row % 3).tolist(), generator.integers(0, 10**9, row % 5).tolist())
        for row in range(sum(SHARDS))
    ]


@pytest.fixture(scope="module")
def shards(ids: list[tuple[list[int], list[int]]], tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return write_shards(tmp_path_factory.mktemp("shards") / "all", ids, SHARDS)


@quick
@given(rows=st.lists(st.integers(0, sum(SHARDS) - 1), max_size=40))
def test_rows_are_read_in_any_order_with_repeats(
    rows: list[int], shards: TokenShards, ids: list[tuple[list[int], list[int]]]
) -> None:
    for side, column in enumerate(("prompt_ids", "response_ids")):
        values = shards.read(column, np.array(rows))
        assert [row.tolist() for row in values] == [ids[row][side] for row in rows]
        assert all(row.dtype == np.int64 for row in values)


def test_every_row_of_every_row_group_is_read(shards: TokenShards, ids: list[tuple[list[int], list[int]]]) -> None:
    assert max(SHARDS) > 2 * ROW_GROUP_SIZE
    rows = np.random.default_rng(0).permutation(len(ids))
    assert [row.tolist() for row in shards.read("response_ids", rows)] == [ids[row][1] for row in rows]


def test_each_row_group_is_read_once(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    from raydiv.data import tokens

    read, groups = tokens._list_column, []

    def counted(uri: str, group: int, column: str) -> tuple[np.ndarray, np.ndarray]:
        groups.append((uri, group))
        return read(uri, group, column)

    monkeypatch.setattr(tokens, "_list_column", counted)
    shards.read("prompt_ids", np.array([299, 0, 130, 5, 300, 129, 0, 290]))
    assert Counter(groups) == Counter(
        [(shards.uris[0], 0), (shards.uris[0], 1), (shards.uris[0], 2), (shards.uris[1], 0)]
    )


def test_shards_of_two_sources_are_one_table(tmp_path: Path, ids: list[tuple[list[int], list[int]]]) -> None:
    first, second = write_shards(tmp_path / "a", ids[:5], (2, 3)), write_shards(tmp_path / "b", ids[5:12], (0, 7))
    both = NOWHERE + first + second
    assert both.starts.tolist() == [0, 2, 5, 5, 12]
    rows = np.array([11, 0, 4, 5, 1])
    assert [row.tolist() for row in both.read("prompt_ids", rows)] == [ids[row][0] for row in rows]


@pytest.fixture
def stored(tmp_path: Path) -> StoredExamples:
    return stored_examples(IDS, ALIGNED, PAIR, shards=write_shards(tmp_path / "stored", IDS, (4, 2)))


def test_stored_ids_are_the_examples(stored: StoredExamples) -> None:
    rows = np.array([5, 0, 5, 3])
    examples = [(prompt.tolist(), response.tolist()) for prompt, response in stored.ids(rows)]
    assert examples == [IDS[row] for row in rows]
    assert stored.lengths.tolist() == [3, 3, 4, 4, 3, 3]


def test_selection_keeps_columns_aligned_and_recomputes_pairs(stored: StoredExamples) -> None:
    chosen = stored.select(np.array([3, 5, 0]))
    assert [[ids.tolist() for ids in example] for example in chosen.ids(np.arange(3))] == [
        list(IDS[row]) for row in (3, 5, 0)
    ]
    assert keys_of(chosen) == [keys_of(stored)[row] for row in (3, 5, 0)]
    assert chosen.units.tolist() == [[1, -1], [2, 0]]
    assert chosen.aligned.tolist() == [False, True, True]
    assert stored.select(np.array([0, 1])).units.tolist() == [[0, -1], [1, -1]]


def test_a_pairs_aligned_example_comes_first() -> None:
    assert stored_examples(IDS, ALIGNED, PAIR).units.tolist() == [[0, 3], [2, -1], [4, 1], [5, -1]]


@quick
@given(st.permutations([*range(6), *range(6), -1, -1, 6, 7]))
def test_units_are_those_of_the_same_examples_in_memory(pair: list[int]) -> None:
    first: dict[int, int] = {}
    aligned = [first.setdefault(number, row) == row if number >= 0 else row % 2 == 0 for row, number in enumerate(pair)]
    ids = [([row], [1]) for row in range(len(pair))]
    units = stored_examples(ids, aligned, pair).units
    memory = TokenizedExamples.from_ids(ids, aligned, pair)
    assert sorted([row for row in unit if row >= 0] for unit in units.tolist()) == memory.units
    assert units[:, 0].tolist() == sorted(units[:, 0].tolist())
    assert sorted(units[units >= 0].tolist()) == list(range(len(pair)))
    assert sorted(units[units[:, 1] >= 0].tolist()) == sorted(memory.pairs.tolist())


def test_keys_distinguish_prompt_response_and_scored_length() -> None:
    contents: list[tuple[list[int], list[int]]] = [
        ([1, 2], [3]),
        ([1], [2, 3]),
        ([1, 2, 3], []),
        ([2, 1], [3]),
        ([1, 2], [4]),
        ([1, 2], [3, 0]),
        ([3], [1, 2]),
    ]
    n = len(contents)
    keys = keys_of(stored_examples(contents, [True] * n, [-1] * n))
    assert len(set(keys)) == n
    assert {len(key) for key in keys} == {36}
    # labels, pairs, sources and rows do not matter
    assert keys_of(stored_examples(contents[::-1], [False] * n, list(range(n)), [1] * n)) == keys[::-1]


def test_keys_hold_digests_that_end_in_zeros() -> None:
    examples = stored_examples([([1], [2])], [True], [-1])
    digest = b"\1" * 15 + b"\0"
    zeros = StoredExamples(**(vars(examples) | {"prompt_keys": np.array([digest], "S16")}))
    assert keys_of(zeros)[0].startswith(digest)
    assert len(keys_of(zeros)[0]) == 36


def test_no_examples_have_no_keys() -> None:
    assert keys_of(stored_examples([], [], [])) == []


def test_fingerprint_depends_on_ids_labels_pairs_sources_and_order() -> None:
    ids = [([1], [2]), ([3], [4])]
    variants = [
        (ids, [True, False], [0, 0], [0, 0]),
        ([([1], [2]), ([3], [5])], [True, False], [0, 0], [0, 0]),
        ([([1], [2]), ([9], [4])], [True, False], [0, 0], [0, 0]),
        (ids, [True, True], [0, 0], [0, 0]),
        (ids, [True, False], [-1, -1], [0, 0]),
        (ids, [True, False], [0, 0], [0, 1]),
        (ids[::-1], [True, False], [0, 0], [0, 0]),
    ]
    prints = [stored_examples(*variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(variants)
    assert stored_examples(*variants[0]).fingerprint == prints[0]
    # the number of a pair does not matter
    assert stored_examples(ids, [True, False], [7, 7]).fingerprint == prints[0]


# prompt numbers of the examples, no prompt with more than half of them
prompt_numbers = st.lists(st.integers(1, 6), min_size=2, max_size=24).filter(
    lambda rows: 2 * max(Counter(rows).values()) <= len(rows)
)


def of_prompts(rows: Sequence[int], responses: Sequence[int] | None = None) -> StoredExamples:
    """One example per row: the prompt of that number, and a distinct response by default."""
    responses = range(len(rows)) if responses is None else responses
    ids = [([number] * number, [100 + response, EOS]) for number, response in zip(rows, responses, strict=True)]
    return stored_examples(ids, [row % 2 == 0 for row in range(len(rows))], [-1] * len(rows))


@quick
@given(prompt_numbers)
def test_mismatched_gives_every_prompt_the_response_of_another(rows: list[int]) -> None:
    examples = of_prompts(rows)
    derangement = mismatched(examples, max_length=100)
    donors = derangement.response_rows.tolist()
    assert derangement.prompt_rows.tolist() == list(range(len(rows)))
    assert sorted(donors) == list(range(len(rows)))
    assert all(rows[donor] != number for donor, number in zip(donors, rows, strict=True))
    assert derangement.response_keys.tolist() == examples.response_keys[donors].tolist()
    assert derangement.prompt_keys.tolist() == examples.prompt_keys.tolist()
    assert (derangement.units[:, 1] < 0).all()
    assert not derangement.aligned.any()


@quick
@given(prompt_numbers.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(range(len(rows))))))
def test_mismatched_does_not_depend_on_the_order_of_rows(case: tuple[list[int], list[int]]) -> None:
    rows, order = case
    examples = of_prompts(rows)
    straight = mismatched(examples, max_length=100)
    shuffled = mismatched(examples.select(np.array(order)), max_length=100)
    assert [keys_of(straight)[row] for row in order] == keys_of(shuffled)


@quick
@given(prompt_numbers.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(range(len(rows))))))
def test_mismatched_of_equal_examples_does_not_depend_on_their_order(case: tuple[list[int], list[int]]) -> None:
    rows, order = case
    examples = of_prompts(rows, [number % 2 for number in range(len(rows))])
    straight = mismatched(examples, max_length=100)
    shuffled = mismatched(examples.select(np.array(order)), max_length=100)
    assert Counter(keys_of(straight)) == Counter(keys_of(shuffled))


def test_mismatched_depends_on_content_alone() -> None:
    ids = [([row % 4], [row]) for row in range(8)]
    first = mismatched(stored_examples(ids, [True] * 8, [-1] * 8), 100)
    second = mismatched(
        stored_examples(ids, [row % 2 > 0 for row in range(8)], [row % 4 for row in range(8)], range(8)), 100
    )
    assert first.response_rows.tolist() == second.response_rows.tolist()


def test_mismatched_responses_are_truncated_and_keyed_by_length(tmp_path: Path) -> None:
    ids = [([1] * 6, [7, EOS]), ([2], [8] * 8 + [EOS])]
    examples = stored_examples(ids, [True, False], [-1, -1], shards=write_shards(tmp_path / "two", ids, (2,)))
    cut, whole = mismatched(examples, max_length=8), mismatched(examples, max_length=100)
    rows = np.arange(2)
    assert [[part.tolist() for part in example] for example in cut.ids(rows)] == [[[1] * 6, [8, 8]], [[2], [7, EOS]]]
    assert [len(response) for _, response in whole.ids(rows)] == [9, 2]
    assert cut.lengths.tolist() == [8, 3]
    assert keys_of(cut)[0] != keys_of(whole)[0]
    assert keys_of(cut)[1] == keys_of(whole)[1]


@pytest.mark.parametrize("rows", [[1], [1, 1], [1, 1, 2], [3, 1, 3, 3, 2]])
def test_mismatched_is_refused_if_one_prompt_dominates(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{max(Counter(rows).values())} of {len(rows)}"):
        mismatched(of_prompts(rows), max_length=100)
