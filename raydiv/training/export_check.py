"""Verification of an export: the written model gives the trained one's log-probs on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raydiv.config import Recipe
from raydiv.data.batching import SequentialPlan
from raydiv.model.chat import Ids
from raydiv.model.collate import collate
from raydiv.model.head import LogProbHead
from raydiv.model.load import ModelSource
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader
from raydiv.training.step import Stepper
from raydiv.utils import distributed as dist

VERIFIED_EXAMPLES = 4

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Nats a token: the written model is read on a CPU, whose kernels round differently."""


@dataclass(frozen=True, slots=True)
class ExportVerification:
    """Examples as token ids, and the log-prob [n] that the trained engine gives each."""

    examples: Sequence[tuple[Ids, Ids]]
    logps: Tensor

    def check(self, recipe: Recipe) -> Callable[[Path], None]:
        """A check of a model directory, which raises RuntimeError where it holds another model."""

        def check_directory(directory: Path) -> None:
            logps = logps_of(ModelSource.from_recipe(recipe, directory), self.examples)
            tokens = torch.tensor([len(response) for _, response in self.examples])
            difference = ((logps - self.logps).abs() / tokens).max()
            exact = recipe.engine.precision == "fp32" and recipe.model.quantization is None
            if not difference <= TOLERANCE["fp32" if exact else "bf16"]:  # also where it is NaN
                raise RuntimeError(
                    f"the written model is not the trained one: its log-probs differ by up to {float(difference):.3g} "
                    "nats a token. It was removed; the newest checkpoint holds the trained weights"
                )

        return check_directory


def make_export_verification(stepper: Stepper, train: ExampleSet) -> ExportVerification:
    """The engine's log-probs of the shortest training examples. All ranks must call it."""
    shortest = train.examples.select(np.argsort(train.examples.lengths, kind="stable")[:VERIFIED_EXAMPLES])
    plan = SequentialPlan(shortest.lengths, len(shortest))
    shard = RankShard(stepper.layout, dist.rank(), trains=False, scores=True)
    # the log-probs alone are used, so any reference does
    loader = StepLoader(ExampleSet(shortest, np.zeros(len(shortest), np.float32)), plan, shard)
    return ExportVerification(shortest.ids(plan.order), stepper.score(loader.read(0)).logps)


def logps_of(source: ModelSource, examples: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """Log-probs [n] under a model that is loaded from its files, on the CPU."""
    model = source.load().eval()
    head = LogProbHead(model)
    logps = []
    with torch.inference_mode():
        for example in examples:
            inputs = collate([example])
            head.set_targets(inputs.rows, inputs.columns, inputs.targets)
            logps.append(inputs.sum_per_example(model(**inputs.forward_kwargs()).logits, 1))
    return torch.cat(logps).float()
