"""A training run's numbers as Ray's own metrics, which Prometheus scrapes from every node of a cluster."""

from __future__ import annotations

from typing import Any

from raydiv.runs.metrics_log import Metrics, numbers


class PrometheusMetrics:
    """``ray_raydiv_NAME{run="..."}`` for each metric NAME; of a process without a Ray session, nothing."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._made: dict[str, Any] = {}

    def show(self, record: Metrics) -> None:
        """The last value of each number of a line of metrics.jsonl."""
        import ray

        if not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in numbers(record).items():
            # Prometheus knows letters, digits and underscores
            known = "raydiv_" + "".join(letter if letter.isalnum() else "_" for letter in name)
            if known not in self._made:
                self._made[known] = Gauge(known, description=name, tag_keys=("run",))
            self._made[known].set(float(value), tags={"run": self._run})
