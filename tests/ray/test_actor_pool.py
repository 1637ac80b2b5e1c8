"""Rows through tasks and actors of Ray: their order, and UserErrors wherever they are raised."""

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
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import it
    with ray_session(ClusterConfig()):
        yield
    ray.cloudpickle.unregister_pickle_by_value(module)


def count(start: int, stop: int, wrong: int | None = None) -> Iterator[int]:
    for number in range(start, stop):
        if number == wrong:
            raise UserError(f"file:{number}: change it")
        yield number


class Doubles:
    """Doubles numbers, or rows of one number. Raises a UserError at the number ``wrong``, or when it is built."""

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
        raise KeyError("a bug")


def readers(wrong: int | None = None) -> list[Any]:
    return [functools.partial(count, start, start + 5, wrong) for start in range(0, 20, 5)]


def test_rows_keep_the_order_of_their_readers() -> None:
    rows = map_stream(readers(), Doubles, {}, cluster=ClusterConfig(), model=False)
    assert list(rows) == [2 * number for number in range(20)]
    assert list(PrefetchedStream(readers(), prefetch=3)) == list(range(20))


def test_results_have_the_order_of_the_rows_whatever_their_length() -> None:
    rows = [{"n": number} for number in (5, 3, 8, 1, 9, 2, 7)]
    reported: list[tuple[int, int | None]] = []
    results = map_rows(
        rows,
        Doubles,
        {},
        cluster=ClusterConfig(),
        batch_rows=2,
        model=False,
        length=lambda row: int(row["n"]),
        progress=lambda done, total, note="": reported.append((done, total)),
    )
    assert results == [{"n": 2 * row["n"]} for row in rows]
    assert reported == [(number, 7) for number in range(1, 8)]


@pytest.mark.parametrize("where", ["maker", "call", "construction", "map"])
def test_a_user_error_arrives_unchanged_and_without_a_traceback(where: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments: Row = {"call": {"wrong": 7}, "map": {"wrong": 7}, "construction": {"built": False}}.get(where, {})
    stream = readers(7 if where == "maker" else None)

    def work() -> None:
        if where == "map":
            map_rows([{"n": 7}], Doubles, arguments, cluster=ClusterConfig(), batch_rows=1, model=False)
        else:
            list(map_stream(stream, Doubles, arguments, cluster=ClusterConfig(), model=False))

    with pytest.raises(UserError) as caught:
        work()
    assert str(caught.value) == ("model.id: change it" if where == "construction" else "file:7: change it")
    assert "Traceback" not in capfd.readouterr().err


def test_other_failures_name_their_worker() -> None:
    with pytest.raises(RuntimeError, match=r"^Breaks: (.|\n)*a bug"):
        list(map_stream(readers(), Breaks, {}, cluster=ClusterConfig(), model=False))
