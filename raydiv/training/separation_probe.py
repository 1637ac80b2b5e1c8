"""Separation of prompts in the policy during training; each rank reads a share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raydiv.config import Recipe
from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.separation.embed import Readout, collate_prompts, distinct_prompts, pool_states, sample_prompts
from raydiv.evaluation.separation.metrics import metric_values, separation_metrics
from raydiv.model.chat import Chat, Ids
from raydiv.model.collate import ModelInputs, collate
from raydiv.runs.directory import RunDirectory
from raydiv.training.metrics import finite, log_metrics
from raydiv.training.schedule import is_due
from raydiv.training.state import TrainState
from raydiv.training.step import Stepper, gather_examples
from raydiv.utils import distributed as dist


@dataclass(frozen=True, slots=True)
class SeparationProbe:
    """Token ids and labels [n] of prompts that are not trained on, and which of their hidden states are compared."""

    ids: list[list[int]]
    harmful: np.ndarray
    readout: Readout

    @classmethod
    def of(cls, recipe: Recipe, chat: Chat, prompts: Sequence[Prompt]) -> SeparationProbe | None:
        """A sample of the recipe's separation ``prompts``; None where separation is not measured during training."""
        section = recipe.separation
        if section.every is None:
            return None
        prompts = distinct_prompts(prompts)
        harmful = np.array([prompt.harmful for prompt in prompts])
        sample = sample_prompts(harmful, section.sample)
        ids = [chat.prompt_ids(prompts[position].text, generation=False) for position in sample]
        return cls(ids, harmful[sample], Readout.from_config(section))


@dataclass(frozen=True, slots=True)
class SeparationMeasurement:
    """Measures separation every so many steps; without a ``probe`` it does nothing. All ranks must call its methods."""

    run: RunDirectory
    stepper: Stepper
    probe: SeparationProbe | None
    every: int | None

    def after_step(self, step: int, state: TrainState) -> dict[str, float]:
        """Log and return ``separation/*`` where it is due after ``step``, on rank 0; empty elsewhere.

        The end of training needs none: the written model is measured then.
        """
        if self.probe is None or state.end_reason is not None or not is_due(self.every, step):
            return {}
        self.stepper.timer.enter("separation")
        metrics = policy_separation(self.stepper, self.probe)
        log_metrics(self.run, {"step": step, **metrics})
        return metrics


def policy_separation(stepper: Stepper, probe: SeparationProbe) -> dict[str, float]:
    """``separation/*`` of the policy in the last of the layers that the recipe names, on rank 0; empty on the others.

    All ranks must call it.
    """
    lengths, model = [len(ids) for ids in probe.ids], stepper.engine.model
    model.eval()
    layer = probe.readout.layer_indices(model.config.get_text_config().num_hidden_layers)[-1]
    micro_batches = stepper.layout.scoring(lengths)[dist.rank()]
    states = [
        _pooled_states(stepper, [probe.ids[position] for position in micro_batch], layer, probe.readout.pooling)
        for micro_batch in micro_batches
    ]
    points = gather_examples(len(lengths), micro_batches, states, stepper.engine.device).numpy().astype(np.float64)
    if dist.rank():
        return {}
    return finite(metric_values(separation_metrics(points, probe.harmful, np.array(lengths), resampled=False)))


def _pooled_states(stepper: Stepper, prompts: Sequence[Ids], layer: int, pooling: str) -> torch.Tensor:
    """States [m, d] of m prompts; without any, a dummy forward keeps this rank in step with the others."""
    inputs: ModelInputs = (collate_prompts(prompts, stepper.packing) if prompts else collate([])).to(
        stepper.engine.device
    )
    model, head_inputs = stepper.engine.model, []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
    last = layer == model.config.get_text_config().num_hidden_layers
    stepper.timer.advance()
    try:
        with torch.no_grad():
            # the head scores one position a prompt; without targets it would make all logits
            stepper.head.set_targets(inputs.rows, inputs.columns, inputs.targets)
            output = stepper.engine(**inputs.forward_kwargs(), **({} if last else {"output_hidden_states": True}))
    finally:
        hook.remove()
    states: torch.Tensor = head_inputs[0] if last else output.hidden_states[layer]
    if not prompts:
        return states[:0, 0]
    return pool_states([states], inputs, [len(ids) for ids in prompts], pooling)[:, 0]
