"""Response log-probs straight from hidden states: the logits of a batch are never held in memory.

``LogProbHead`` takes the place of ``lm_head.forward``. Before a forward it is told which positions are scored and
what token each predicts; in place of logits it returns their log-probs, computed chunk by chunk. Because the module
stays where it was, ZeRO-3's hooks still gather its weight.

What an architecture does to its logits after the projection (bias, scale, soft-capping) is known to ``LogitRule`` and to
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raydiv.utils.errors import UserError

CHUNK_BYTES = 128 * 2**20
"""fp32 logits that are held at a time, such as 516 positions x 65,024 tokens: more are no faster on CPU, half are 4% slower."""


def chunk_tokens(vocabulary: int) -> int:
    """Positions whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


KEPT_CHUNKS = 4
"""Chunks whose softmax is kept where the coefficients come after the forward: else a fourth product of the size of logits is
due (a KLDO step of 1,600 response tokens x 65,024 then takes a fifth longer)."""


def buffer_bytes(vocabulary: int, positions: int, later: bool) -> int:
    """What the head holds for logits of that many positions; ``later``: their coefficients come after the forward."""
    return 4 * vocabulary * _buffer_rows(vocabulary, positions, later)


def _buffer_rows(vocabulary: int, positions: int, later: bool) -> int:
    return min(positions, (KEPT_CHUNKS if later else 1) * chunk_tokens(vocabulary))


