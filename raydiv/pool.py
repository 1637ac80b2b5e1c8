"""Ray Data pools of actors: rows in, rows out, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raydiv.config.recipe import Cluster
from raydiv.errors import user_error_in

Row = dict[str, Any]
Progress = Callable[[int, int], None]
"""Told how many rows are done, and of how many."""


def unwatched(done: int, total: int) -> None:
    """The progress of whom nobody watches."""


def map_rows(
    rows: Sequence[Row],
    worker: type,
    arguments: dict[str, Any],
    *,
    cluster: Cluster,
    batch_rows: int,
    progress: Progress = unwatched,
    model: bool = True,
    length: Callable[[Row], int] = lambda row: 0,
) -> list[Row]:
    """Send ``rows`` through a pool of ``worker`` actors in batches of ``batch_rows``; results come in the order of rows.

    Rows are sent shortest first by their ``length``, so that a batch pads little.

    ``worker(**arguments)`` is built once per actor and called with a list of rows; it returns as many. One actor a CPU,
    or a GPU where the recipe uses GPUs and the worker holds a ``model``; never more than there are batches.
    """
    import ray

    gpus = 1 if model and cluster.use_gpu else 0
    have = ray.cluster_resources()
    batches = -(-len(rows) // batch_rows)
    actors = max(1, min(batches, int(have.get("GPU" if gpus else "CPU", 1))))
    order = sorted(range(len(rows)), key=lambda position: length(rows[position]))
    source = ray.data.from_items(
        [{"position": position, "row": rows[position]} for position in order], override_num_blocks=max(1, batches)
    )
    mapped = source.map_batches(
        _Worker,
        fn_constructor_args=(worker, arguments),
        batch_size=batch_rows,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=gpus,
    )
    done: dict[int, Row] = {}
    try:
        for item in mapped.iter_rows():
            done[int(item["position"])] = item["row"]
            progress(len(done), len(rows))
    except Exception as error:  # Ray wraps what a worker raised in layers of its own
        raise user_error_in(error) or RuntimeError(f"{worker.__name__}: {type(error).__name__}: {error}") from error
    return [done[position] for position in range(len(rows))]


class _Worker:
    """Adapter between Ray Data's columns and a worker's lists of rows."""

    def __init__(self, worker: type, arguments: dict[str, Any]) -> None:
        self._worker = worker(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        rows = np.empty(len(batch["position"]), dtype=object)
        rows[:] = self._worker([dict(row) for row in batch["row"]])
        return {"position": batch["position"], "row": rows}
