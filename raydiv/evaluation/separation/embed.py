"""Hidden states of prompts: which ones stand for a prompt, and a Ray Data pool of models that reads them."""

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
from raydiv.runtime.actor_pool import map_rows_unordered
from raydiv.utils.errors import UserError

TOKENS_PER_FORWARD = 4096
"""Tokens that a model reads at once; changes its speed and memory alone."""

PROMPTS_PER_CALL = 256
"""Most prompts that an actor is given at once."""


@dataclass(frozen=True, slots=True)
class Readout:
    """Which hidden states stand for a prompt, of the templated user's turn without the generation prompt.

    ``layers``: 0 is the embeddings, k what the k-th block gives, the last one after the final norm; -1 counts from the end;
    None is all. ``pooling``: the state of the last token (the papers' choice, with the last layer), or the mean of all.
    """

    layers: tuple[int, ...] | None = (-1,)
    pooling: Literal["last", "mean"] = "last"

    @classmethod
    def from_config(cls, section: SeparationConfig) -> Readout:
        """As a recipe has it."""
        return cls(None if section.layers == "all" else tuple(section.layers), section.pooling)

    def layer_indices(self, blocks: int) -> list[int]:
        """The layers, from 0 to ``blocks``, in their order. Raises UserError for one that the model does not have."""
        wanted = range(blocks + 1) if self.layers is None else self.layers
        for layer in wanted:
            if not -blocks - 1 <= layer <= blocks:
                raise UserError(f"layers: {layer} is none of this model's, which are 0 to {blocks} (or -1, -2, ...)")
        return sorted({layer % (blocks + 1) for layer in wanted})


FEWEST = 10
"""Prompts of a class that a sample has at least, where there are as many."""


def sample_prompts(harmful: np.ndarray, sample: int) -> list[int]:
    """Positions of about ``sample`` of the prompts with labels ``harmful`` [n], in order; always the same ones.

    Of each class its share, but never hardly any.
    """
    if len(harmful) <= sample:
        return list(range(len(harmful)))
    generator, chosen = np.random.default_rng(0), []
    for label in (True, False):
        own = np.flatnonzero(harmful == label)
        wanted = max(round(sample * len(own) / len(harmful)), min(FEWEST, len(own)))
        chosen += generator.choice(own, wanted, replace=False).tolist()
    return sorted(chosen)


Read = tuple[int, np.ndarray, int]
"""A prompt's position, its states [layers, d] in fp32, and its tokens."""


def collate_prompts(prompts: Sequence[Ids], packing: Packing) -> ModelInputs:
    """Inputs whose scored positions, one a prompt, come just before its last token."""
    return collate([(ids[:-1], ids[-1:]) for ids in prompts], packing)


def pool_states(states: Sequence[Tensor], inputs: ModelInputs, lengths: Sequence[int], pooling: str) -> Tensor:
    """One state a prompt, [m, layers, d] in fp32, from each layer's ``states`` as ``inputs`` of ``collated`` has them."""
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


def embed(model: ModelSource, prompts: Sequence[Prompt], cluster: ClusterConfig, readout: Readout) -> Iterator[Read]:
    """The states of prompts, as soon as a pool of models has read them; needs a Ray session."""
    rows = [{"prompt": prompt.text} for prompt in prompts]
    for position, found in map_rows_unordered(
        rows,
        Embedder,
        {"model": model, "readout": readout},
        cluster=cluster,
        batch_rows=max(1, min(PROMPTS_PER_CALL, len(rows) // 8)),
        length=lambda row: len(str(row["prompt"])),
    ):
        yield position, found["hidden"], found["length"]


class Embedder:
    """A model that reads prompts."""

    def __init__(self, model: ModelSource, readout: Readout) -> None:
        self._chat = model.chat()
        self._decoder = model.load_for_inference().base_model
        self._blocks = self._decoder.config.get_text_config().num_hidden_layers
        self._layers, self._pooling = readout.layer_indices(self._blocks), readout.pooling
        self._packs = self._keeps_apart()

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``prompt`` -> ``hidden`` [layers, d] and ``length`` in tokens."""
        ids = [self._chat.prompt_ids(row["prompt"], generation=False) for row in rows]
        lengths = [len(one) for one in ids]
        hidden: list[np.ndarray] = [np.empty(0)] * len(rows)
        packing = packing_of(self._decoder, max(lengths, default=0))[0] if self._packs else "none"
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
                found = self._decoder(**inputs.forward_kwargs(), output_hidden_states=True).hidden_states
                states = [found[layer] for layer in self._layers]
        return pool_states(states, inputs, [len(one) for one in ids], self._pooling)

    def _keeps_apart(self) -> bool:
        """Whether this model, tried out, gives packed prompts the states that it gives padded ones."""
        examples = [[*prompt, *response] for prompt, response in PROBE_EXAMPLES]
        packing = packing_of(self._decoder, max(map(len, examples)))[0]
        if packing == "none":
            return False
        padded, packed = self._read(examples, "none"), self._read(examples, packing)
        half = self._decoder.dtype != torch.float32
        return torch.allclose(packed, padded, rtol=1e-3, atol=(0.05 if half else 1e-4) * float(padded.abs().max()))
