"""PyTorch's profiler over a few steps, as traces that Perfetto and chrome://tracing open."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from raydiv.utils import distributed as dist


class StepProfiler:
    """The steps ``first`` to ``last`` (from 1) of this rank, in ``folder`` when they are over; without any, nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Step ``step`` is about to be made."""
        if self._steps is not None and self._running is None and self._steps[0] <= step <= self._steps[1]:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=devices, profile_memory=True)
            self._running.start()

    def after(self, step: int, last: bool) -> None:
        """Step ``step`` is made; ``last``: and no other will be."""
        if self._steps is None or self._running is None or not (last or step >= self._steps[1]):
            return
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self._folder / f"rank-{dist.rank()}.json.gz"))
