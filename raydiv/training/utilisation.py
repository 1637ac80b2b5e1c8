"""Model FLOPs utilisation: the model's own arithmetic as a share of what the GPUs reach.

After Chowdhery et al. 2022 (arXiv 2204.02311), appendix B, with one difference: the peak is measured in a large matrix
product, where that paper takes the maker's figure.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from raydiv.utils import distributed as dist

REPEATS = 10
"""Products that are timed, after as many for warm-up."""


@dataclass(frozen=True, slots=True)
class Utilisation:
    """``peak``: operations a second of the GPUs of all workers; ``multiplied_parameters``: of a token."""

    multiplied_parameters: int
    peak: float

    @classmethod
    def measured(cls, weights: int, device: torch.device, dtype: torch.dtype) -> Utilisation:
        """With the measured peak. All ranks must call it."""
        return cls(weights, sum(dist.all_gather_object(product_flops(device, dtype))))

    def share(self, tokens_per_second: float) -> float:
        """Six operations per token and weight, divided by the peak.

        Two are of the forward and four of the backward, whether or not a weight is trained (under LoRA the backward
        does with about half). Attention's products of activations, second forwards and padding do not count. The head's
        weights count for every token, although prompts never reach it.
        """
        return 6 * self.multiplied_parameters * tokens_per_second / self.peak


def product_flops(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second of a product of two ``size`` x ``size`` matrices, the median of several."""
    left, right = torch.randn(2, size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(2 * REPEATS):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[REPEATS:])
