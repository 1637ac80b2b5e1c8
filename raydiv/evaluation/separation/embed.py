"""Embedding: the hidden states that represent a prompt, and an actor pool that computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raydiv.config.cluster import ClusterConfig
from raydiv.config.recipe import SeparationConfig
from raydiv.data.batching import micro_batches
from raydiv.data.prompt_sets import Prompt
from raydiv.model.chat import Ids
from raydiv.model.collate import ModelInputs, collate
from raydiv.model.compatibility import PROBE_EXAMPLES
from raydiv.model.load import ModelSource
from raydiv.model.packing import Packing, packing_of
from raydiv.runtime.model_pool import map_rows_unordered
from raydiv.utils.errors import UserError

TOKENS_PER_FORWARD = 4096
"""Tokens of a forward; changes speed and memory alone."""

PROMPTS_PER_CALL = 256
"""Largest batch of prompts that an actor gets."""


@dataclass(frozen=True, slots=True)
class Readout:
    """Which hidden states of the templated user turn, without generation prompt, represent a prompt.

    ``layers``: 0 is the embeddings, k the output of the k-th block, the last after the final norm; -1 counts from the
    end; None is all layers. ``pooling``: the last token (with the last layer, the papers' choice), or the mean of all
    tokens.
    """

    layers: tuple[int, ...] | None = (-1,)
    pooling: Literal["last", "mean"] = "last"

    @classmethod
    def from_config(cls, section: SeparationConfig) -> Readout:
        """The readout of a recipe's section."""
        return cls(None if section.layers == "all" else tuple(section.layers), section.pooling)

    def layer_indices(self, blocks: int) -> list[int]:
        """Sorted indices of the layers, 0 to ``blocks``. Raises UserError for a layer that the model does not have."""
        layers = range(blocks + 1) if self.layers is None else self.layers
        for layer in layers:
            if not -blocks - 1 <= layer <= blocks:
                raise UserError(f"layers: {layer}: the model has layers 0 to {blocks} (or -1, -2, ...)")
        return sorted({layer % (blocks + 1) for layer in layers})


MIN_SAMPLE_PER_CLASS = 10
"""Smallest number of prompts of a class in a sample, where there are as many."""


def distinct_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The ``prompts`` without repetitions, the first of each text and label.

    A repeated prompt is no further evidence: it would make distances larger, and a probe would be tested on prompts
    that it was trained on.
    """
    first: dict[tuple[str, bool], Prompt] = {}
    for prompt in prompts:
        first.setdefault((repr(prompt.text), prompt.harmful), prompt)
    return list(first.values())


def sample_prompts(harmful: np.ndarray, sample: int) -> list[int]:
    """Sorted positions of about ``sample`` of the prompts with labels ``harmful`` [n], drawn with a fixed seed.

    Stratified by class, with at least MIN_SAMPLE_PER_CLASS of each.
    """
    if len(harmful) <= sample:
        return list(range(len(harmful)))
    generator, chosen = np.random.default_rng(0), []
    for label in (True, False):
        positions = np.flatnonzero(harmful == label)
        count = max(round(sample * len(positions) / len(harmful)), min(MIN_SAMPLE_PER_CLASS, len(positions)))
        chosen += generator.choice(positions, count, replace=False).tolist()
    return sorted(chosen)


PromptState = tuple[int, np.ndarray, int]
"""A prompt's position, its states [layers, d] in fp32, and its length in tokens."""


def collate_prompts(prompts: Sequence[Ids], packing: Packing) -> ModelInputs:
    """Inputs with one scored position per prompt: that before its last token."""
    return collate([(ids[:-1], ids[-1:]) for ids in prompts], packing)


def pool_states(states: Sequence[Tensor], inputs: ModelInputs, lengths: Sequence[int], pooling: str) -> Tensor:
    """One state per prompt, [m, layers, d] in fp32, from each layer's ``states`` of ``inputs``."""
    last = inputs.columns + 1
    if pooling == "last":
        return torch.stack([layer[inputs.rows, last].float() for layer in states], dim=1)
    counts = torch.as_tensor(lengths, device=last.device)
    prompt = torch.repeat_interleave(torch.arange(len(lengths), device=last.device), counts)
    within = torch.arange(len(prompt), device=last.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rows, columns = inputs.rows[prompt], (last - counts + 1)[prompt] + within
    sums = [
        layer.new_zeros((len(lengths), layer.shape[-1]), dtype=torch.float32).index_add(
            0, prompt, layer[rows, columns].float()
        )
        for layer in states
    ]
    return torch.stack(sums, dim=1) / counts[:, None, None]


def embed(
    model: ModelSource, prompts: Sequence[Prompt], cluster: ClusterConfig, readout: Readout
) -> Iterator[PromptState]:
    """Yield the states of prompts as an actor pool computes them; needs a Ray session."""
    rows = [{"prompt": prompt.text} for prompt in prompts]
    for position, result in map_rows_unordered(
        rows,
        Embedder,
        {"model": model, "readout": readout},
        cluster=cluster,
        batch_rows=max(1, min(PROMPTS_PER_CALL, len(rows) // 8)),
        length=lambda row: len(str(row["prompt"])),
    ):
        yield position, result["hidden"], result["length"]


class Embedder:
    """Actor that embeds prompts."""

    def __init__(self, model: ModelSource, readout: Readout) -> None:
        self._chat = model.chat()
        self._decoder = model.load_for_inference().base_model
        self._blocks = self._decoder.config.get_text_config().num_hidden_layers
        self._layers, self._pooling = readout.layer_indices(self._blocks), readout.pooling
        self._may_pack = self._supports_packing()

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``prompt`` -> ``hidden`` [layers, d] and ``length`` in tokens."""
        ids = [self._chat.prompt_ids(row["prompt"], generation=False) for row in rows]
        lengths = [len(prompt_ids) for prompt_ids in ids]
        hidden: list[np.ndarray] = [np.empty(0)] * len(rows)
        packing = packing_of(self._decoder, max(lengths, default=0))[0] if self._may_pack else "none"
        for micro_batch in micro_batches(lengths, TOKENS_PER_FORWARD, ranks=1, packed=packing != "none")[0]:
            states = self._read([ids[position] for position in micro_batch], packing)
            for position, state in zip(micro_batch, states.cpu().numpy(), strict=True):
                hidden[position] = state
        return [{"hidden": state, "length": length} for state, length in zip(hidden, lengths, strict=True)]

    def _read(self, ids: Sequence[Ids], packing: Packing) -> Tensor:
        inputs = collate_prompts(ids, packing).to(self._decoder.device)
        with torch.inference_mode():
            if self._layers == [self._blocks]:
                states = [self._decoder(**inputs.forward_kwargs()).last_hidden_state]
            else:
                all_states = self._decoder(**inputs.forward_kwargs(), output_hidden_states=True).hidden_states
                states = [all_states[layer] for layer in self._layers]
        return pool_states(states, inputs, [len(prompt_ids) for prompt_ids in ids], self._pooling)

    def _supports_packing(self) -> bool:
        """Whether packed prompts get the same states as padded ones, checked by forwards of a few tokens."""
        examples = [[*prompt, *response] for prompt, response in PROBE_EXAMPLES]
        packing = packing_of(self._decoder, max(map(len, examples)))[0]
        if packing == "none":
            return False
        padded, packed = self._read(examples, "none"), self._read(examples, packing)
        half = self._decoder.dtype != torch.float32
        return torch.allclose(packed, padded, rtol=1e-3, atol=(0.05 if half else 1e-4) * float(padded.abs().max()))
