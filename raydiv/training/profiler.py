"""PyTorch's profiler over a few steps, as traces that Perfetto and chrome://tracing open."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from raydiv.utils import distributed as dist


class StepProfiler:
    """Profiles ``steps`` (the first and the last, from 1) of this rank, and writes a trace into ``folder``."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._running: profile | None = None

    def before_step(self, step: int) -> None:
        """Start the profiler where ``step`` is to be profiled."""
        if self._steps is not None and self._running is None and self._steps[0] <= step <= self._steps[1]:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=devices, profile_memory=True)
            self._running.start()

    def after_step(self, step: int, last: bool) -> None:
        """Write the trace after the last step to be profiled, or the ``last`` of the run."""
        if self._steps is None or self._running is None or not (last or step >= self._steps[1]):
            return
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self._folder / f"rank-{dist.rank()}.json.gz"))
