"""Verification of an export: the written model gives the trained one's log-probs on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiv.config import Recipe
from raydiv.data.tokens import StoredExamples
from raydiv.model.chat import Ids
from raydiv.model.collate import collate
from raydiv.model.head import LogProbHead
from raydiv.model.load import ModelSource
from raydiv.training.step import Stepper

VERIFIED_TOKENS = 256
"""Response tokens that are compared, in as few examples as have them, the shortest first."""

EXACT = 1e-3
"""Nats a token (root mean square) that two computations in fp32 may differ by, such as those of two devices."""

MOST_ROUNDING = 3.0
"""How far the trained and the written model may differ, in units of what rounding changes in the written one.

Both round independently where their kernels differ, so that their difference is about the square root of 2.
"""


@dataclass(frozen=True, slots=True)
class ExportVerification:
    """Examples as token ids, and the log-probs [t] that the trained engine gives their response tokens in turn."""

    examples: Sequence[tuple[Ids, Ids]]
    logps: Tensor

    def check(self, recipe: Recipe, device: str = "cpu") -> Callable[[Path], None]:
        """A check of a model directory on a ``device``, which raises RuntimeError where it holds another model.

        In fp32 the log-probs must be equal. In bf16 and in 4 bits, their difference is measured in units of what
        rounding changes: the difference of the written model to itself in fp32. Adapters must give the same log-probs
        in fp32 before and after they are merged into the base.
        """

        def check_directory(directory: Path) -> None:
            source = ModelSource.from_recipe(recipe, directory)
            exact_source = replace(source, precision="fp32")
            model = source.load_unmerged(device)
            exact = written = self._logps_of(model)
            if source.quantization is not None or source != exact_source:
                del model  # memory may not hold two
                model = exact_source.load_unmerged(device)
                exact = self._logps_of(model)
            difference, limit = _rms(written - self.logps), max(EXACT, MOST_ROUNDING * _rms(written - exact))
            if not difference <= limit:  # also where it is NaN
                raise RuntimeError(
                    f"the written model is not the trained one: the log-probs of {len(written)} tokens differ by "
                    f"{difference:.3g} nats (root mean square), and rounding explains at most {limit:.3g}"
                )
            if recipe.model.lora is not None and source.quantization is None:
                self._check_merge(model, exact)

        return check_directory

    def _check_merge(self, model: Any, adapted: Tensor) -> None:
        """Merge the adapters of a model in fp32, whose log-probs must stay ``adapted``."""
        difference = _rms(self._logps_of(model.merge_and_unload()) - adapted)
        if not difference <= EXACT:
            raise RuntimeError(
                "adapters that are merged into the base are not the trained ones: their log-probs differ by "
                f"{difference:.3g} nats a token"
            )

    def _logps_of(self, model: Any) -> Tensor:
        """Log-probs [t] under a model, in fp32 on the CPU."""
        head, logps = LogProbHead(model.eval()), []
        with torch.inference_mode():
            for example in self.examples:
                inputs = collate([example]).to(model.device)
                head.set_targets(inputs.rows, inputs.columns, inputs.targets)
                logps.append(model(**inputs.forward_kwargs()).logits.float().cpu())
        head.remove()
        return torch.cat(logps)


def make_export_verification(stepper: Stepper, examples: StoredExamples) -> ExportVerification:
    """The engine's log-probs of the shortest training examples. All ranks must call it."""
    shortest = np.argsort(examples.lengths, kind="stable")
    count = int(np.searchsorted(np.cumsum(examples.response_lengths[shortest]), VERIFIED_TOKENS)) + 1
    verified = examples.ids(shortest[:count])
    return ExportVerification(verified, torch.cat(stepper.token_logps(verified)))


def verification_device(model: Any) -> str:
    """Where a written ``model`` is read in fp32: the GPU where it fits beside what the worker holds, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.empty_cache()
    needed = 4 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return "cuda" if torch.cuda.mem_get_info()[0] > 1.25 * needed + 2**30 else "cpu"


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
