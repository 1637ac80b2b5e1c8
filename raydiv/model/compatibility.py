"""Checks of a model before its use: the head gives the log-probs of its logits, and packed examples do not see each
other.

Both compare forwards of a few tokens on the model itself, in its engine. An architecture that the head does not support
is refused, and one that cannot be packed is padded, rather than trained wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydiv.model.collate import ModelInputs, collate
from raydiv.model.head import LogProbHead
from raydiv.model.packing import Packing, packing_of
from raydiv.utils import distributed as dist
from raydiv.utils.cache import cache_dir, cached_text, code_digest, digest
from raydiv.utils.compat import attention_implementation
from raydiv.utils.errors import UserError

PROBE_EXAMPLES = (([3, 4, 5, 6], [7, 8, 9, 10]), ([11], [12, 13]), ([14, 15, 16], [3, 17, 4, 18, 5, 19, 6, 20, 7]))
"""(prompt ids, response ids), in the range of every vocabulary."""


class CompatibilityCheck:
    """Check forwards of the model under ``head`` by ``forward`` (the model itself, or its engine), in evaluation mode.

    Results are cached on disk, because a model's first forwards take seconds under ZeRO-3.
    """

    def __init__(self, head: LogProbHead, model: Any, forward: Callable[..., Any], device: torch.device) -> None:
        self._head, self._model, self._forward, self._device = head, model, forward, device

    def require_supported_logits(self) -> None:
        """Raises UserError for an architecture whose logits LogitRule does not reproduce."""
        with self._eval_mode():
            self._require_equal(self._expected_logps())

    def packing(self, max_length: int) -> tuple[Packing, str]:
        """The packing that the model supports for examples of up to ``max_length`` tokens, and the reason where it is
        none.

        Raises UserError as ``require_supported_logits`` does.
        """
        cache_file = self._cache_file(max_length)
        if cache_file is None:
            return self._check_packing(max_length)
        if dist.max_over_ranks(float(not cache_file.exists())):  # all ranks must run the same forwards
            result = self._check_packing(max_length)
            cached_text(cache_file, lambda: json.dumps(result))
        packing, reason = json.loads(cache_file.read_text())
        return packing, reason

    def _cache_file(self, max_length: int) -> Path | None:
        """The cache file of models like this one; None for a model with code of its own, which may change."""
        config = self._model.config.to_dict()
        if config.get("auto_map"):
            return None
        settings = (config, attention_implementation(self._model.config.get_text_config()), max_length)
        execution = (type(self._model).__name__, str(next(self._model.parameters()).dtype), self._device.type)
        return cache_dir("probes") / digest(settings, execution, code_digest("model"))

    def _check_packing(self, max_length: int) -> tuple[Packing, str]:
        packing, reason = packing_of(self._model, max_length)
        with self._eval_mode():
            expected = self._expected_logps()
            if packing != "none":
                packed = self._head_logps(collate(PROBE_EXAMPLES, packing))
                if self._close(packed, expected):
                    return packing, ""
                reason = f"packed log-probs differ by up to {_max_difference(packed, expected)}"
            self._require_equal(expected)
        return "none", reason

    def _expected_logps(self) -> Tensor:
        """Log-probs of the probe examples by the model's own logits."""
        inputs = collate(PROBE_EXAMPLES).to(self._device)
        self._head.remove()
        logits = self._forward(**inputs.forward_kwargs()).logits
        self._head.install()
        return logits[inputs.rows, inputs.columns].float().log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)  # type: ignore[no-any-return]

    def _require_equal(self, expected: Tensor) -> None:
        logps = self._head_logps(collate(PROBE_EXAMPLES))
        if not self._close(logps, expected):
            kind = type(self._model.config.get_text_config()).__name__.removesuffix("Config")
            raise UserError(
                f"model.id: {kind} models transform their logits in a way that is not supported (log-probs differ by "
                f"up to {_max_difference(logps, expected)})"
            )

    def _head_logps(self, inputs: ModelInputs) -> Tensor:
        inputs = inputs.to(self._device)
        self._head.set_targets(inputs.rows, inputs.columns, inputs.targets)
        return self._forward(**inputs.forward_kwargs()).logits  # type: ignore[no-any-return]

    def _close(self, logps: Tensor, expected: Tensor) -> bool:
        half = next(self._model.parameters()).dtype != torch.float32
        return torch.allclose(logps, expected, rtol=1e-3, atol=0.25 if half else 1e-3)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._model.train(training)


def _max_difference(logps: Tensor, expected: Tensor) -> str:
    return f"{float((logps - expected).abs().max()):.2g}"
