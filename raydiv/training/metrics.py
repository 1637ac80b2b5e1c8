"""What every step metric means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from raydiv.data.batching import StepPlan
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses import Batch, State, Term
from raydiv.losses.numerics import running
from raydiv.runs.directory import Metrics
from raydiv.training.step_timer import STEP_PHASES as PHASES
from raydiv.training.step_timer import StepTimer
from raydiv.training.utilisation import Utilisation
from raydiv.utils import distributed as dist


def step_record(
    plan: StepPlan,
    examples: TokenizedExamples,
    metrics: Metrics,
    lr: float,
    phases: StepTimer,
    utilisation: Utilisation | None = None,
) -> Metrics:
    """A line of metrics.jsonl: ``metrics`` of the objective and ``grad_norm`` (before clipping), and what the step took.

    ``step`` counts optimizer updates from 1; ``tokens`` are real ones of the global batch, prompts included: padding,
    mismatched examples and dummies do not count; ``step_seconds`` is rank 0's wall time, of which ``data_seconds`` passed in
    waiting for data, and the seconds of its other phases in them (see raydiv.training.step); ``checkpoint_seconds``, not among
    them, is how long training stood still for a checkpoint since the step before; ``peak_memory_bytes`` that of the worker
    with the most; ``skew_seconds`` how long the first rank that had scored its share waited for the last one; ``mfu``, on GPUs,
    the model FLOPs utilisation of them all.

    All ranks must call it.
    """
    tokens = sum(examples.lengths)
    spent = phases.spent()
    parts = {f"{phase}_seconds": spent.get(phase, 0.0) for phase in PHASES}
    seconds = sum(parts.values())
    memory, arrived = zip(*dist.all_gather_object((peak_memory(), phases.until_judged)), strict=True)
    return {
        "step": plan.step + 1,
        "epoch": plan.epoch,
        **metrics,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        **({} if utilisation is None else {MFU: utilisation.share(tokens / seconds)}),
        "step_seconds": seconds,
        **parts,
        "checkpoint_seconds": spent.get("checkpoint", 0.0),
        "skew_seconds": max(arrived) - min(arrived),
        "peak_memory_bytes": max(memory),
    }


MFU = "mfu"
TIMED = ("step_seconds", *(f"{phase}_seconds" for phase in PHASES), "checkpoint_seconds", "skew_seconds")
OF_A_STEP = ("grad_norm", "lr", "tokens", "tokens_per_second", *TIMED, "peak_memory_bytes")
"""What ``step_record`` has besides the objective's metrics, where step and epoch stand; on GPUs, MFU too."""

MEANS = ("divergence", "reward/margin")
"""Step metrics that are logged as running means too, as ``NAME/ema``: one step's examples are few."""
RATE = 0.1


@dataclass
class RunningMeans:
    """Exponential moving averages of MEANS at RATE per update, from the first value on. Same on every rank."""

    values: dict[str, float] = field(default_factory=dict)

    def update(self, metrics: dict[str, float]) -> dict[str, float]:
        """Take a step's metrics in; returns ``NAME/ema`` of what has been seen so far (a class may be absent in a step)."""
        for name in MEANS:
            if name in metrics:
                self.values[name] = running(self.values.get(name, metrics[name]), metrics[name], RATE)
        return {f"{name}/ema": value for name, value in self.values.items()}


def estimate_facts(main: Term) -> Metrics:
    """``divergence/name`` and, where there is one, ``divergence/ceiling`` of a run's main objective; empty if it has none."""
    if main.divergence == "none":
        return {}
    return {"divergence/name": main.divergence} | ({} if main.ceiling is None else {"divergence/ceiling": main.ceiling})


def state_metrics(terms: Sequence[Term], states: Sequence[State]) -> dict[str, float]:
    """``state/OBJECTIVE/NAME``: the running quantities that the step leaves to the next."""
    return {
        f"state/{term.name}/{name}": number
        for term, state in zip(terms, states, strict=True)
        for name, number in state.items()
    }


def rewards(batch: Batch, beta: float) -> Tensor:
    """Beta * log-ratio of each example [n], without graph."""
    return beta * batch.log_ratios.detach()


def reward_metrics(batch: Batch, beta: float) -> dict[str, float]:
    """What the step's log-probs say, over the global batch; a class that is absent leaves its metrics out.

    ``reward/*``: means of beta * log-ratio per class, their difference, and the share of pairs whose aligned example has
    the larger reward (without pairs: of examples whose reward has its label's sign). Rewards are of whole sequences, also
    under objectives that divide by lengths, and count from zero where there is no reference. ``logp/*``: mean sequence
    log-probs. ``log_ratio/rms`` and ``log_ratio/max``: root mean square and largest absolute log-ratio, in nats; at the first
    step, where the policy is the reference, they are the noise of the numbers that the reference was scored in.
    """
    log_ratios = batch.log_ratios.detach()
    reward, aligned = rewards(batch, beta), batch.aligned
    metrics = {
        "log_ratio/rms": float(log_ratios.square().mean().sqrt()),
        "log_ratio/max": float(log_ratios.abs().max()),
    }
    for name, members in (("aligned", aligned), ("unaligned", ~aligned)):
        if members.any():
            metrics[f"reward/{name}"] = float(reward[members].mean())
            metrics[f"logp/{name}"] = float(batch.logps.detach()[members].mean())
    if aligned.any() and not aligned.all():
        metrics["reward/margin"] = metrics["reward/aligned"] - metrics["reward/unaligned"]
    if len(batch.pairs):
        better, worse = batch.paired(reward)
        metrics["reward/accuracy"] = float((better > worse).float().mean())
    else:
        metrics["reward/accuracy"] = float((reward * (2.0 * aligned - 1) > 0).float().mean())
    return metrics


def peak_memory() -> float:
    """Peak memory of this process in bytes: the accelerator's where there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    import resource

    status = Path("/proc/self/status")
    # ru_maxrss of a child starts where its parent stood when it was forked
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024.0 * float(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
