"""Response log-probs straight from hidden states: the logits of a batch are never held in memory.

``LogProbHead`` takes the place of ``lm_head.forward``. Before a forward it is told which positions are scored and
what token each predicts; in place of logits it returns their log-probs, computed chunk by chunk. Because the module
stays where it was, ZeRO-3's hooks still gather its weight.

What an architecture does to its logits after the projection (bias, scale, soft-capping) is known to ``LogitRule`` and to
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydiv.errors import UserError

CHUNK_TOKENS = 256
"""Positions per chunk: 256 x 49,152 fp32 logits are 50 MB, and larger chunks are no faster on CPU."""


_NEUTRAL = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Config keys that say what happens to logits, and the value at which nothing happens."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """logits = cap * tanh(scale * (W h + b) / cap); no cap: scale * (W h + b)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """The rule that a model's config states."""
        return cls(
            scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            cap=getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits from ``W h + b`` (fp32), and d logits / d raw where it is not simply ``scale``."""
        if self.cap is None:
            return raw * self.scale if self.scale != 1.0 else raw, None
        squashed = torch.tanh(raw * (self.scale / self.cap))
        return self.cap * squashed, self.scale * (1 - squashed * squashed)


@dataclass(slots=True)
class _Projection:
    """The tensors of one call: hidden [t, d], weight [v, d], bias [v] or None, targets [t]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rule: LogitRule

    def chunks(self) -> range:
        return range(0, len(self.targets), CHUNK_TOKENS)

    def logits(self, start: int) -> tuple[Tensor, Tensor | None]:
        """fp32 logits of one chunk [c, v] with their slope (see LogitRule)."""
        raw = nn.functional.linear(self.hidden[start : start + CHUNK_TOKENS], self.weight, self.bias).float()
        return self.rule(raw)

    def logps(self) -> tuple[Tensor, Tensor]:
        """Log-prob and log-sum-exp of every position, [t] each, fp32."""
        logps, normalisers = self.hidden.new_empty((2, len(self.targets)), dtype=torch.float32)
        for start in self.chunks():
            part = slice(start, start + CHUNK_TOKENS)
            logits, _ = self.logits(start)
            normalisers[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(1, self.targets[part, None]).squeeze(1) - normalisers[part]
        return logps, normalisers

    def gradients(
        self, coefficients: Tensor, normalisers: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Gradients of sum_t coefficients_t * logp_t by hidden, weight and bias, and the log-probs, in one visit.

        ``normalisers`` [t] are the log-sum-exps where an earlier pass kept them.
        """
        grad_hidden = torch.empty_like(self.hidden)
        grad_weight = torch.zeros_like(self.weight, dtype=torch.float32) if self.weight.requires_grad else None
        grad_bias = None if self.bias is None else torch.zeros_like(self.bias, dtype=torch.float32)
        logps = torch.empty_like(coefficients)
        for start in self.chunks():
            part = slice(start, start + CHUNK_TOKENS)
            targets, weights = self.targets[part, None], coefficients[part, None]
            logits, slope = self.logits(start)
            normaliser = (logits.logsumexp(-1) if normalisers is None else normalisers[part])[:, None]
            logps[part] = (logits.gather(1, targets) - normaliser).squeeze(1)
            # d logp / d logits = onehot(target) - softmax, written over the logits themselves
            grad = logits.sub_(normaliser).exp_().mul_(-weights)
            grad.scatter_add_(1, targets, weights)
            grad = grad.mul_(self.rule.scale) if slope is None else grad.mul_(slope)
            low = grad.to(self.weight.dtype)
            grad_hidden[part] = low @ self.weight
            if grad_weight is not None:
                grad_weight.add_(low.T @ self.hidden[part])
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0))
        return (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(self.weight.dtype),
            grad_bias if grad_bias is None or self.bias is None else grad_bias.to(self.bias.dtype),
            logps,
        )


class _ScoreWithGraph(torch.autograd.Function):
    """Log-probs [t] whose backward recomputes each chunk, for when the coefficients are not known yet."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rule: LogitRule
    ) -> Tensor:
        logps, normalisers = _Projection(hidden, weight, bias, targets, rule).logps()
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.rule = rule
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        projection = _Projection(hidden, weight, bias, targets, ctx.rule)
        grad_hidden, grad_weight, grad_bias, _ = projection.gradients(grad_logps[0], normalisers)
        return grad_hidden, grad_weight, grad_bias, None, None


class _Push(torch.autograd.Function):
    """sum_t coefficients_t * logp_t with both gradients made in the forward: each chunk of logits is visited once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients: Tensor,
        rule: LogitRule,
    ) -> Tensor:
        projection = _Projection(hidden, weight, bias, targets, rule)
        grad_hidden, grad_weight, grad_bias, logps = projection.gradients(coefficients, None)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return (coefficients * logps).sum()

    @staticmethod
    def backward(ctx: Any, *grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_total[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None


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
        self._rule = LogitRule.of(self._config)
        self._positions: tuple[Tensor, Tensor] | None = None
        # some architectures read the rule from their config at each forward, others keep a copy of their own
        owners = [self._config, *(module for module in model.modules() if self._module in module.children())]
        self._stated = [
            (owner, name, getattr(owner, name)) for owner in owners for name in _NEUTRAL if getattr(owner, name, None)
        ]
        self._install()

    def _install(self) -> None:
        """Take the head's place; the model must not apply its rule a second time, to log-probs."""
        for owner, name, _ in self._stated:
            setattr(owner, name, _NEUTRAL[name])
        self._module.forward = self._forward

    def remove(self) -> None:
        """Give the model its own head and rule back."""
        for owner, name, value in self._stated:
            setattr(owner, name, value)
        del self._module.forward

    @torch.no_grad()
    def check(self, forward: Callable[..., Any], device: torch.device) -> None:
        """Compare with the model's own logits on a short input.

        Raises UserError for an architecture that does more to its logits than LogitRule knows, rather than train it wrongly.
        """
        ids = torch.arange(3, 11, device=device)[None]
        rows, columns = torch.zeros(7, dtype=torch.long, device=device), torch.arange(7, device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        self.remove()
        own = forward(**inputs).logits.float().log_softmax(-1)[rows, columns, ids[0, 1:]]
        self._install()
        self.aim(rows, columns, ids[0, 1:])
        found = forward(**inputs).logits
        if not torch.allclose(
            found, own, rtol=1e-3, atol=0.25 if self._module.weight.dtype == torch.bfloat16 else 1e-3
        ):
            raise UserError(
                f"model.id: {type(self._config).__name__.removesuffix('Config')} models treat their logits in a way that "
                f"raydiv does not know (log-probs differ by up to {float((found - own).abs().max()):.2g})"
            )

    def aim(self, rows: Tensor, columns: Tensor, targets: Tensor, coefficients: Tensor | None = None) -> None:
        """Say what the next forward returns in place of logits.

        Position ``(rows[t], columns[t])`` of the batch predicts token ``targets[t]``. Without ``coefficients``: the
        log-probs [t]. With them [t]: the scalar sum_t coefficients_t * logp_t, for one backward.
        """
        self._positions, self._targets, self._coefficients = (rows, columns), targets, coefficients

    def _forward(self, hidden: Tensor) -> Tensor:
        assert self._positions is not None, "aim() the head before the model's forward"
        selected = hidden[self._positions]
        self._positions = None
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        if self._coefficients is not None:
            return _Push.apply(selected, weight, bias, self._targets, self._coefficients, self._rule)  # type: ignore[no-any-return, no-untyped-call]
        if torch.is_grad_enabled():
            return _ScoreWithGraph.apply(selected, weight, bias, self._targets, self._rule)  # type: ignore[no-any-return, no-untyped-call]
        return _Projection(selected, weight, bias, self._targets, self._rule).logps()[0]
