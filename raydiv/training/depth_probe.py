"""Depth of the held-out margin during training: by which token half of it lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydiv.data.tokens import StoredExamples
from raydiv.evaluation.depth import HeldOutDepth, chosen_examples
from raydiv.model.chat import Ids
from raydiv.runs.directory import RunDirectory
from raydiv.training.metrics import log_metrics
from raydiv.training.schedule import is_due
from raydiv.training.state import TrainState
from raydiv.training.step import Stepper
from raydiv.utils import distributed as dist
from raydiv.utils.storage import read_json, write_json


@dataclass(frozen=True, slots=True)
class DepthMeasurement:
    """Measures the depth of held-out examples every so many steps. All ranks must call its methods.

    ``examples``: (prompt ids, response ids) with the label ``aligned`` of each; without any it does nothing. Their
    log-probs before the first step are the reference's, since the policy starts as its reference.
    """

    run: RunDirectory
    stepper: Stepper
    examples: list[tuple[Ids, Ids]]
    aligned: np.ndarray
    every: int | None

    @classmethod
    def of(
        cls, run: RunDirectory, stepper: Stepper, held_out: StoredExamples | None, every: int | None
    ) -> DepthMeasurement:
        """On a sample of the held-out examples; an event says so where they lack a class."""
        nothing = cls(run, stepper, [], np.zeros(0, bool), every)
        if held_out is None or every is None:
            return nothing
        if held_out.aligned.all() or not held_out.aligned.any():
            missing = "unaligned" if held_out.aligned.all() else "aligned"
            if dist.rank() == 0:
                run.events.log(f"evaluate.depth_every: nothing is measured: no held-out example is {missing}")
            return nothing
        rows = chosen_examples(held_out.aligned)
        return cls(run, stepper, list(held_out.ids(rows)), held_out.aligned[rows], every)

    def before_training(self) -> None:
        """Keep the reference's log-probs in the run, where a resumed one finds them."""
        if self.examples:
            logps = self._token_logps()
            if dist.rank() == 0:
                write_json(self.run.depth_reference, [values.tolist() for values in logps])

    def after_step(self, step: int, state: TrainState) -> dict[str, float]:
        """Log and return ``eval/depth/half`` where it is due after ``step``, on rank 0; empty elsewhere.

        It has no value while the margin is not positive. The end of training needs none: the written model is measured
        then.
        """
        if not self.examples or state.end_reason is not None or not is_due(self.every, step):
            return {}
        logps = self._token_logps()
        if dist.rank():
            return {}
        reference = read_json(self.run.depth_reference)
        ratios = [values - np.array(before) for values, before in zip(logps, reference, strict=True)]
        half = HeldOutDepth.of(ratios, self.aligned).margin.half
        metrics = {} if half is None else {"eval/depth/half": float(half)}
        log_metrics(self.run, {"step": step, **metrics} if metrics else {})
        return metrics

    def _token_logps(self) -> list[np.ndarray]:
        self.stepper.timer.enter("depth")
        return [values.numpy() for values in self.stepper.token_logps(self.examples)]
