"""The training step: score, judge, push.

An objective of this family sees a sequence only through its log-prob, so its gradient is sum_i c_i grad logp_i with
c_i = d loss / d logp_i. Score finds every logp_i, judge every c_i, push sums their gradients: exactly the global batch's
gradient, however the batch was laid out. Where a micro-batch tells its own coefficients, the three are one pass over it, in
which the head asks for them as soon as it has scored an example, or a pair.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiv.data.batching import BatchLayout, MicroBatch
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses import Batch, State, Term, widest_scope
from raydiv.model.collate import ModelInputs, collate
from raydiv.model.head import CoefficientFn, LogProbHead
from raydiv.model.packing import Packing
from raydiv.training.coefficients import (
    LossOutput,
    NotFiniteError,
    evaluate_objective,
    first_states,
    known_coefficients,
)
from raydiv.training.metrics import state_metrics
from raydiv.training.step_timer import StepTimer
from raydiv.utils import distributed as dist


@dataclass(frozen=True, slots=True)
class StepExamples:
    """The examples of step ``number``, the same on every rank but for the token ids, of which each has those it forwards.

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

    ``engine`` is called as the model's forward and has ``model``, ``device``, ``backward``, ``update`` and ``discard`` (see
    ``Engine``). ``forwards`` counts this rank's forwards. ``phases`` are told what it does: ``score``; ``judge``,
    with the wait for the ranks that are slower; ``push``, which is all of a step that is one pass; and ``optimizer``.
    """

    engine: Any
    head: LogProbHead
    terms: Sequence[Term]
    tokens_per_microbatch: int
    packing: Packing = "none"
    seed: int = 0
    states: list[State] = field(default_factory=list)
    forwards: int = 0
    phases: StepTimer = field(default_factory=StepTimer)

    def __post_init__(self) -> None:
        self.states = self.states or first_states(self.terms)

    @property
    def layout(self) -> BatchLayout:
        """How steps are dealt to the ranks; whoever reads for this rank goes by the same."""
        return BatchLayout(
            self.tokens_per_microbatch, dist.world_size(), widest_scope(self.terms), packed=self.packing != "none"
        )

    def step(self, chosen: StepExamples, lr: float) -> dict[str, float]:
        """One optimizer update; returns its metrics. One that is not finite raises NotFiniteError, and changes nothing."""
        self.phases.enter("score")
        self.engine.model.train()
        given = self._given(chosen)
        dealt, whole = self.layout.training(chosen.examples.lengths, chosen.examples.units)
        mine = dealt[dist.rank()]
        if whole:
            verdict = self._stream(chosen, given, mine)
        elif len(mine) == 1:
            verdict = self._keep_graph(chosen, given, mine[0])
        else:
            verdict = self._two_passes(chosen, given, mine)
        self.phases.enter("optimizer")
        norm = self.engine.update(lr)
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient is not finite (its norm is {norm})")
        self.states = verdict.states
        return verdict.metrics | state_metrics(self.terms, self.states) | {"grad_norm": norm}

    def score(self, chosen: StepExamples) -> Batch:
        """The global batch's log-probs, without gradient or dropout."""
        self.engine.model.eval()
        return replace(self._given(chosen), logps=self._score_all(chosen.number, chosen.examples))

    def _given(self, chosen: StepExamples) -> Batch:
        """All that the objective sees but the policy's log-probs, which stand at the reference's."""
        reference, mismatched_reference = chosen.reference_logps, chosen.mismatched_reference_logps
        if reference is None or mismatched_reference is None:
            reference, mismatched_reference = self._adapter_off(chosen)
        return Batch(
            logps=reference,
            reference_logps=reference,
            aligned=torch.from_numpy(chosen.examples.aligned),
            tokens=torch.from_numpy(chosen.examples.response_lengths.astype(np.int64)),
            pairs=torch.from_numpy(chosen.examples.pairs),
            mismatched_log_ratios=self._score_all(chosen.number, chosen.mismatched) - mismatched_reference,
        )

    def _keep_graph(self, chosen: StepExamples, given: Batch, micro_batch: MicroBatch) -> LossOutput:
        """One pass for any objective: a rank's only micro-batch keeps its graph until the coefficients are known."""
        score = self._score(chosen.number, chosen.examples, micro_batch, grad=True)
        self.phases.enter("judge")
        logps = gathered(len(chosen.examples), [micro_batch], [score], self.engine.device)
        verdict = evaluate_objective(self.terms, self.states, replace(given, logps=logps))
        self.phases.enter("push")
        self.engine.backward((self._own(verdict.coefficients, micro_batch) * score).sum(), last=True)
        return verdict

    def _stream(self, chosen: StepExamples, given: Batch, mine: list[MicroBatch]) -> LossOutput:
        """One pass where a micro-batch tells its own coefficients: the head asks for them run by run."""
        self.phases.enter("push")
        logps = given.logps.clone()
        for count, micro_batch in enumerate(mine, start=1):
            inputs = self._inputs(chosen.examples, micro_batch)
            weigh = partial(self._weigh_known, replace(given, logps=logps), micro_batch, inputs)
            runs = _runs(chosen.examples, micro_batch, in_pairs=self.layout.scope == "pair")
            self.engine.backward(
                self._forward(chosen.number, micro_batch, inputs, weigh, runs), last=count == len(mine)
            )
        own = [logps[micro_batch] for micro_batch in mine]
        self.phases.enter("judge")
        whole = replace(given, logps=gathered(len(chosen.examples), mine, own, self.engine.device))
        try:
            return evaluate_objective(self.terms, self.states, whole)
        except NotFiniteError:
            self.engine.discard()
            raise

    def _weigh_known(
        self, batch: Batch, micro_batch: MicroBatch, inputs: ModelInputs, part: slice, token_logps: Tensor
    ) -> Tensor:
        """Coefficients of a run of token log-probs; those of its examples are noted in ``batch``.

        Other examples of the batch stand at some finite number, which does not matter to these.
        """
        if not micro_batch:
            return torch.zeros_like(token_logps)
        examples = inputs.examples[part]
        first, last = int(examples[0]), int(examples[-1])
        sums = token_logps.new_zeros(last + 1 - first).index_add(0, examples - first, token_logps)
        batch.logps[micro_batch[first : last + 1]] = sums.float().cpu()
        coefficients = known_coefficients(self.terms, self.states, batch)
        return self._own(coefficients, micro_batch)[examples]

    def _two_passes(self, chosen: StepExamples, given: Batch, mine: list[MicroBatch]) -> LossOutput:
        """Score every micro-batch, judge, then forward each again for its backward."""
        scores = self._score_each(chosen.number, chosen.examples, mine)
        self.phases.enter("judge")
        logps = gathered(len(chosen.examples), mine, scores, self.engine.device)
        verdict = evaluate_objective(self.terms, self.states, replace(given, logps=logps))
        self.phases.enter("push")
        for count, micro_batch in enumerate(mine, start=1):
            inputs = self._inputs(chosen.examples, micro_batch)
            coefficients = self._own(verdict.coefficients, micro_batch)[inputs.examples]
            weigh = partial(_known, coefficients)
            self.engine.backward(self._forward(chosen.number, micro_batch, inputs, weigh), last=count == len(mine))
        return verdict

    def _own(self, coefficients: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Coefficients of a micro-batch's examples [m]; a dummy's is zero."""
        return (coefficients[micro_batch] if micro_batch else torch.zeros(1)).to(self.engine.device)

    def _inputs(self, examples: TokenizedExamples, micro_batch: MicroBatch) -> ModelInputs:
        return collate([examples[position] for position in micro_batch], self.packing).to(self.engine.device)

    def _score(self, step: int, examples: TokenizedExamples, micro_batch: MicroBatch, grad: bool) -> Tensor:
        """Log-probs [m] of a micro-batch of ``examples`` (a dummy's one), with a graph when ``grad``."""
        inputs = self._inputs(examples, micro_batch)
        with torch.set_grad_enabled(grad):
            return inputs.per_example(self._forward(step, micro_batch, inputs), max(1, len(micro_batch)))

    def _score_all(self, step: int, examples: TokenizedExamples) -> Tensor:
        """Log-probs [n] of ``examples`` over all ranks, without graph."""
        if not len(examples):
            return torch.zeros(0)
        return self._score_layout(step, examples, self.layout.scoring(examples.lengths)[dist.rank()])

    def _score_layout(self, step: int, examples: TokenizedExamples, mine: list[MicroBatch]) -> Tensor:
        """Log-probs [n] of ``examples``, of which this rank scores ``mine``, without graph."""
        return gathered(len(examples), mine, self._score_each(step, examples, mine), self.engine.device)

    def _score_each(self, step: int, examples: TokenizedExamples, mine: list[MicroBatch]) -> list[Tensor]:
        """Log-probs [m] of each of this rank's micro-batches, without graph."""
        return [self._score(step, examples, micro_batch, grad=False) for micro_batch in mine]

    def _forward(
        self,
        step: int,
        micro_batch: MicroBatch,
        inputs: ModelInputs,
        weigh: CoefficientFn | None = None,
        runs: Sequence[int] = (),
    ) -> Tensor:
        """Token log-probs [t] of a micro-batch, or their weighted sum (see LogProbHead.aim)."""
        # score and push of a micro-batch must draw the same dropout masks
        torch.manual_seed(_seed(self.seed, step, *micro_batch))
        self.forwards += 1
        self.phases.advance()
        self.head.set_targets(inputs.rows, inputs.columns, inputs.targets, weigh, runs)
        return self.engine(**inputs.arguments()).logits  # type: ignore[no-any-return]

    def _adapter_off(self, chosen: StepExamples) -> tuple[Tensor, Tensor]:
        """Reference log-probs [n] and [m] of the step from the policy without its adapters, and without dropout."""
        model = self.engine.model
        training = model.training
        model.eval()
        with model.disable_adapter():
            logps = (self._score_all(chosen.number, chosen.examples), self._score_all(chosen.number, chosen.mismatched))
        model.train(training)
        return logps


def gathered(count: int, mine: Sequence[MicroBatch], values: Sequence[Tensor], device: torch.device) -> Tensor:
    """All ranks' values [count, ...] of ``count`` examples, fp32 on the CPU, in example order.

    ``values[i]`` [m, ...] are this rank's of micro-batch ``mine[i]``; those of an empty one count for nothing. ``device`` is
    where the ranks' collectives are.
    """
    whole = torch.zeros((count, *values[0].shape[1:]), device=device)
    for micro_batch, own in zip(mine, values, strict=True):
        if micro_batch:
            whole[micro_batch] = own.detach().float()
    return dist.sum_over_ranks(whole).cpu()


def joined(scored: Sequence[Batch], order: np.ndarray, units: np.ndarray) -> Batch:
    """The batches of parts of a set as one, in the set's order and with its pairs.

    ``order`` [n]: the set's row of each example of the parts, one after another; ``units`` [u, 2] as in StoredExamples.
    """
    back = torch.from_numpy(np.argsort(order))
    columns = ("logps", "reference_logps", "aligned", "tokens")
    whole = {name: torch.cat([getattr(batch, name) for batch in scored])[back] for name in columns}
    mismatched = torch.cat([batch.mismatched_log_ratios for batch in scored])
    pairs = torch.from_numpy(units[units[:, 1] >= 0])
    return Batch(**whole, pairs=pairs, mismatched_log_ratios=mismatched[back] if len(mismatched) else mismatched)


def _known(coefficients: Tensor, part: slice, _: Tensor) -> Tensor:
    return coefficients[part]


def _runs(examples: TokenizedExamples, micro_batch: MicroBatch, in_pairs: bool) -> list[int]:
    """Response tokens of each example of a micro-batch, or of each pair, whose two are neighbours; a dummy's one."""
    runs: list[int] = []
    before = -1
    for position in micro_batch:
        tokens, pair = int(examples.response_lengths[position]), int(examples.pair[position])
        if in_pairs and pair >= 0 and pair == before:
            runs[-1] += tokens
        else:
            runs.append(tokens)
        before = pair
    return runs or [1]


def _seed(*parts: int) -> int:
    """A generator seed from numbers, without collisions to speak of."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big", signed=True)
