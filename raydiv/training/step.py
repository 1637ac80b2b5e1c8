"""The training step: score, judge, push.

An objective of this family depends on a sequence only through its log-prob, so its gradient is sum_i c_i grad logp_i
with c_i = d loss / d logp_i. Score computes every logp_i, judge (the loss on the global batch) every c_i, and push sums
the gradients: exactly the global batch's gradient, whatever the layout. A step takes one of three routes:

- ``_stream``, where each micro-batch determines its own coefficients: one forward and backward of each; the head asks
  for coefficients as soon as it has scored an example, or a pair.
- ``_keep_graph``, where the rank has a single micro-batch: one forward, whose graph waits for the coefficients.
- ``_two_passes`` otherwise: all micro-batches are scored without gradient, then forwarded again with it.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiv.data.batching import BatchLayout, MicroBatch, StepPlan
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses import Batch, State, Term, widest_scope
from raydiv.losses.position import PositionRule
from raydiv.model.chat import Ids
from raydiv.model.collate import ModelInputs, collate
from raydiv.model.head import CoefficientFn, LogProbHead
from raydiv.model.packing import Packing
from raydiv.training.coefficients import (
    LossOutput,
    NotFiniteError,
    evaluate_objective,
    initial_states,
    known_coefficients,
)
from raydiv.training.metrics import state_metrics
from raydiv.training.step_timer import StepTimer
from raydiv.utils import distributed as dist
from raydiv.utils.devices import to_device


@dataclass(frozen=True, slots=True)
class RankLayout:
    """One rank's micro-batches of a step.

    ``training`` are those of the examples that get a gradient; ``streams``: each determines its own coefficients.
    ``scoring`` and ``mismatched`` are those of the examples, and of KTO's mismatched ones, that are scored without
    gradient.
    """

    training: list[MicroBatch]
    streams: bool
    scoring: list[MicroBatch]
    mismatched: list[MicroBatch]

    @property
    def positions(self) -> list[int]:
        """Positions in the step of the examples that the rank forwards."""
        return sorted({position for batch in (*self.training, *self.scoring) for position in batch})

    @property
    def mismatched_positions(self) -> list[int]:
        """Positions in the step of the mismatched examples that the rank forwards."""
        return sorted({position for batch in self.mismatched for position in batch})


@dataclass(frozen=True, slots=True)
class RankStep:
    """A step as one rank sees it. Ranks differ in ``layout``, and in the token ids, which follow from it.

    ``mismatched`` is KTO's derangement of the examples: scored, without gradient. The reference log-probs, [n], are
    None where the reference is the policy with its adapters switched off; those of the mismatched ones, [m], are 0
    then.
    """

    plan: StepPlan
    examples: TokenizedExamples
    mismatched: TokenizedExamples
    reference_logps: Tensor | None
    mismatched_reference_logps: Tensor
    layout: RankLayout

    @property
    def number(self) -> int:
        """The step's number, from 0."""
        return self.plan.step


