"""Rows through tasks and actors of Ray: their order, and what the user must change wherever it is found."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.actor_pool import PrefetchedStream, map_rows, map_stream
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

pytestmark = pytest.mark.slow

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    this = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this)  # workers cannot import it
    with ray_session(ClusterConfig()):
        yield
    ray.cloudpickle.unregister_pickle_by_value(this)


def count(start: int, stop: int, wrong: int | None = None) -> Iterator[int]:
    for number in range(start, stop):
        if number == wrong:
            raise UserError(f"file:{number}: change it")
        yield number


class Doubles:
    """Doubles numbers, or rows of one number; finds some wrong."""

    def __init__(self, wrong: Any = None, built: bool = True) -> None:
        if not built:
            raise UserError("model.id: change it")
        self._wrong = wrong

    def __call__(self, rows: list[Any]) -> list[Any]:
        if self._wrong in rows or {"n": self._wrong} in rows:
            raise UserError(f"file:{self._wrong}: change it")
        return [{"n": 2 * row["n"]} if isinstance(row, dict) else 2 * row for row in rows]


class Breaks:
    def __call__(self, rows: list[Any]) -> list[Any]:
        raise KeyError("no fault of the user's")


def makers(wrong: int | None = None) -> list[Any]:
    return [functools.partial(count, start, start + 5, wrong) for start in range(0, 20, 5)]


def test_rows_come_in_the_order_of_their_makers() -> None:
    through = map_stream(makers(), Doubles, {}, cluster=ClusterConfig(), model=False)
    assert list(through) == [2 * number for number in range(20)]
    assert list(PrefetchedStream(makers(), ahead=3)) == list(range(20))


def test_rows_come_back_in_their_own_order_whatever_their_length() -> None:
    rows = [{"n": number} for number in (5, 3, 8, 1, 9, 2, 7)]
    seen: list[tuple[int, int | None]] = []
    done = map_rows(
        rows,
        Doubles,
        {},
        cluster=ClusterConfig(),
        batch_rows=2,
        model=False,
        length=lambda row: int(row["n"]),
        progress=lambda done, total, note="": seen.append((done, total)),
    )
    assert done == [{"n": 2 * row["n"]} for row in rows]
    assert seen == [(number, 7) for number in range(1, 8)]


@pytest.mark.parametrize("where", ["maker", "call", "construction", "map"])
def test_what_the_user_must_change_arrives_as_it_was_said(where: str, capfd: pytest.CaptureFixture[str]) -> None:
    given: Row = {"call": {"wrong": 7}, "map": {"wrong": 7}, "construction": {"built": False}}.get(where, {})
    made = makers(7 if where == "maker" else None)

    def work() -> None:
        if where == "map":
            map_rows([{"n": 7}], Doubles, given, cluster=ClusterConfig(), batch_rows=1, model=False)
        else:
            list(map_stream(made, Doubles, given, cluster=ClusterConfig(), model=False))

    with pytest.raises(UserError) as caught:
        work()
    assert str(caught.value) == ("model.id: change it" if where == "construction" else "file:7: change it")
    assert "Traceback" not in capfd.readouterr().err


def test_other_failures_name_their_worker() -> None:
    with pytest.raises(RuntimeError, match=r"^Breaks: (.|\n)*no fault of the user's"):
        list(map_stream(makers(), Breaks, {}, cluster=ClusterConfig(), model=False))
