"""What a model is asked before it is used: that the head gives its log-probs, and that it keeps packed examples apart.

Both compare a forward of a few tokens with the plain way, on the very model in the very engine: an architecture that does more
than is known of it is refused, or served the plain way, rather than trained wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raydiv.errors import UserError
from raydiv.model.collate import Inputs, collate
from raydiv.model.head import LogProbHead
from raydiv.model.packing import Packing, packing_of

EXAMPLES = (([3, 4, 5, 6], [7, 8, 9, 10]), ([11], [12, 13]), ([14, 15, 16], [3, 17, 4, 18, 5, 19, 6, 20, 7]))
"""(prompt ids, response ids) that every vocabulary has."""


class Probe:
    """Forwards of ``head``'s model as ``forward`` (the model itself, or its engine) makes them, in evaluation mode."""

    def __init__(self, head: LogProbHead, model: Any, forward: Callable[..., Any], device: torch.device) -> None:
        self._head, self._model, self._forward, self._device = head, model, forward, device

    def require_known_logits(self) -> None:
        """Raises UserError for an architecture that does more to its logits than LogitRule knows."""
        inputs = collate(EXAMPLES[:1]).to(self._device)
        with self._evaluating():
            self._head.remove()
            logits = self._forward(**inputs.arguments()).logits
            self._head.install()
            own = logits.float().log_softmax(-1)[inputs.rows, inputs.columns, inputs.targets]
            found = self._scores(inputs)
        if not self._close(found, own):
            raise UserError(
                f"model.id: {type(self._model.config.get_text_config()).__name__.removesuffix('Config')} models treat their "
                f"logits in a way that raydiv does not know (log-probs differ by up to {float((found - own).abs().max()):.2g})"
            )

    def packing(self, longest: int) -> tuple[Packing, str]:
        """How the model takes examples of up to ``longest`` tokens, and why not packed where it is not."""
        packing, why = packing_of(self._model, longest)
        if packing == "none":
            return packing, why
        with self._evaluating():
            alone = torch.cat([self._scores(collate([example]).to(self._device)) for example in EXAMPLES])
            together = self._scores(collate(EXAMPLES, packing).to(self._device))
        if not self._close(together, alone):
            return "none", f"packed log-probs differ by up to {float((together - alone).abs().max()):.2g}"
        return packing, ""

    def _scores(self, inputs: Inputs) -> Tensor:
        self._head.aim(inputs.rows, inputs.columns, inputs.targets)
        return self._forward(**inputs.arguments()).logits  # type: ignore[no-any-return]

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        half = next(self._model.parameters()).dtype != torch.float32
        return torch.allclose(found, expected, rtol=1e-3, atol=0.25 if half else 1e-3)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._model.train(training)
