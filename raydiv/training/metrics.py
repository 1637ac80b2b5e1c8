"""The metrics of a training step, and what each means."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from raydiv.config.loss import LossConfig
from raydiv.data.batching import StepPlan
from raydiv.losses import Batch, State, Term
from raydiv.losses.numerics import ema_update
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics
from raydiv.training.step_timer import STEP_PHASES, StepTimer
from raydiv.training.utilisation import Utilisation
from raydiv.utils import distributed as dist


def step_record(
    plan: StepPlan,
    tokens: int,
    metrics: Metrics,
    lr: float,
    timer: StepTimer,
    utilisation: Utilisation | None = None,
) -> Metrics:
    """A line of metrics.jsonl: ``metrics`` of the loss with ``grad_norm`` (before clipping), and the cost of the step.

    - ``step`` counts from 1; steps that were refused count too.
    - ``tokens``: those of the global batch, prompts included, without padding, mismatched examples and dummies.
    - ``step_seconds``: rank 0's wall time, which its phases share out: ``data_seconds`` is the wait for data, the
      others are described in raydiv.training.step.
    - ``checkpoint_seconds``, not part of it: how long training paused for a checkpoint since the previous step.
    - ``skew_seconds``: how long the rank that first finished scoring waited for the last one.
    - ``peak_memory_bytes``: of the worker with the largest.
    - ``peak_reserved_bytes``, on GPUs: what torch's allocator took of that worker's GPU, fragmentation included.
    - ``mfu``, on GPUs: the model FLOPs utilisation of all workers.

    On GPUs a phase ends when its kernels are launched; ``step_seconds`` is right, since the step waits for its norm.

    All ranks must call it.
    """
    by_phase = timer.take_seconds()
    phases = {f"{phase}_seconds": by_phase.get(phase, 0.0) for phase in STEP_PHASES}
    seconds = sum(phases.values())
    of_ranks = dist.all_gather_object((peak_memory(), peak_reserved(), timer.seconds_to_judge))
    memory, reserved, arrivals = zip(*of_ranks, strict=True)
    return {
        "step": plan.step + 1,
        "epoch": plan.epoch,
        **metrics,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        **({} if utilisation is None else {MFU: utilisation.share(tokens / seconds)}),
        "step_seconds": seconds,
        **phases,
        "checkpoint_seconds": by_phase.get("checkpoint", 0.0),
        "skew_seconds": max(arrivals) - min(arrivals),
        "peak_memory_bytes": max(memory),
        **({RESERVED: max(reserved)} if max(reserved) else {}),
    }


MFU, RESERVED = "mfu", "peak_reserved_bytes"
TIMED = ("step_seconds", *(f"{phase}_seconds" for phase in STEP_PHASES), "checkpoint_seconds", "skew_seconds")
STEP_COSTS = ("grad_norm", "lr", "tokens", "tokens_per_second", *TIMED, "peak_memory_bytes")
"""What ``step_record`` has besides step, epoch and the metrics of the loss; on GPUs, also MFU and RESERVED."""

AVERAGED = ("divergence", "reward/margin")
"""Step metrics that are also logged as running means, as ``NAME/ema``, since one step has few examples."""
EMA_RATE = 0.1


@dataclass
class RunningMeans:
    """Exponential moving averages of AVERAGED at EMA_RATE, from the first value on. The same on every rank."""

    values: dict[str, float] = field(default_factory=dict)

    def update(self, metrics: dict[str, float]) -> dict[str, float]:
        """Include a step's metrics; returns ``NAME/ema`` of all that had a value so far."""
        for name in AVERAGED:
            if name in metrics:
                self.values[name] = ema_update(self.values.get(name, metrics[name]), metrics[name], EMA_RATE)
        return {f"{name}/ema": value for name, value in self.values.items()}


def finite(record: Metrics) -> Metrics:
    """``record`` without the metrics that have no value: NaN and infinities are no JSON, and spoil means and charts."""
    return {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}


def log_metrics(run: RunDirectory, record: Metrics) -> None:
    """Write a line of metrics, which are the same on every rank; rank 0 writes it."""
    if dist.rank() == 0:
        run.metrics.append(finite(record))


def estimate_facts(loss: LossConfig) -> Metrics:
    """``divergence/name`` and, where there is one, ``divergence/ceiling``; empty without an estimate."""
    main = loss.terms[0]
    # the rewards of RewardWeights depend on the class, so that the formula's value bounds no divergence
    if main.divergence == "none" or loss.position.kind == "rewarded":
        return {}
    return {"divergence/name": main.divergence} | ({} if main.ceiling is None else {"divergence/ceiling": main.ceiling})


def state_metrics(terms: Sequence[Term], states: Sequence[State]) -> dict[str, float]:
    """``state/OBJECTIVE/NAME``: the running quantities after the step."""
    return {
        f"state/{term.name}/{name}": value
        for term, state in zip(terms, states, strict=True)
        for name, value in state.items()
    }


def rewards(batch: Batch, scale: float) -> Tensor:
    """Reward of each example [n], ``scale`` times its log-ratio, without graph."""
    return scale * batch.log_ratios.detach()


def reward_metrics(batch: Batch, scale: float) -> dict[str, float]:
    """Rewards, log-ratios and log-probs over the global batch; the metrics of an absent class are left out.

    ``reward/*``: means of ``scale`` times log-ratio per class, their difference, and the share of pairs whose aligned
    example has the larger reward (without pairs: of all couples of an aligned and an unaligned example, ties by half:
    the AUC, which does not change with a constant that an objective leaves free). Rewards are of whole
    sequences, also under objectives that divide by lengths, and count from zero where there is no reference.
    ``logp/*``: mean sequence log-probs (see Batch). ``log_ratio/rms`` and ``log_ratio/max``: root mean square and
    largest absolute log-ratio, in nats. At the first step, where the policy is the reference, these are the rounding
    noise of the reference's precision.
    """
    log_ratios = batch.log_ratios.detach()
    reward, aligned = rewards(batch, scale), batch.aligned
    metrics = {
        "log_ratio/rms": float(log_ratios.square().mean().sqrt()),
        "log_ratio/max": float(log_ratios.abs().max()),
    }
    for name, mask in (("aligned", aligned), ("unaligned", ~aligned)):
        if mask.any():
            metrics[f"reward/{name}"] = float(reward[mask].mean())
            metrics[f"logp/{name}"] = float(batch.logps.detach()[mask].mean())
    both = bool(aligned.any()) and not bool(aligned.all())
    if both:
        metrics["reward/margin"] = metrics["reward/aligned"] - metrics["reward/unaligned"]
    if len(batch.pairs):
        better, worse = batch.paired(reward)
        metrics["reward/accuracy"] = float((better > worse).float().mean())
    elif both:
        metrics["reward/accuracy"] = _auc(reward[aligned], reward[~aligned])
    return metrics


def _auc(positive: Tensor, negative: Tensor) -> float:
    """The share of couples of values [n] and [m] whose first is the larger, ties by half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False) + torch.searchsorted(ordered, positive, right=True)
    return float(below.double().mean()) / (2 * len(negative))


def peak_memory() -> float:
    """Peak memory of this process in bytes: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    import resource

    status = Path("/proc/self/status")
    # ru_maxrss of a child starts at its parent's value at the fork
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024.0 * float(peak[1] if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_reserved() -> float:
    """Bytes that torch's allocator took of the GPU at its peak; 0 without a GPU."""
    return float(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else 0.0
