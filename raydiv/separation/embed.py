"""Hidden states of prompts, by a Ray Data pool of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config.recipe import Cluster
from raydiv.data.prompts import Prompt
from raydiv.model.chat import Chat
from raydiv.pool import Progress, map_rows, unwatched


def embed(
    directory: Path,
    prompts: Sequence[Prompt],
    *,
    cluster: Cluster,
    template: str | None = None,
    progress: Progress = unwatched,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [n, d] (fp64) and token lengths [n] of the prompts.

    The papers' choice: last layer, last token of the templated user turn, without the generation prompt.
    """
    chat = Chat(directory, template)
    ids = [chat.prompt(prompt.text, generation=False) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    rows = map_rows(
        [{"ids": ids[row]} for row in order], Embedder, {"directory": str(directory)},
        cluster=cluster, batch_rows=25, progress=progress,
    )  # fmt: skip
    hidden = np.empty((len(ids), len(rows[0]["hidden"])))
    for row, result in zip(order, rows, strict=True):
        hidden[row] = result["hidden"]
    return hidden, np.array([len(one) for one in ids], dtype=np.int64)


class Embedder:
    """A model that returns last-layer states."""

    def __init__(self, directory: str) -> None:
        import torch

        from raydiv.model.load import load_model, quiet

        quiet()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._decoder = load_model(Path(directory), torch.float32).base_model.to(self._device).eval()

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``ids`` -> ``hidden`` [d], of the last token."""
        import torch

        from raydiv.model.collate import collate

        # the last token as a one-token response: its position is then the only scored one
        inputs = collate([(row["ids"], [0]) for row in rows]).to(self._device)
        with torch.inference_mode():
            states = self._decoder(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False).last_hidden_state
        return [{"hidden": state} for state in states[inputs.rows, inputs.columns].float().cpu().numpy()]
