"""Hidden states of prompts, by a Ray Data pool of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydiv.config.recipe import Cluster
from raydiv.data.prompts import Prompt
from raydiv.model.load import ModelSource
from raydiv.pool import Progress, map_rows, unwatched


def embed(
    model: ModelSource, prompts: Sequence[Prompt], cluster: Cluster, progress: Progress = unwatched
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [n, d] (fp64) and token lengths [n] of the prompts.

    The papers' choice: last layer, last token of the templated user turn, without the generation prompt.
    """
    chat = model.chat()
    ids = [chat.prompt(prompt.text, generation=False) for prompt in prompts]
    rows = [{"ids": one} for one in ids]
    states = map_rows(
        rows,
        Embedder,
        {"model": model},
        cluster=cluster,
        batch_rows=25,
        progress=progress,
        length=lambda row: len(row["ids"]),
    )
    hidden = np.array([state["hidden"] for state in states], dtype=np.float64)
    return hidden, np.array([len(one) for one in ids], dtype=np.int64)


class Embedder:
    """A model that returns last-layer states."""

    def __init__(self, model: ModelSource) -> None:
        self._decoder = model.serve().base_model

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``ids`` -> ``hidden`` [d], of the last token."""
        import torch

        from raydiv.model.collate import collate

        # the last token as a one-token response: its position is then the only scored one
        inputs = collate([(row["ids"], [0]) for row in rows]).to(self._decoder.device)
        with torch.inference_mode():
            states = self._decoder(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False).last_hidden_state
        return [{"hidden": state} for state in states[inputs.rows, inputs.columns].float().cpu().numpy()]
