"""A message while Ray Train waits for nodes, about which it logs nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.resources import missing_worker_resources

CHECK_INTERVAL_S = 30.0
"""Seconds between two checks; also the seconds without a heartbeat after which workers count as gone."""


@contextmanager
def report_waiting(
    seconds_since_heartbeat: Callable[[], float], cluster: ClusterConfig, log: Callable[[str], None]
) -> Iterator[None]:
    """While the block runs, log when workers are gone and the cluster has no room for new ones. Needs a Ray session.

    ``seconds_since_heartbeat`` is that of the worker heard from last, infinite before the first.
    """
    ended = threading.Event()

    def check() -> None:
        waiting = False
        while not ended.wait(CHECK_INTERVAL_S):
            seconds = seconds_since_heartbeat()
            missing = missing_worker_resources(cluster) if seconds > CHECK_INTERVAL_S else None
            if missing is not None and not waiting:
                workers = "the workers are gone" if math.isfinite(seconds) else "no worker has started"
                log(f"{workers}; training waits for nodes: {missing}")
            waiting = missing is not None

    thread = threading.Thread(target=check, daemon=True, name="wait-for-nodes")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
