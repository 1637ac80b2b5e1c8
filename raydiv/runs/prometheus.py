"""The metrics of a training run as Ray metrics, which Prometheus scrapes from every node of a cluster."""

from __future__ import annotations

from typing import Any

from raydiv.runs.metrics_log import Metrics, numbers


class PrometheusMetrics:
    """Gauges ``ray_raydiv_NAME{run="..."}``, one for each metric. Without a Ray session there are none."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, record: Metrics) -> None:
        """Set the gauges to the numbers of a line of metrics.jsonl."""
        import ray

        if not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in numbers(record).items():
            # Prometheus allows letters, digits and underscores
            gauge = "raydiv_" + "".join(letter if letter.isalnum() else "_" for letter in name)
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, description=name, tag_keys=("run",))
            self._gauges[gauge].set(float(value), tags={"run": self._run})
