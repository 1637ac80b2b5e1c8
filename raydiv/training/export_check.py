"""The written model is the trained one: its log-probs are compared, on a few examples, before it is called written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raydiv.config import Recipe
from raydiv.data.batching import SequentialPlan
from raydiv.model.collate import Ids, collate
from raydiv.model.head import LogProbHead
from raydiv.model.load import ModelSource
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, parts
from raydiv.training.step import Stepper
from raydiv.utils import distributed as dist

COMPARED = 4
"""Examples."""

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Nats a token: the written model is read on a CPU, whose kernels round otherwise."""


@dataclass(frozen=True, slots=True)
class ExportVerification:
    """Examples, by their token ids, and the log-prob [n] that the trained engine gives each."""

    examples: Sequence[tuple[Ids, Ids]]
    logps: Tensor

    def check(self, recipe: Recipe) -> Callable[[Path], None]:
        """A check of a directory, which raises RuntimeError where the model there is another one."""

        def same(directory: Path) -> None:
            found = logps_of(ModelSource.of(recipe, directory), self.examples)
            tokens = torch.tensor([len(response) for _, response in self.examples])
            apart = ((found - self.logps).abs() / tokens).max()
            exact = recipe.engine.precision == "fp32" and recipe.model.quantization is None
            if not apart <= TOLERANCE["fp32" if exact else "bf16"]:  # nor where it is nan
                raise RuntimeError(
                    f"the written model is not the trained one: its log-probs differ by up to {float(apart):.3g} nats a "
                    "token, and it was not kept; the newest checkpoint has what was trained"
                )

        return same


def make_export_verification(stepper: Stepper, train: ExampleSet) -> ExportVerification:
    """What the engine says of the shortest training examples. All ranks must call it."""
    few = train.examples.select(np.argsort(train.examples.lengths, kind="stable")[:COMPARED])
    order = SequentialPlan(few.lengths, len(few))
    share = RankShard(stepper.layout, dist.rank(), trains=False, scores=True)
    # no reward is asked for, so no reference either
    (chosen,) = parts(StepLoader(ExampleSet(few, np.zeros(len(few), np.float32)), order, share), order.parts)
    return ExportVerification(few.ids(order.order), stepper.score(chosen).logps)


def logps_of(source: ModelSource, examples: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """Log-probs [n] under a model that is read anew, on the CPU."""
    model = source.load().eval()
    head = LogProbHead(model)
    found = []
    with torch.inference_mode():
        for example in examples:
            inputs = collate([example])
            head.set_targets(inputs.rows, inputs.columns, inputs.targets)
            found.append(inputs.per_example(model(**inputs.arguments()).logits, 1))
    return torch.cat(found).float()
