"""The training step: score, judge, push.

An objective of this family sees a sequence only through its log-prob, so its gradient is sum_i c_i grad logp_i with
c_i = d loss / d logp_i. Score finds every logp_i, judge every c_i, push sums their gradients: exactly the global batch's
gradient, however the batch was laid out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raydiv import dist
from raydiv.data.plan import MicroBatch, micro_batches
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses import Batch, State
from raydiv.model.collate import Inputs, collate
from raydiv.model.head import LogProbHead
from raydiv.training.coefficients import Term, Verdict, first_states, judge


@dataclass(frozen=True, slots=True)
class StepExamples:
    """The examples of step ``number``, the same on every rank.

    ``mismatched`` are KTO's derangement of them (scored, never pushed). The reference log-probs, [n] and [m], are None when
    the policy's switched-off adapters are the reference.
    """

    number: int
    examples: TokenizedExamples
    mismatched: TokenizedExamples
    reference_logps: Tensor | None
    mismatched_reference_logps: Tensor | None


@dataclass(slots=True)
class Stepper:
    """Runs steps of one objective on one engine and holds the objective's running state.

    ``engine`` is called as the model's forward and has ``model``, ``device``, ``backward`` and ``update`` (see
    raydiv.engine.Engine). ``forwards`` counts this rank's forwards.
    """

    engine: Any
    head: LogProbHead
    terms: Sequence[Term]
    tokens_per_microbatch: int
    seed: int = 0
    states: list[State] = field(default_factory=list)
    forwards: int = 0

    def __post_init__(self) -> None:
        self.states = self.states or first_states(self.terms)

    def step(self, chosen: StepExamples, lr: float) -> dict[str, float]:
        """One optimizer update; returns the step's metrics. A non-finite step raises FloatingPointError, unapplied."""
        self.engine.model.train()
        mine = self._layout(chosen.examples)
        # a rank with one micro-batch keeps its graph until the coefficients are known, and needs no second forward
        keep_graph = len(mine) == 1
        scores = [self._score(chosen.number, chosen.examples, micro_batch, grad=keep_graph) for micro_batch in mine]
        verdict = judge(self.terms, self.states, self._batch(chosen, self._gather(chosen.examples, mine, scores)))
        if keep_graph:
            own = _coefficients(verdict, mine[0]).to(self.engine.device)
            self.engine.backward((own * scores[0]).sum(), last=True)
        else:
            self._push(chosen, mine, verdict)
        self.states = verdict.states
        return verdict.metrics | {"grad_norm": self.engine.update(lr)}

    def score(self, chosen: StepExamples) -> Batch:
        """The global batch's log-probs, without gradient or dropout."""
        self.engine.model.eval()
        return self._batch(chosen, self._score_all(chosen.number, chosen.examples))

    def _layout(self, examples: TokenizedExamples) -> list[MicroBatch]:
        return micro_batches(examples.lengths, self.tokens_per_microbatch, dist.world_size())[dist.rank()]

    def _score(self, step: int, examples: TokenizedExamples, micro_batch: MicroBatch, grad: bool) -> Tensor:
        """Log-probs [m] of a micro-batch of ``examples`` (a dummy's one), with a graph when ``grad``."""
        inputs = collate([examples[position] for position in micro_batch]).to(self.engine.device)
        with torch.set_grad_enabled(grad):
            logps = self._forward(step, micro_batch, inputs, None)
            return inputs.per_example(logps, max(1, len(micro_batch)))

    def _score_all(self, step: int, examples: TokenizedExamples) -> Tensor:
        """Log-probs [n] of ``examples`` over all ranks, without graph."""
        if not len(examples):
            return torch.zeros(0)
        mine = self._layout(examples)
        return self._gather(
            examples, mine, [self._score(step, examples, micro_batch, grad=False) for micro_batch in mine]
        )

    def _push(self, chosen: StepExamples, mine: list[MicroBatch], verdict: Verdict) -> None:
        """Backward of sum_i c_i logp_i, micro-batch by micro-batch."""
        for count, micro_batch in enumerate(mine, start=1):
            inputs = collate([chosen.examples[position] for position in micro_batch]).to(self.engine.device)
            coefficients = _coefficients(verdict, micro_batch).to(self.engine.device)[inputs.rows]
            share = self._forward(chosen.number, micro_batch, inputs, coefficients)
            self.engine.backward(share, last=count == len(mine))

    def _forward(self, step: int, micro_batch: MicroBatch, inputs: Inputs, coefficients: Tensor | None) -> Tensor:
        # score and push of a micro-batch must draw the same dropout masks
        torch.manual_seed(_seed(self.seed, step, *micro_batch))
        self.forwards += 1
        self.head.aim(inputs.rows, inputs.columns, inputs.targets, coefficients)
        return self.engine(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False).logits  # type: ignore[no-any-return]

    def _gather(self, examples: TokenizedExamples, mine: list[MicroBatch], scores: list[Tensor]) -> Tensor:
        """All ranks' log-probs [n], fp32 on the CPU, in example order."""
        logps = torch.zeros(len(examples), device=self.engine.device)
        for micro_batch, score in zip(mine, scores, strict=True):
            if micro_batch:
                logps[micro_batch] = score.detach().float()
        return dist.sum_over_ranks(logps).cpu()

    def _batch(self, chosen: StepExamples, logps: Tensor) -> Batch:
        reference, mismatched_reference = chosen.reference_logps, chosen.mismatched_reference_logps
        if reference is None or mismatched_reference is None:
            reference, mismatched_reference = self._adapter_off(chosen)
        return Batch(
            logps=logps,
            reference_logps=reference,
            aligned=torch.from_numpy(chosen.examples.aligned),
            tokens=torch.from_numpy(chosen.examples.response_lengths),
            pairs=torch.from_numpy(chosen.examples.pairs),
            mismatched_log_ratios=self._score_all(chosen.number, chosen.mismatched) - mismatched_reference,
        )

    def _adapter_off(self, chosen: StepExamples) -> tuple[Tensor, Tensor]:
        """Reference log-probs [n] and [m] of the step from the policy without its adapters, and without dropout."""
        model = self.engine.model
        training = model.training
        model.eval()
        with model.disable_adapter():
            logps = (self._score_all(chosen.number, chosen.examples), self._score_all(chosen.number, chosen.mismatched))
        model.train(training)
        return logps


def _coefficients(verdict: Verdict, micro_batch: MicroBatch) -> Tensor:
    """Coefficients of a micro-batch's examples [m]; a dummy's is zero."""
    return verdict.coefficients[micro_batch] if micro_batch else torch.zeros(1)


def _seed(*parts: int) -> int:
    """A generator seed from numbers, without collisions to speak of."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big", signed=True)
