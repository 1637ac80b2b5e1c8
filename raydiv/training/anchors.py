"""Separation of prompts in the policy as it is being trained: every rank reads its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raydiv import dist
from raydiv.config import Recipe
from raydiv.data.prompts import read_prompts
from raydiv.hidden.embed import Readout, collated, drawn, pooled
from raydiv.hidden.separation import as_row, separation_of
from raydiv.model.collate import Ids, Inputs, collate
from raydiv.model.load import ModelSource
from raydiv.training.step import Stepper


@dataclass(frozen=True, slots=True)
class Anchors:
    """Token ids and labels [n] of prompts that are not trained on, and which hidden states of theirs are compared."""

    ids: list[list[int]]
    harmful: np.ndarray
    readout: Readout

    @classmethod
    def of(cls, recipe: Recipe, directory: Path) -> Anchors | None:
        """The recipe's separation prompts (a sample of many), where they are measured during training."""
        section = recipe.separation
        if section.every is None or section.prompts is None:
            return None
        prompts = read_prompts(section.prompts, both=True)
        readout = Readout.of(section)
        chat = ModelSource.of(recipe, directory).chat()
        harmful = np.array([prompt.harmful for prompt in prompts])
        chosen = [prompts[position] for position in drawn(harmful, section.sample)]
        ids = [chat.prompt(prompt.text, generation=False) for prompt in chosen]
        return cls(ids, np.array([prompt.harmful for prompt in chosen]), readout)


def policy_separation(stepper: Stepper, anchors: Anchors) -> dict[str, float]:
    """``separation/*`` of the policy in the last of the layers that the recipe names.

    All ranks must call it; rank 0 has the figures.
    """
    lengths = [len(ids) for ids in anchors.ids]
    model = stepper.engine.model
    model.eval()
    layer = anchors.readout.numbers(model.config.get_text_config().num_hidden_layers)[-1]
    found: list[tuple[list[int], torch.Tensor]] = []
    for micro_batch in stepper.layout.scoring(lengths)[dist.rank()]:
        own = [anchors.ids[position] for position in micro_batch]
        states = _states(stepper, own, layer, anchors.readout.pooling)
        found += [(micro_batch, states)] if micro_batch else []
    hidden = torch.zeros((len(lengths), _width(model)), device=stepper.engine.device)
    for positions, states in found:
        hidden[positions] = states
    points = dist.sum_over_ranks(hidden).cpu().numpy().astype(np.float64)
    if dist.rank():
        return {}
    return as_row(separation_of(points, anchors.harmful, np.array(lengths), resampled=False))


def _width(model: torch.nn.Module) -> int:
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def _states(stepper: Stepper, prompts: Sequence[Ids], layer: int, pooling: str) -> torch.Tensor:
    """States [m, d] of prompts; without any, what a rank without a share forwards to keep step with the others."""
    inputs: Inputs = (collated(prompts, stepper.packing) if prompts else collate([])).to(stepper.engine.device)
    model, head_input = stepper.engine.model, []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: head_input.append(given[0]))
    last = layer == model.config.get_text_config().num_hidden_layers
    try:
        with torch.no_grad():
            # one position each for the head, which would make all logits otherwise
            stepper.head.aim(inputs.rows, inputs.columns, inputs.targets)
            output = stepper.engine(**inputs.arguments(), **({} if last else {"output_hidden_states": True}))
    finally:
        hook.remove()
    states: torch.Tensor = head_input[0] if last else output.hidden_states[layer]
    if not prompts:
        return states[:0, 0]
    return pooled([states], inputs, [len(ids) for ids in prompts], pooling)[:, 0]
