"""What is said while Ray Train waits for nodes, and itself says nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.resources import missing_worker_resources

EVERY_S = 30.0
"""Seconds between looks, and that workers say nothing when they are gone."""


@contextmanager
def report_waiting(silence: Callable[[], float], cluster: ClusterConfig, say: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, say when workers are gone and the cluster has no room for others; needs a Ray session.

    ``silence`` returns the seconds since any worker's last heartbeat, infinity before the first.
    """
    over = threading.Event()

    def look() -> None:
        waits = False
        while not over.wait(EVERY_S):
            silent = silence()
            lack = missing_worker_resources(cluster) if silent > EVERY_S else None
            if lack is not None and not waits:
                gone = "the workers are gone" if math.isfinite(silent) else "no worker has begun"
                say(f"{gone}, and training waits for nodes: {lack}")
            waits = lack is not None

    thread = threading.Thread(target=look, daemon=True, name="waiting")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
