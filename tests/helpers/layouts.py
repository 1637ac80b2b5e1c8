"""Training engines in any layout: a ZeRO stage, a precision, adapters or whole weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raydiv.config import Recipe, load_recipe
from raydiv.utils import distributed as dist

LR = 1e-2

CPU = {"offload_optimizer": "cpu"}


@dataclass(frozen=True)
class Layout:
    stage: int
    lora: bool = False
    precision: str = "fp32"
    engine: dict[str, Any] = field(default_factory=dict)
    persistent: int = 0

    def recipe(self, model: Path) -> Recipe:
        return load_recipe(
            {
                "model": {"id": str(model), **({"lora": {"r": 3}} if self.lora else {})},
                "loss": {"type": "dpo"},
                "optim": {"steps": 9, "lr": LR, "weight_decay": 0.1},
                "engine": {"zero_stage": self.stage, "precision": self.precision, **self.engine},
            }
        )

    @property
    def name(self) -> str:
        return repr((self.lora, self.precision)).replace("/", " ")


def make_engine(layout: Layout, model: Path) -> Any:
    import raydiv.training.engine as module
    from raydiv.model.load import DTYPES, build_policy

    module.PERSISTENT_ELEMENTS = layout.persistent
    recipe = layout.recipe(model)
    torch.manual_seed(0 if layout.lora else 1)
    return module.DeepSpeedEngine(recipe, lambda: build_policy(model, recipe.model, DTYPES[recipe.engine.precision]))


def update(engine: Any, number: int) -> float:
    """An update on the same tokens on every rank."""
    torch.manual_seed(number)
    ids = torch.randint(6, 300, (2, 24))
    logits = engine(input_ids=ids).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    engine.backward(loss / dist.world_size(), last=True)
    engine.update(LR / (number + 1))
    return float(loss)