@dataclass(slots=True)
class Stepper:
    """Runs steps of the loss ``terms`` on one engine, and holds their running states.

    ``engine`` is callable as the model's forward and has ``model``, ``device``, ``backward``, ``update`` and
    ``discard`` (see DeepSpeedEngine). ``forwards`` counts this rank's forwards. ``timer`` gets the phases: ``score``;
    ``judge``, which includes the wait for slower ranks; ``push``, which is the whole of a streamed step; ``optimizer``.
    """

    engine: Any
    head: LogProbHead
    terms: Sequence[Term]
    tokens_per_microbatch: int
    packing: Packing = "none"
    position: PositionRule | None = None
    seed: int = 0
    states: list[State] = field(default_factory=list)
    forwards: int = 0
    timer: StepTimer = field(default_factory=StepTimer)

    def __post_init__(self) -> None:
        self.states = self.states or initial_states(self.terms)

    @property
    def layout(self) -> BatchLayout:
        """How steps are dealt to the ranks."""
        return BatchLayout(
            self.tokens_per_microbatch, dist.world_size(), widest_scope(self.terms), packed=self.packing != "none"
        )

    def step(self, step: RankStep, lr: float) -> dict[str, float]:
        """Make one optimizer update; returns its metrics.

        Raises NotFiniteError where log-probs, loss or gradient are not finite; then weights and states are unchanged.
        """
        self.timer.enter("score")
        self.engine.model.train()
        batch = self._reference_batch(step)
        if step.layout.streams:
            output = self._stream(step, batch)
        elif len(step.layout.training) == 1:
            output = self._keep_graph(step, batch)
        else:
            output = self._two_passes(step, batch)
        self.timer.enter("optimizer")
        norm = self.engine.update(lr)
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient is not finite (its norm is {norm})")
        self.states = output.states
        return output.metrics | state_metrics(self.terms, self.states) | {"grad_norm": norm}

    def score(self, step: RankStep) -> Batch:
        """The global batch's log-probs, without gradient or dropout."""
        self.engine.model.eval()
        return replace(self._reference_batch(step), logps=self._score_all(step, step.examples, step.layout.scoring))

    def score_at_start(self, step: RankStep) -> Batch:
        """``score`` before the first update, without a forward: the policy starts as its reference."""
        assert step.reference_logps is not None
        no_ratios = torch.zeros(len(step.mismatched))
        return self._batch_of(step, step.reference_logps, no_ratios)

    def token_logps(self, examples: Sequence[tuple[Ids, Ids]]) -> list[Tensor]:
        """Log-probs [t] of the response tokens of each example, without gradient or dropout, fp32 on the CPU.

        Each rank scores a share of the examples, and all ranks must call it together.
        """
        self.engine.model.eval()
        responses = [len(response) for _, response in examples]
        lengths = [len(prompt) + len(response) for prompt, response in examples]
        micro_batches, padded = self.layout.scoring(lengths)[dist.rank()], []
        for micro_batch in micro_batches:
            inputs = collate([examples[row] for row in micro_batch], self.packing).to(self.engine.device)
            with torch.no_grad():
                logps = self._forward(0, micro_batch, inputs).float()
            values = logps.new_zeros(max(1, len(micro_batch)), max(responses))
            parts = torch.split(logps, [responses[row] for row in micro_batch] or [1])
            for row, part in zip(values, parts, strict=True):
                row[: len(part)] = part
            padded.append(values)
        gathered = gather_examples(len(examples), micro_batches, padded, self.engine.device)
        return [row[:length] for row, length in zip(gathered, responses, strict=True)]

    def _reference_batch(self, step: RankStep) -> Batch:
        """The batch of the step with the reference's log-probs in place of the policy's, which are not known yet."""
        reference, mismatched_reference = step.reference_logps, step.mismatched_reference_logps
        if reference is None:
            reference, mismatched_reference = self._score_without_adapters(step)
        mismatched = self._score_all(step, step.mismatched, step.layout.mismatched)
        return self._batch_of(step, reference, mismatched - mismatched_reference)

    def _batch_of(self, step: RankStep, reference: Tensor, mismatched_log_ratios: Tensor) -> Batch:
        return Batch(
            logps=reference,
            reference_logps=reference,
            aligned=torch.from_numpy(step.examples.aligned),
            tokens=torch.from_numpy(step.examples.token_counts(self.position)),
            pairs=torch.from_numpy(step.examples.pairs),
            mismatched_log_ratios=mismatched_log_ratios,
        )

    def _keep_graph(self, step: RankStep, batch: Batch) -> LossOutput:
        """Any objective: the rank's only micro-batch keeps its graph until the coefficients are known."""
        (micro_batch,) = step.layout.training
        logps = self._score(step.number, step.examples, micro_batch, grad=True)
        self.timer.enter("judge")
        output = self._evaluate(batch, [micro_batch], [logps])
        self.timer.enter("push")
        self.engine.backward((self._select(output.coefficients, micro_batch) * logps).sum(), last=True)
        return output

    def _stream(self, step: RankStep, batch: Batch) -> LossOutput:
        """Micro-batches that determine their own coefficients: the head asks for them run by run."""
        self.timer.enter("push")
        micro_batches, logps = step.layout.training, batch.logps.clone()
        for count, micro_batch in enumerate(micro_batches, start=1):
            inputs = self._inputs(step.examples, micro_batch)
            coefficient_fn = partial(self._stream_coefficients, replace(batch, logps=logps), micro_batch, inputs)
            runs = _runs(step.examples, micro_batch, in_pairs=self.layout.scope == "pair")
            weighted_sum = self._forward(step.number, micro_batch, inputs, coefficient_fn, runs)
            self.engine.backward(weighted_sum, last=count == len(micro_batches))
        self.timer.enter("judge")
        try:
            return self._evaluate(batch, micro_batches, [logps[micro_batch] for micro_batch in micro_batches])
        except NotFiniteError:
            self.engine.discard()
            raise

    def _stream_coefficients(
        self, batch: Batch, micro_batch: MicroBatch, inputs: ModelInputs, part: slice, token_logps: Tensor
    ) -> Tensor:
        """Coefficients of a run of token log-probs, after writing the log-probs of its examples into ``batch``.

        The other examples of the batch stand at some finite number, on which these coefficients do not depend.
        """
        if not micro_batch:
            return torch.zeros_like(token_logps)
        terms, examples = inputs.terms(token_logps, part), inputs.examples[part]
        first, last = bisect_right(inputs.ends, part.start), bisect_right(inputs.ends, part.stop - 1)
        sums = terms.new_zeros(last + 1 - first).index_add(0, examples - first, terms)
        batch.logps[micro_batch[first : last + 1]] = sums.float().cpu()
        coefficients = known_coefficients(self.terms, self.states, batch)
        return self._select(coefficients, micro_batch)[examples] * inputs.slopes(token_logps, part)

    def _two_passes(self, step: RankStep, batch: Batch) -> LossOutput:
        """Score every micro-batch without graph, evaluate the loss, then forward each again for its backward."""
        micro_batches = step.layout.training
        logps = self._score_each(step.number, step.examples, micro_batches)
        self.timer.enter("judge")
        output = self._evaluate(batch, micro_batches, logps)
        self.timer.enter("push")
        for count, micro_batch in enumerate(micro_batches, start=1):
            inputs = self._inputs(step.examples, micro_batch)
            coefficients = self._select(output.coefficients, micro_batch)[inputs.examples]
            coefficient_fn = partial(_token_coefficients, inputs, coefficients)
            weighted_sum = self._forward(step.number, micro_batch, inputs, coefficient_fn)
            self.engine.backward(weighted_sum, last=count == len(micro_batches))
        return output

    def _evaluate(self, batch: Batch, micro_batches: Sequence[MicroBatch], logps: Sequence[Tensor]) -> LossOutput:
        """The loss on the global batch, whose log-probs are gathered from all ranks."""
        gathered = gather_examples(len(batch.logps), micro_batches, logps, self.engine.device)
        return evaluate_objective(self.terms, self.states, replace(batch, logps=gathered))

    def _select(self, coefficients: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Coefficients [m] of a micro-batch's examples; a zero for a dummy."""
        return to_device(coefficients[micro_batch] if micro_batch else torch.zeros(1), self.engine.device)

    def _inputs(self, examples: TokenizedExamples, micro_batch: MicroBatch) -> ModelInputs:
        rows, weights = [examples[row] for row in micro_batch], examples.weights(self.position, micro_batch)
        constraint = examples.constraint(self.position, micro_batch)
        return collate(rows, self.packing, weights, constraint).to(self.engine.device)

    def _score(self, number: int, examples: TokenizedExamples, micro_batch: MicroBatch, grad: bool) -> Tensor:
        """Log-probs [m] of a micro-batch of ``examples`` ([1] for a dummy), with a graph when ``grad``."""
        inputs = self._inputs(examples, micro_batch)
        with torch.set_grad_enabled(grad):
            return inputs.sum_per_example(self._forward(number, micro_batch, inputs), max(1, len(micro_batch)))

    def _score_all(self, step: RankStep, examples: TokenizedExamples, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Log-probs [n] of ``examples`` over all ranks, of which this one scores ``micro_batches``, without graph."""
        if not len(examples):
            return torch.zeros(0)
        logps = self._score_each(step.number, examples, micro_batches)
        return gather_examples(len(examples), micro_batches, logps, self.engine.device)

    def _score_each(
        self, number: int, examples: TokenizedExamples, micro_batches: Sequence[MicroBatch]
    ) -> list[Tensor]:
        """Log-probs [m] of each micro-batch, without graph."""
        return [self._score(number, examples, micro_batch, grad=False) for micro_batch in micro_batches]

    def _forward(
        self,
        number: int,
        micro_batch: MicroBatch,
        inputs: ModelInputs,
        coefficient_fn: CoefficientFn | None = None,
        runs: Sequence[int] = (),
    ) -> Tensor:
        """Token log-probs [t] of a micro-batch, or with ``coefficient_fn`` their weighted sum (see LogProbHead)."""
        # both passes over a micro-batch must draw the same dropout masks
        torch.manual_seed(_seed(self.seed, number, *micro_batch))
        self.forwards += 1
        self.timer.advance()
        self.head.set_targets(inputs.rows, inputs.columns, inputs.targets, coefficient_fn, runs)
        return self.engine(**inputs.forward_kwargs()).logits  # type: ignore[no-any-return]

    def _score_without_adapters(self, step: RankStep) -> tuple[Tensor, Tensor]:
        """Reference log-probs [n] and [m] of the step, from the policy without its adapters and without dropout."""
        model, layout = self.engine.model, step.layout
        training = model.training
        model.eval()
        with model.disable_adapter():
            logps = self._score_all(step, step.examples, layout.scoring)
            mismatched_logps = self._score_all(step, step.mismatched, layout.mismatched)
        model.train(training)
        return logps, mismatched_logps


def gather_examples(
    count: int, micro_batches: Sequence[MicroBatch], values: Sequence[Tensor], device: torch.device
) -> Tensor:
    """All ranks' values [count, ...] of ``count`` examples, fp32 on the CPU, in example order.

    ``values[i]`` [m, ...] are this rank's values for ``micro_batches[i]``; those of an empty one are ignored. The
    collective runs on ``device``.
    """
    gathered = torch.zeros((count, *values[0].shape[1:]), device=device)
    for micro_batch, value in zip(micro_batches, values, strict=True):
        if micro_batch:
            gathered[to_device(torch.tensor(micro_batch), device)] = value.detach().float()
    return dist.sum_over_ranks(gathered).cpu()


def concatenate_batches(batches: Sequence[Batch], order: np.ndarray, units: np.ndarray) -> Batch:
    """The batches of parts of a set as one, in the set's order and with its pairs.

    ``order`` [n]: the set's row of each example of the parts, one after another; ``units`` [u, 2] as in StoredExamples.
    """
    in_order = torch.from_numpy(np.argsort(order))
    columns = ("logps", "reference_logps", "aligned", "tokens")
    joined = {name: torch.cat([getattr(batch, name) for batch in batches])[in_order] for name in columns}
    mismatched = torch.cat([batch.mismatched_log_ratios for batch in batches])
    pairs = torch.from_numpy(units[units[:, 1] >= 0])
    return Batch(**joined, pairs=pairs, mismatched_log_ratios=mismatched[in_order] if len(mismatched) else mismatched)


def select_examples(batch: Batch, rows: np.ndarray) -> Batch:
    """The examples of a batch at ``rows`` [m], in this order, with the pairs that are complete among them."""
    chosen = torch.from_numpy(rows)
    positions = torch.full((len(batch.logps),), -1)
    positions[chosen] = torch.arange(len(chosen))
    pairs = positions[batch.pairs]
    mismatched = batch.mismatched_log_ratios
    return Batch(
        logps=batch.logps[chosen],
        reference_logps=batch.reference_logps[chosen],
        aligned=batch.aligned[chosen],
        tokens=batch.tokens[chosen],
        pairs=pairs[(pairs >= 0).all(1)],
        mismatched_log_ratios=mismatched[chosen] if len(mismatched) else mismatched,
    )


def _token_coefficients(inputs: ModelInputs, coefficients: Tensor, part: slice, token_logps: Tensor) -> Tensor:
    """Coefficients of a part of the scored positions, from those of their examples, [t]."""
    return coefficients[part] * inputs.slopes(token_logps, part)


def _runs(examples: TokenizedExamples, micro_batch: MicroBatch, in_pairs: bool) -> list[int]:
    """Response tokens of each example of a micro-batch, or of each pair, whose two are neighbours; a dummy has one."""
    runs: list[int] = []
    previous_pair = -1
    for position in micro_batch:
        tokens, pair = int(examples.response_lengths[position]), int(examples.pair[position])
        if in_pairs and pair >= 0 and pair == previous_pair:
            runs[-1] += tokens
        else:
            runs.append(tokens)
        previous_pair = pair
    return runs or [1]


def _seed(*parts: int) -> int:
    """A generator seed that differs, but for negligible chance, between any two sequences of numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big", signed=True)
