"""Separation of prompts in the policy as it is being trained: every rank reads its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raydiv.config import Recipe
from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.separation.embed import Readout, collate_prompts, pool_states, sample_prompts
from raydiv.evaluation.separation.metrics import as_row, separation_of
from raydiv.model.chat import Chat
from raydiv.model.collate import Ids, ModelInputs, collate
from raydiv.training.step import Stepper, gathered
from raydiv.utils import distributed as dist


@dataclass(frozen=True, slots=True)
class SeparationProbe:
    """Token ids and labels [n] of prompts that are not trained on, and which hidden states of theirs are compared."""

    ids: list[list[int]]
    harmful: np.ndarray
    readout: Readout

    @classmethod
    def of(cls, recipe: Recipe, chat: Chat, prompts: Sequence[Prompt]) -> SeparationProbe | None:
        """The recipe's separation ``prompts`` (a sample of many), where they are measured during training."""
        section = recipe.separation
        if section.every is None:
            return None
        harmful = np.array([prompt.harmful for prompt in prompts])
        chosen = sample_prompts(harmful, section.sample)
        ids = [chat.prompt(prompts[position].text, generation=False) for position in chosen]
        return cls(ids, harmful[chosen], Readout.of(section))


def policy_separation(stepper: Stepper, anchors: SeparationProbe) -> dict[str, float]:
    """``separation/*`` of the policy in the last of the layers that the recipe names.

    All ranks must call it; rank 0 has the figures.
    """
    lengths, model = [len(ids) for ids in anchors.ids], stepper.engine.model
    model.eval()
    layer = anchors.readout.layer_indices(model.config.get_text_config().num_hidden_layers)[-1]
    mine = stepper.layout.scoring(lengths)[dist.rank()]
    prompts = [[anchors.ids[position] for position in micro_batch] for micro_batch in mine]
    states = [_states(stepper, own, layer, anchors.readout.pooling) for own in prompts]
    points = gathered(len(lengths), mine, states, stepper.engine.device).numpy().astype(np.float64)
    if dist.rank():
        return {}
    return as_row(separation_of(points, anchors.harmful, np.array(lengths), resampled=False))


def _states(stepper: Stepper, prompts: Sequence[Ids], layer: int, pooling: str) -> torch.Tensor:
    """States [m, d] of prompts; without any, what a rank without a share forwards to keep step with the others."""
    inputs: ModelInputs = (collate_prompts(prompts, stepper.packing) if prompts else collate([])).to(
        stepper.engine.device
    )
    model, head_input = stepper.engine.model, []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: head_input.append(given[0]))
    last = layer == model.config.get_text_config().num_hidden_layers
    stepper.phases.advance()
    try:
        with torch.no_grad():
            # one position each for the head, which would make all logits otherwise
            stepper.head.set_targets(inputs.rows, inputs.columns, inputs.targets)
            output = stepper.engine(**inputs.arguments(), **({} if last else {"output_hidden_states": True}))
    finally:
        hook.remove()
    states: torch.Tensor = head_input[0] if last else output.hidden_states[layer]
    if not prompts:
        return states[:0, 0]
    return pool_states([states], inputs, [len(ids) for ids in prompts], pooling)[:, 0]
