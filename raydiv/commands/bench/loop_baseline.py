"""The plain PyTorch baseline of a training step: forward, backward and AdamW on the same examples, and nothing else.

A script for a separate process (see `harness`). It does the necessary work of a step on one device: packed
micro-batches of the fastest size, the chunked head with known coefficients, one pass, and the fused optimizer. Without
Ray, DeepSpeed and an objective it shows what the hardware allows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydiv.data.batching import MicroBatch, micro_batches

CANDIDATE_TOKENS = (1024, 2048, 4096, 8192, 16_384, 32_768)
"""Micro-batch sizes in tokens that are tried if a step fills them; the fastest is timed."""


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``seconds`` and ``tokens`` of each step, and ``peak_bytes``."""
    import torch

    from raydiv.training.metrics import peak_memory

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    loop = Loop(settings)
    steps = [step["examples"] for step in settings["steps"]]
    tokens = loop.fastest_micro_batch(steps[0])
    seconds = [loop.seconds(step, tokens) for step in steps]
    counts = [sum(loop.lengths(step)) for step in steps]
    return {"seconds": seconds, "tokens": counts, "peak_bytes": peak_memory()}


class Loop:
    """A model, its head and its optimizer."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch

        from raydiv.config.recipe import ModelConfig
        from raydiv.model.compatibility import CompatibilityCheck
        from raydiv.model.head import LogProbHead
        from raydiv.model.load import DTYPES, build_policy

        model_options = {name: settings[name] for name in ("attention", "trust_remote_code", "lora")}
        section = ModelConfig.model_validate({"id": settings["model"], **model_options})
        self._device = torch.device("cuda" if settings["use_gpu"] else "cpu")
        self._model = build_policy(Path(settings["model"]), section, DTYPES[settings["precision"]]).to(self._device)
        self._head = LogProbHead(self._model)
        self._packing = CompatibilityCheck(self._head, self._model, self._model, self._device).packing(
            settings["max_length"]
        )[0]
        if settings["activation_checkpointing"]:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        options = {name: settings[name] for name in ("lr", "betas", "eps", "weight_decay")}
        self._optimizer = torch.optim.AdamW(self._trained, **options, fused=True)
        self._clip = settings["clip"]
        self._model.train()

    @staticmethod
    def lengths(step: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of each example, prompt and response."""
        return [len(example["prompt_ids"]) + len(example["response_ids"]) for example in step]

    def fastest_micro_batch(self, step: Sequence[Mapping[str, Any]]) -> int:
        """The micro-batch size in tokens with the fastest step; the better of two times counts."""
        total = sum(self.lengths(step))
        candidates = [tokens for tokens in CANDIDATE_TOKENS if tokens < total] + [total]
        return min(candidates, key=lambda tokens: min(self.seconds(step, tokens) for _ in range(2)))

    def seconds(self, step: Sequence[Mapping[str, Any]], tokens: int) -> float:
        """Time of one update on the step's examples."""
        import torch

        started = time.perf_counter()
        (own_micro_batches,) = micro_batches(self.lengths(step), tokens, ranks=1, packed=self._packing != "none")
        for micro_batch in own_micro_batches:
            self._add_gradient(step, micro_batch)
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _add_gradient(self, step: Sequence[Mapping[str, Any]], micro_batch: MicroBatch) -> None:
        """Forward and backward of the aligned minus the unaligned examples' log-probs."""
        import torch

        from raydiv.model.collate import collate

        chosen = [step[position] for position in micro_batch]
        examples = [(example["prompt_ids"], example["response_ids"]) for example in chosen]
        inputs = collate(examples, self._packing).to(self._device)
        signs = torch.tensor(
            [(1.0 if example["aligned"] else -1.0) / len(step) for example in chosen], device=self._device
        )
        weights = signs[inputs.examples]
        self._head.set_targets(inputs.rows, inputs.columns, inputs.targets, lambda part, _: weights[part])
        self._model(**inputs.forward_kwargs()).logits.backward()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
