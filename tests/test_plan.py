"""The data plan: an order that is a pure function, and micro-batches that lose and repeat nothing."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydiv.data.plan import Epochs, largest_micro_batch, micro_batches, tokens_of_busiest_rank

quick = settings(max_examples=80, deadline=None)


@st.composite
def unit_lists(draw: st.DrawFn) -> list[list[int]]:
    """Pairs and lone rows, in any order, together rows 0..n-1."""
    sizes = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=30))
    rows = draw(st.permutations(range(sum(sizes))))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [list(rows[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


epochs = st.builds(
    Epochs,
    units=unit_lists(),
    examples=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    fingerprint=st.text(max_size=8),
)


def walk(plan: Epochs, epoch: int) -> list[list[int]]:
    """Rows of each step of an epoch."""
    first = epoch * plan.steps_per_epoch
    return [plan.step(step).rows.tolist() for step in range(first, first + plan.steps_per_epoch)]


@quick
@given(epochs, st.integers(0, 3))
def test_every_epoch_takes_each_row_once(plan: Epochs, epoch: int) -> None:
    steps = walk(plan, epoch)
    assert Counter(row for rows in steps for row in rows) == Counter(row for unit in plan.units for row in unit)
    assert all(steps)


@quick
@given(epochs, st.integers(0, 3))
def test_units_stay_together_and_no_step_is_too_large(plan: Epochs, epoch: int) -> None:
    for rows in walk(plan, epoch):
        rest = list(rows)
        for unit in (unit for unit in plan.units if unit[0] in rows):
            assert rows[rows.index(unit[0]) :][: len(unit)] == list(unit)
            rest = [row for row in rest if row not in unit]
        assert rest == []
        assert len(rows) <= max(plan.examples, max(map(len, plan.units)))


@quick
@given(epochs, st.integers(0, 200))
def test_step_is_a_pure_function(plan: Epochs, step: int) -> None:
    again = Epochs([list(unit) for unit in plan.units], plan.examples, plan.seed, plan.fingerprint)
    for earlier in range(min(step, 5)):
        plan.step(earlier)
    assert plan.step(step).rows.tolist() == again.step(step).rows.tolist()
    assert again.step(step).step == step


@quick
@given(epochs, st.integers(0, 60))
def test_step_found_directly_is_the_walks(plan: Epochs, step: int) -> None:
    walked = [rows for epoch in range(step // plan.steps_per_epoch + 1) for rows in walk(plan, epoch)]
    assert plan.step(step).rows.tolist() == walked[step]


@quick
@given(epochs)
def test_epoch_counts_what_is_done(plan: Epochs) -> None:
    assert plan.step(plan.steps_per_epoch - 1).epoch == pytest.approx(1)
    assert plan.step(2 * plan.steps_per_epoch - 1).epoch == pytest.approx(2)
    assert 0 < plan.step(0).epoch <= 1


@quick
@given(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 50))
def test_order_follows_seed_epoch_and_fingerprint(seed: int, fingerprint: str, epoch: int) -> None:
    units = [[row] for row in range(60)]
    plan = Epochs(units, 8, seed, fingerprint)
    order = walk(plan, epoch)
    assert order == walk(Epochs(units, 8, seed, fingerprint), epoch)
    others = [
        walk(plan, epoch + 1),
        walk(Epochs(units, 8, seed + 1, fingerprint), epoch),
        walk(Epochs(units, 8, seed, fingerprint + "x"), epoch),
    ]
    assert order not in others


def test_order_does_not_follow_the_size_of_a_step() -> None:
    units = [[row] for row in range(24)]
    orders = [[row for rows in walk(Epochs(units, size, 3, "f"), 1) for row in rows] for size in (1, 5, 8, 24, 100)]
    assert orders == [orders[0]] * 5


def test_order_is_shuffled_evenly() -> None:
    plan = Epochs([[row] for row in range(10)], 1, 0, "f")
    first = Counter(plan.step(10 * epoch).rows.tolist()[0] for epoch in range(500))
    assert len(first) == 10
    assert max(first.values()) < 2 * min(first.values())


@pytest.mark.parametrize(
    ("units", "examples", "sizes"),
    [
        ([[0], [1], [2], [3], [4]], 2, [2, 2, 1]),
        ([[0, 1], [2, 3], [4, 5]], 4, [4, 2]),
        ([[0, 1], [2, 3], [4, 5]], 5, [4, 2]),
        ([[0, 1], [2, 3]], 1, [2, 2]),
        ([[0], [1]], 16, [2]),
    ],
)
def test_sizes_of_steps(units: list[list[int]], examples: int, sizes: list[int]) -> None:
    assert [len(rows) for rows in walk(Epochs(units, examples, 0, "f"), 0)] == sizes


length_lists = st.lists(st.integers(1, 40), max_size=40)
budgets, worlds = st.integers(1, 120), st.integers(1, 6)


def padded(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max((lengths[position] for position in batch), default=0)


@quick
@given(length_lists, budgets, worlds)
def test_every_position_is_in_one_micro_batch(lengths: list[int], tokens: int, ranks: int) -> None:
    dealt = micro_batches(lengths, tokens, ranks)
    assert sorted(position for mine in dealt for batch in mine for position in batch) == list(range(len(lengths)))


@quick
@given(length_lists, budgets, worlds)
def test_every_rank_takes_part_equally_often(lengths: list[int], tokens: int, ranks: int) -> None:
    dealt = micro_batches(lengths, tokens, ranks)
    assert len(dealt) == ranks
    assert len({len(mine) for mine in dealt}) == 1
    assert len(dealt[0]) >= 1


@settings(max_examples=300, deadline=None)
@given(length_lists, budgets, worlds)
def test_budget_is_kept_unless_an_example_stands_alone(lengths: list[int], tokens: int, ranks: int) -> None:
    for mine in micro_batches(lengths, tokens, ranks):
        for batch in mine:
            assert len(batch) <= 1 or padded(batch, lengths) <= tokens


@quick
@given(length_lists, budgets, worlds)
def test_ranks_differ_by_a_micro_batch_at_most(lengths: list[int], tokens: int, ranks: int) -> None:
    dealt = micro_batches(lengths, tokens, ranks)
    loads = [sum(padded(batch, lengths) for batch in mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(padded(batch, lengths) for mine in dealt for batch in mine)


@quick
@given(length_lists, budgets, worlds)
def test_no_rank_waits_for_dummies_alone(lengths: list[int], tokens: int, ranks: int) -> None:
    dealt = micro_batches(lengths, tokens, ranks)
    assert any(mine[-1] for mine in dealt) or not lengths


@quick
@given(length_lists, budgets, worlds)
def test_layout_is_a_pure_function(lengths: list[int], tokens: int, ranks: int) -> None:
    assert micro_batches(lengths, tokens, ranks) == micro_batches(list(lengths), tokens, ranks)


def in_pairs(lengths: list[int]) -> list[list[int]]:
    """Neighbours together, a last odd one alone."""
    return [list(range(len(lengths)))[start : start + 2] for start in range(0, len(lengths), 2)]


@quick
@given(length_lists, budgets, worlds)
def test_groups_stay_together_within_the_same_rules(lengths: list[int], tokens: int, ranks: int) -> None:
    groups = in_pairs(lengths)
    dealt = micro_batches(lengths, tokens, ranks, groups)
    batches = [batch for mine in dealt for batch in mine]
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert all(any(set(group) <= set(batch) for batch in batches) for group in groups)
    assert all(padded(batch, lengths) <= tokens or batch in groups for batch in batches)
    assert len({len(mine) for mine in dealt}) == 1


@quick
@given(length_lists, budgets, worlds)
def test_costs_of_a_layout_count_padding(lengths: list[int], tokens: int, ranks: int) -> None:
    dealt = micro_batches(lengths, tokens, ranks)
    sizes = [[padded(batch, lengths) for batch in mine] for mine in dealt]
    assert tokens_of_busiest_rank(dealt, lengths) == max(map(sum, sizes))
    assert largest_micro_batch(dealt, lengths) == max(map(max, sizes))


def test_longest_come_first_with_their_like() -> None:
    assert micro_batches([1, 9, 2, 10, 3], 20, 1) == [[[3, 1], [4, 2, 0]]]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_step_without_examples_is_one_dummy_a_rank(ranks: int) -> None:
    assert micro_batches([], 100, ranks) == [[[]]] * ranks


@pytest.mark.parametrize(("examples", "ranks"), [(1, 2), (2, 3), (3, 8)])
def test_fewer_examples_than_ranks_leave_dummies(examples: int, ranks: int) -> None:
    dealt = micro_batches([5] * examples, 100, ranks)
    assert sorted(len(mine[0]) for mine in dealt) == [0] * (ranks - examples) + [1] * examples


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_one_budgets_worth_is_shared_by_all_ranks(ranks: int) -> None:
    assert [len(batch) for mine in micro_batches([7] * 8, 1000, ranks) for batch in mine] == [8 // ranks] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_loads_of_a_large_step_are_near_their_mean(seed: int, ranks: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.choice([20, 200]) + generator.randrange(30) for _ in range(256)]
    dealt = micro_batches(lengths, 1024, ranks)
    loads = [sum(padded(batch, lengths) for batch in mine) for mine in dealt]
    assert max(loads) <= 1.1 * sum(loads) / ranks
    assert sum(loads) <= 1.15 * sum(lengths)
