"""What one GPU does at most: floating-point operations a second of a large matrix product, in the recipe's precision.

A script of its own process (see raydiv.benchmarks.work), so that nothing of it stays on the GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPEATS = 20


def main(settings: Mapping[str, Any], size: int = 8192) -> dict[str, Any]:
    """Median over products of two ``size`` x ``size`` matrices, a few of them for warm-up."""
    import torch

    from raydiv.model.load import DTYPES

    device = "cuda" if settings["use_gpu"] else "cpu"
    left, right = torch.randn(2, size, size, dtype=DTYPES[settings["precision"]], device=device)
    seconds = []
    for _ in range(2 * REPEATS):
        started = time.perf_counter()
        torch.mm(left, right)
        if settings["use_gpu"]:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if settings["use_gpu"] else "CPU"
    return {"device": name, "flops_per_second": 2 * size**3 / statistics.median(seconds[REPEATS:])}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