_NEUTRAL_VALUES = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Config keys that say what happens to logits, and the value at which nothing happens."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """logits = cap * tanh(scale * (W h + b) / cap); no cap: scale * (W h + b)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> LogitRule:
        """The rule that a model's config states."""
        return cls(
            scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            cap=getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits in the place of ``W h + b`` (fp32), and d logits / d raw where it is not simply ``scale``."""
        if self.cap is None:
            return raw.mul_(self.scale) if self.scale != 1.0 else raw, None
        squashed = raw.mul_(self.scale / self.cap).tanh_()
        return self.cap * squashed, squashed.square_().neg_().add_(1).mul_(self.scale)


CoefficientFn = Callable[[slice, Tensor], Tensor]
"""From a run of scored positions and their log-probs [p] to the coefficients [p] of these."""


@dataclass(slots=True)
class _Projection:
    """The tensors of one call: hidden [t, d], weight [v, d], bias [v] or None, targets [t].

    Logits of a chunk of positions are written into ``buffer`` [chunk, v], used again for the next: fresh memory for each would
    cost as much as the products.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rule: LogitRule
    buffer: Tensor

    def chunks(self, part: slice) -> list[slice]:
        """``part`` of the positions, in pieces that the buffer holds."""
        size = len(self.buffer)
        return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]

    def logits(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """fp32 logits [p, v] of a piece, in the buffer where the rule allows, with their slope (see LogitRule)."""
        hidden, raw = self.hidden[part], self.buffer[: part.stop - part.start]
        if self.weight.dtype != torch.float32:
            raw.copy_(nn.functional.linear(hidden, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden, self.weight.T, out=raw)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=raw)
        return self.rule(raw)

    def logps(self, part: slice) -> Tensor:
        """Log-probs [p] of positions, fp32."""
        return torch.cat([self.score_chunk(piece).logps for piece in self.chunks(part)])

    def score_chunk(self, part: slice) -> _ChunkScores:
        """A piece that the buffer holds."""
        logits, slope = self.logits(part)
        chosen, largest = logits.gather(1, self.targets[part, None]).squeeze(1), logits.amax(-1)
        exp_logits = logits.sub_(largest[:, None]).exp_()
        exp_sums = exp_logits.sum(-1)
        return _ChunkScores(chosen - largest - exp_sums.log(), exp_logits, exp_sums, slope)


class _ChunkScores(NamedTuple):
    """Log-probs [p] of a piece, and its softmax as exp_logits [p, v] over exp_sums [p], with the slope of its logits."""

    logps: Tensor
    exp_logits: Tensor
    exp_sums: Tensor
    slope: Tensor | None


class _Gradients:
    """Gradients of sum_t coefficients_t * logp_t by hidden, weight and bias, gathered piece by piece."""

    def __init__(self, projection: _Projection) -> None:
        self._of = projection
        weight, bias = projection.weight, projection.bias
        self._hidden = torch.empty_like(projection.hidden)
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        self._bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None

    def add(self, part: slice, piece: _ChunkScores, coefficients: Tensor) -> None:
        """Take in a piece, which is overwritten."""
        of = self._of
        # d logp / d logits = onehot(target) - softmax
        grad = piece.exp_logits.mul_((-coefficients / piece.exp_sums)[:, None])
        grad.scatter_add_(1, of.targets[part, None], coefficients[:, None])
        if piece.slope is not None:
            grad.mul_(piece.slope)
        elif of.rule.scale != 1.0:
            grad.mul_(of.rule.scale)
        low = grad.to(of.weight.dtype)
        torch.mm(low, of.weight, out=self._hidden[part])
        if self._weight is not None and low is grad:
            self._weight.addmm_(grad.T, of.hidden[part])
        elif self._weight is not None:
            self._weight.add_(low.T @ of.hidden[part])
        if self._bias is not None:
            self._bias.add_(grad.sum(0))

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """By hidden [t, d], weight [v, d] and bias [v], in the types of these."""
        of = self._of
        weight = None if self._weight is None else self._weight.to(of.weight.dtype)
        bias = None if self._bias is None or of.bias is None else self._bias.to(of.bias.dtype)
        return self._hidden, weight, bias


class _Score(torch.autograd.Function):
    """Log-probs [t] for when the coefficients come later: the backward makes the logits again, but for what is in the buffer.

    Where weight and bias are frozen nothing is made again: d logp_t / d hidden_t, found on the way, serves any coefficient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        buffer: Tensor,
    ) -> Tensor:
        projection = _Projection(hidden, weight, bias, targets, rule, buffer)
        ctx.frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if ctx.frozen:
            logps, gradients = _score_and_differentiate(projection, lambda part, logps: torch.ones_like(logps), ())
            ctx.save_for_backward(gradients.result()[0])
            return logps
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.pieces = projection.chunks(slice(0, len(targets)))
        scored = [projection.score_chunk(piece) for piece in ctx.pieces]
        # another forward before the backward would write over what is kept, which its version tells
        ctx.rule, ctx.buffer, ctx.last, ctx.version = rule, buffer, scored[-1], buffer._version
        return torch.cat([piece.logps for piece in scored])

    @staticmethod
    def backward(ctx: Any, *grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        (coefficients,) = grad_logps
        if ctx.frozen:
            (by_hidden,) = ctx.saved_tensors
            return by_hidden * coefficients[:, None].to(by_hidden.dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        projection = _Projection(hidden, weight, bias, targets, ctx.rule, ctx.buffer)
        gradients = _Gradients(projection)
        kept = ctx.last if ctx.buffer._version == ctx.version else None
        for piece in reversed(ctx.pieces):
            gradients.add(piece, kept or projection.score_chunk(piece), coefficients[piece])
            kept = None
        return *gradients.result(), None, None, None


class _Push(torch.autograd.Function):
    """sum_t coefficients_t * logp_t with all gradients made in the forward: each piece of logits is made once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        buffer: Tensor,
        weigh: CoefficientFn,
        runs: Sequence[int],
    ) -> Tensor:
        seen: list[Tensor] = []

        def noted(part: slice, logps: Tensor) -> Tensor:
            coefficients = weigh(part, logps)
            seen.append((coefficients * logps).sum())
            return coefficients

        _, gradients = _score_and_differentiate(_Projection(hidden, weight, bias, targets, rule, buffer), noted, runs)
        ctx.gradients = gradients.result()
        return torch.stack(seen).sum()

    @staticmethod
    def backward(ctx: Any, *grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # in place: the weight's is as large as the weight
        grads = (None if grad is None else grad.mul_(grad_total[0].to(grad.dtype)) for grad in ctx.gradients)
        return *grads, None, None, None, None, None


def _score_and_differentiate(
    projection: _Projection, weigh: CoefficientFn, runs: Sequence[int]
) -> tuple[Tensor, _Gradients]:
    """Log-probs [t] and gradients. Coefficients are asked for once a run of ``runs`` positions is scored (or a piece, without).

    As many whole runs as the buffer holds are one piece, whose logits are made once; those of a longer run are made twice.
    """
    gradients, logps = _Gradients(projection), []
    for part in _group_spans(runs or [1] * len(projection.targets), len(projection.buffer)):
        pieces = projection.chunks(part)
        whole = projection.score_chunk(part) if len(pieces) == 1 else None
        logps.append(projection.logps(part) if whole is None else whole.logps)
        coefficients = weigh(part, logps[-1])
        for piece in pieces:
            own = coefficients[piece.start - part.start : piece.stop - part.start]
            gradients.add(piece, whole or projection.score_chunk(piece), own)
    return torch.cat(logps), gradients


def _group_spans(runs: Sequence[int], size: int) -> list[slice]:
    """Consecutive runs together as long as they are at most ``size`` positions."""
    found, start, stop = [], 0, 0
    for run in runs:
        if stop > start and stop + run - start > size:
            found.append(slice(start, stop))
            start = stop
        stop += run
    return [*found, slice(start, stop)]


class LogProbHead:
    """Replaces the forward of a causal model's output projection; see the module's docstring.

    ::

        head.aim(rows, columns, targets)
        logps = model(ids, attention_mask=mask).logits
    """

    def __init__(self, model: Any) -> None:
        self._module = model.get_output_embeddings()
        if hasattr(self._module, "base_layer"):
            raise UserError("model.lora.target_modules: the output head cannot be adapted; leave it out")
        self._config = model.config.get_text_config()
        self._rule = LogitRule.from_config(self._config)
        self._positions: tuple[Tensor, Tensor] | None = None
        self._buffer: Tensor | None = None
        # some architectures read the rule from their config at each forward, others keep a copy of their own
        owners = [self._config, *(module for module in model.modules() if self._module in module.children())]
        self._config_values = [
            (owner, name, getattr(owner, name))
            for owner in owners
            for name in _NEUTRAL_VALUES
            if getattr(owner, name, None)
        ]
        self.install()

    def install(self) -> None:
        """Take the head's place; the model must not apply its rule a second time, to log-probs."""
        for owner, name, _ in self._config_values:
            setattr(owner, name, _NEUTRAL_VALUES[name])
        self._module.forward = self._forward

    def remove(self) -> None:
        """Give the model its own head and rule back."""
        for owner, name, value in self._config_values:
            setattr(owner, name, value)
        del self._module.forward

    @property
    def allocated_bytes(self) -> int:
        """Of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def set_targets(
        self,
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        weigh: CoefficientFn | None = None,
        runs: Sequence[int] = (),
    ) -> None:
        """Say what the next forward returns in place of logits.

        Position ``(rows[t], columns[t])`` of the batch predicts token ``targets[t]``. Without ``weigh``: the log-probs [t].
        With it: the scalar sum_t coefficients_t * logp_t, for one backward. ``weigh`` is called with the log-probs of a slice
        of the positions, in order, and answers with their coefficients; ``runs`` are the lengths of consecutive positions
        (they sum to t) that it must see together.
        """
        self._positions, self._targets, self._weigh, self._runs = (rows, columns), targets, weigh, runs

    def _forward(self, hidden: Tensor) -> Tensor:
        assert self._positions is not None, "aim() the head before the model's forward"
        selected = hidden[self._positions]
        self._positions = None
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        later = self._weigh is None and torch.is_grad_enabled() and weight.requires_grad
        given = (selected, weight, bias, self._targets, self._rule, self._logit_buffer(selected, len(weight), later))
        if self._weigh is not None:
            return _Push.apply(*given, self._weigh, self._runs)  # type: ignore[no-any-return, no-untyped-call]
        if torch.is_grad_enabled():
            return _Score.apply(*given)  # type: ignore[no-any-return, no-untyped-call]
        return _Projection(*given).logps(slice(0, len(self._targets)))

    def _logit_buffer(self, hidden: Tensor, vocabulary: int, later: bool) -> Tensor:
        """The buffer for logits, kept from forward to forward."""
        rows = _buffer_rows(vocabulary, len(hidden), later)
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = hidden.new_empty((rows, vocabulary), dtype=torch.float32)
        return self._buffer[:rows]
