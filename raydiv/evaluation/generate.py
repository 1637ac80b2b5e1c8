"""Answers to prompts, by a Ray Data pool of models: greedy, batched, stopped at EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydiv.config.recipe import Cluster
from raydiv.data.prompts import Prompt
from raydiv.model.load import ModelSource
from raydiv.pool import Progress, map_rows, unwatched


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer: text without special tokens, and the token ids of prompt and answer (its EOS included)."""

    text: str
    prompt_ids: list[int]
    ids: list[int]


def generate(
    model: ModelSource, prompts: Sequence[Prompt], max_new_tokens: int, cluster: Cluster, progress: Progress = unwatched
) -> list[Answer]:
    """One greedy answer per prompt, of at most ``max_new_tokens`` tokens."""
    chat = model.chat()
    ids = [chat.prompt(prompt.text) for prompt in prompts]
    rows = [{"ids": one} for one in ids]
    done = map_rows(
        rows,
        Generator,
        {"model": model, "max_new_tokens": max_new_tokens, "eos": chat.tokenizer.eos_token_id},
        cluster=cluster,
        batch_rows=25,
        progress=progress,
        length=lambda row: len(row["ids"]),
    )
    answers = [[int(token) for token in result["answer"]] for result in done]
    return [Answer(chat.decode(answer), prompt, answer) for prompt, answer in zip(ids, answers, strict=True)]


class Generator:
    """A model that answers."""

    def __init__(self, model: ModelSource, max_new_tokens: int, eos: int) -> None:
        self._model = model.serve()
        # a chat model may end its turn with another token than the tokenizer's EOS
        stated = self._model.generation_config.eos_token_id
        self._ends = {eos, *(stated if isinstance(stated, list) else [] if stated is None else [stated])}
        self._limits = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(self._ends), "pad_token_id": eos}

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``ids`` -> ``answer`` ids, up to and including EOS. Padded on the left."""
        import torch

        length = max(len(row["ids"]) for row in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, length - len(row["ids"]) :] = torch.as_tensor(row["ids"])
            mask[number, length - len(row["ids"]) :] = 1
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                **self._limits,
            )
        return [{"answer": self._until_eos(answer)} for answer in output[:, length:].tolist()]

    def _until_eos(self, answer: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(answer) if token in self._ends]
        return answer[: ends[0] + 1] if ends else answer
