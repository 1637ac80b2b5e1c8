"""Response log-probs from hidden states, without holding the logits of a batch in memory.

``LogProbHead`` replaces ``lm_head.forward``. Before each forward, ``set_targets`` gives the scored positions and the
token that each predicts; the model then returns log-probs in place of logits, computed chunk by chunk. The module
itself stays in place, so ZeRO-3's hooks still gather its weight.

``LogitRule`` is the only code that knows what an architecture does to its logits after the projection (scale,
soft-capping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raydiv.utils.compat import tensor_version
from raydiv.utils.errors import UserError

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Size of a chunk of fp32 logits by type of device, such as 516 positions x 65,024 tokens.

On a CPU, more is no faster and half is 4% slower. On a GPU each chunk reads and writes the whole gradient of the
weight, so that few large ones are faster.
"""


def chunk_tokens(vocabulary: int, device: str = "cpu") -> int:
    """Positions in a chunk of logits."""
    return max(1, CHUNK_BYTES[device] // (4 * vocabulary))


KEPT_CHUNKS = {"cpu": 4, "cuda": 1}
"""Chunks that the buffer holds where the coefficients come after the forward. The softmax of the last of them is kept
for the backward, which saves a matrix product of the size of the logits (on a CPU, a fifth of a KLDO step of 1,600
response tokens x 65,024).
"""


def buffer_bytes(vocabulary: int, positions: int, deferred: bool, device: str = "cpu") -> int:
    """Bytes of the head's logit buffer for so many positions; ``deferred``: coefficients come after the forward."""
    return 4 * vocabulary * _buffer_rows(vocabulary, positions, deferred, device)


def _buffer_rows(vocabulary: int, positions: int, deferred: bool, device: str) -> int:
    return min(positions, (KEPT_CHUNKS[device] if deferred else 1) * chunk_tokens(vocabulary, device))


_NEUTRAL_VALUES = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Config keys that transform logits, and the value at which each has no effect."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """logits = cap * tanh(scale * (W h + b) / cap); no cap: scale * (W h + b)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> LogitRule:
        """The rule of a model's config."""
        return cls(
            scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            cap=getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits from raw = ``W h + b`` (fp32, overwritten), and d logits / d raw, or None where it is ``scale``
        everywhere.
        """
        if self.cap is None:
            return raw.mul_(self.scale) if self.scale != 1.0 else raw, None
        squashed = raw.mul_(self.scale / self.cap).tanh_()
        return self.cap * squashed, squashed.square_().neg_().add_(1).mul_(self.scale)


CoefficientFn = Callable[[slice, Tensor], Tensor]
"""From a slice of the scored positions and their log-probs [p] to their coefficients [p]."""


@dataclass(slots=True)
class _Projection:
    """The tensors of one call: hidden [t, d], weight [v, d], bias [v] or None, targets [t].

    Each chunk of logits is written into the same ``buffer`` [chunk, v]: allocating memory for each would cost as much
    as the matrix products.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rule: LogitRule
    buffer: Tensor

    def chunks(self, span: slice) -> list[slice]:
        """A span of the positions, split into chunks that fit the buffer."""
        size = len(self.buffer)
        return [slice(start, min(start + size, span.stop)) for start in range(span.start, span.stop, size)]

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """fp32 logits [p, v] of a chunk, in the buffer where the rule allows, and their slope (see LogitRule)."""
        hidden, raw = self.hidden[chunk], self.buffer[: chunk.stop - chunk.start]
        if _multiplies_into_fp32(hidden):
            torch.mm(hidden, self.weight.T, out_dtype=torch.float32, out=raw)
            raw = raw if self.bias is None else raw.add_(self.bias)
        elif self.weight.dtype != torch.float32:
            raw.copy_(nn.functional.linear(hidden, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden, self.weight.T, out=raw)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=raw)
        return self.rule(raw)

    def logps(self, span: slice) -> Tensor:
        """Log-probs [p] of a span, fp32."""
        return torch.cat([self.score_chunk(chunk).logps for chunk in self.chunks(span)])

    def score_chunk(self, chunk: slice) -> _ChunkScores:
        """Log-probs of a chunk that fits the buffer: logp = logit of the target - log-sum-exp."""
        logits, slope = self.logits(chunk)
        target_logits, max_logits = logits.gather(1, self.targets[chunk, None]).squeeze(1), logits.amax(-1)
        exp_logits = logits.sub_(max_logits[:, None]).exp_()
        exp_sums = exp_logits.sum(-1)
        return _ChunkScores(target_logits - max_logits - exp_sums.log(), exp_logits, exp_sums, slope)


def _multiplies_into_fp32(factor: Tensor) -> bool:
    """Whether products with a bf16 factor can be written in fp32, unrounded: torch does so on CUDA alone."""
    return factor.is_cuda and factor.dtype != torch.float32


class _ChunkScores(NamedTuple):
    """Log-probs [p] of a chunk, its softmax as exp_logits [p, v] / exp_sums [p], and the slope of its logits."""

    logps: Tensor
    exp_logits: Tensor
    exp_sums: Tensor
    slope: Tensor | None


class _Gradients:
    """Gradients of sum_t coefficients_t * logp_t by hidden, weight and bias, accumulated chunk by chunk."""

    def __init__(self, projection: _Projection) -> None:
        self._projection = projection
        weight, bias = projection.weight, projection.bias
        self._hidden = torch.empty_like(projection.hidden)
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        self._bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None

    def add(self, chunk: slice, scores: _ChunkScores, coefficients: Tensor) -> None:
        """Add a chunk; its ``scores`` are overwritten."""
        p = self._projection
        # d logp / d logits = onehot(target) - softmax
        grad = scores.exp_logits.mul_((-coefficients / scores.exp_sums)[:, None])
        grad.scatter_add_(1, p.targets[chunk, None], coefficients[:, None])
        if scores.slope is not None:
            grad.mul_(scores.slope)
        elif p.rule.scale != 1.0:
            grad.mul_(p.rule.scale)
        low = grad.to(p.weight.dtype)
        torch.mm(low, p.weight, out=self._hidden[chunk])
        if self._weight is not None and low is grad:
            self._weight.addmm_(grad.T, p.hidden[chunk])
        elif self._weight is not None and _multiplies_into_fp32(low):
            torch.addmm(self._weight, low.T, p.hidden[chunk], out_dtype=torch.float32, out=self._weight)
        elif self._weight is not None:
            self._weight.add_(low.T @ p.hidden[chunk])
        if self._bias is not None:
            self._bias.add_(grad.sum(0))

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by hidden [t, d], weight [v, d] and bias [v], in the dtypes of these; None where none is needed."""
        p = self._projection
        weight = None if self._weight is None else self._weight.to(p.weight.dtype)
        bias = None if self._bias is None or p.bias is None else self._bias.to(p.bias.dtype)
        return self._hidden, weight, bias


class _Score(torch.autograd.Function):
    """Log-probs [t] whose coefficients come with the backward, which recomputes the logits except for the last chunk.

    Where weight and bias are frozen nothing is recomputed: the forward keeps d logp_t / d hidden_t, which the backward
    scales.
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
            logps, gradients = _score_and_differentiate(projection, lambda _, logps: torch.ones_like(logps), ())
            ctx.save_for_backward(gradients.result()[0])
            return logps
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunks = projection.chunks(slice(0, len(targets)))
        scores = [projection.score_chunk(chunk) for chunk in ctx.chunks]
        # another forward before the backward overwrites the buffer, and changes its version
        ctx.rule, ctx.buffer, ctx.last_scores, ctx.version = rule, buffer, scores[-1], tensor_version(buffer)
        return torch.cat([chunk.logps for chunk in scores])

    @staticmethod
    def backward(ctx: Any, *grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        (coefficients,) = grad_logps
        if ctx.frozen:
            (slopes,) = ctx.saved_tensors
            return slopes * coefficients[:, None].to(slopes.dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        projection = _Projection(hidden, weight, bias, targets, ctx.rule, ctx.buffer)
        gradients = _Gradients(projection)
        scores = ctx.last_scores if tensor_version(ctx.buffer) == ctx.version else None
        for chunk in reversed(ctx.chunks):
            gradients.add(chunk, scores or projection.score_chunk(chunk), coefficients[chunk])
            scores = None
        return *gradients.result(), None, None, None


class _Push(torch.autograd.Function):
    """sum_t coefficients_t * logp_t with its gradients, both computed in the forward: each chunk of logits is computed
    once.
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
        coefficient_fn: CoefficientFn,
        group_sizes: Sequence[int],
    ) -> Tensor:
        sums: list[Tensor] = []

        def summed(span: slice, logps: Tensor) -> Tensor:
            coefficients = coefficient_fn(span, logps)
            sums.append((coefficients * logps).sum())
            return coefficients

        projection = _Projection(hidden, weight, bias, targets, rule, buffer)
        ctx.gradients = _score_and_differentiate(projection, summed, group_sizes)[1].result()
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # in place, because the gradient by the weight is as large as the weight
        grads = (None if grad is None else grad.mul_(grad_total[0].to(grad.dtype)) for grad in ctx.gradients)
        return *grads, None, None, None, None, None


def _score_and_differentiate(
    projection: _Projection, coefficient_fn: CoefficientFn, group_sizes: Sequence[int]
) -> tuple[Tensor, _Gradients]:
    """Log-probs [t] and gradients.

    ``coefficient_fn`` gets whole groups of ``group_sizes`` consecutive positions, or any chunk where there are no
    groups. Logits of groups that fit the buffer together are computed once, those of a larger group twice.
    """
    gradients, logps = _Gradients(projection), []
    for span in _group_spans(group_sizes or [1] * len(projection.targets), len(projection.buffer)):
        chunks = projection.chunks(span)
        scores = projection.score_chunk(span) if len(chunks) == 1 else None
        logps.append(projection.logps(span) if scores is None else scores.logps)
        coefficients = coefficient_fn(span, logps[-1])
        for chunk in chunks:
            of_chunk = coefficients[chunk.start - span.start : chunk.stop - span.start]
            gradients.add(chunk, scores or projection.score_chunk(chunk), of_chunk)
    return torch.cat(logps), gradients


def _group_spans(group_sizes: Sequence[int], limit: int) -> list[slice]:
    """Spans of consecutive whole groups, each of at most ``limit`` positions or of one group."""
    spans, start, stop = [], 0, 0
    for size in group_sizes:
        if stop > start and stop + size - start > limit:
            spans.append(slice(start, stop))
            start = stop
        stop += size
    return [*spans, slice(start, stop)]


class LogProbHead:
    """Replaces the forward of a causal model's output projection; see the module's docstring.

    ::

        head.set_targets(rows, columns, targets)
        logps = model(ids, attention_mask=mask).logits
    """

    def __init__(self, model: Any) -> None:
        self._module = model.get_output_embeddings()
        if hasattr(self._module, "base_layer"):
            raise UserError("model.lora.target_modules: adapters on the output head are not supported; leave it out")
        self._config = model.config.get_text_config()
        self._rule = LogitRule.from_config(self._config)
        self._positions: tuple[Tensor, Tensor] | None = None
        self._buffer: Tensor | None = None
        # some architectures read these keys from their config at each forward, others copy them into a module
        owners = [self._config, *(module for module in model.modules() if self._module in module.children())]
        self._config_values = [
            (owner, name, getattr(owner, name))
            for owner in owners
            for name in _NEUTRAL_VALUES
            if getattr(owner, name, None)
        ]
        self.install()

    def install(self) -> None:
        """Replace the forward, and neutralise the config keys that the model would apply to log-probs a second time."""
        for owner, name, _ in self._config_values:
            setattr(owner, name, _NEUTRAL_VALUES[name])
        self._module.forward = self._forward

    def remove(self) -> None:
        """Restore the model's own forward and config keys."""
        for owner, name, value in self._config_values:
            setattr(owner, name, value)
        del self._module.forward

    @property
    def allocated_bytes(self) -> int:
        """Size of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def set_targets(
        self,
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        coefficient_fn: CoefficientFn | None = None,
        group_sizes: Sequence[int] = (),
    ) -> None:
        """Set what the next forward returns in place of logits.

        Position ``(rows[t], columns[t])`` of the batch predicts token ``targets[t]``. Without ``coefficient_fn``: the
        log-probs [t]. With it: the scalar sum_t coefficients_t * logp_t, for one backward. ``coefficient_fn`` is called
        with consecutive slices of the positions and their log-probs, and returns their coefficients; ``group_sizes``
        are the numbers of consecutive positions (they sum to t) that one call must see together.
        """
        self._positions, self._targets = (rows, columns), targets
        self._coefficient_fn, self._group_sizes = coefficient_fn, group_sizes

    def _forward(self, hidden: Tensor) -> Tensor:
        assert self._positions is not None, "set_targets() must precede each forward of the model"
        selected = hidden[self._positions]
        self._positions = None
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        deferred = self._coefficient_fn is None and torch.is_grad_enabled() and weight.requires_grad
        buffer = self._logit_buffer(selected, len(weight), deferred)
        arguments = (selected, weight, bias, self._targets, self._rule, buffer)
        if self._coefficient_fn is not None:
            return _Push.apply(*arguments, self._coefficient_fn, self._group_sizes)  # type: ignore[no-any-return, no-untyped-call]
        if torch.is_grad_enabled():
            return _Score.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
        return _Projection(*arguments).logps(slice(0, len(self._targets)))

    def _logit_buffer(self, hidden: Tensor, vocabulary: int, deferred: bool) -> Tensor:
        """The buffer for logits, reused from forward to forward."""
        rows = _buffer_rows(vocabulary, len(hidden), deferred, "cuda" if hidden.is_cuda else "cpu")
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = hidden.new_empty((rows, vocabulary), dtype=torch.float32)
        return self._buffer[:rows]
