"""Rows mapped in their order, by this process or by a pool of actors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from raydiv.config.cluster import ClusterConfig

Reader = Callable[[], Iterable[Any]]
"""Returns rows; called in a task."""


def map_stream(
    readers: Sequence[Reader],
    worker: type,
    arguments: dict[str, Any],
    *,
    cluster: ClusterConfig,
    here: bool = False,
) -> Generator[Any, None, None]:
    """Map the rows of ``readers`` over a pool of ``worker`` actors, in order; memory does not grow with the rows.

    ``worker(**arguments)`` is called with a list of one row.

    ``here``: in this process and without Ray, for work that takes less time than the pool takes to start.
    """
    if here:
        return _map_here(readers, worker, arguments)
    from raydiv.runtime.actor_pool import map_by_actors  # Ray Data takes a second to import

    return map_by_actors(readers, worker, arguments, cluster)


def _map_here(readers: Sequence[Reader], worker: type, arguments: dict[str, Any]) -> Generator[Any, None, None]:
    call = worker(**arguments)
    for reader in readers:
        for row in reader():
            yield from call([row])
