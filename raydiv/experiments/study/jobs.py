"""The cells of a study as Ray jobs: each trains in a process of its own on the cluster, several at a time."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raydiv.config import load_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.resume import resumes
from raydiv.runtime.submit.jobs import CONNECTION_ERRORS, Jobs

FORWARDED = ("RAYDIV_CACHE", "HF_HOME")
"""Environment variables that a job inherits. No secrets: everyone who sees the cluster's jobs sees their variables."""

RUN_KEY = "raydiv.run"
"""Key of a job's metadata: the directory of the run that it trains."""

POLL_S = 1.0
"""Seconds between two requests for the status of the jobs."""


@dataclass(frozen=True, slots=True)
class CellJob:
    """A cell as a job: its recipe file, its run directory, its log, and the variables that its recipe sets."""

    name: str
    recipe: Path
    run: Path
    log: Path
    recipe_variables: frozenset[str]


OnEnd = Callable[[CellJob, str | None], None]
"""Called with each ended job and its error; None is success."""


def run_jobs(jobs: Sequence[CellJob], at_once: int, on_end: OnEnd, report: Callable[[str], None]) -> None:
    """Run the jobs in order, ``at_once`` at a time, until all have ended; needs a Ray session with its dashboard.

    A job that still runs from an earlier attempt is followed, not submitted again. If this function is interrupted, the
    running jobs are stopped and have time for a checkpoint. A job that succeeds without a result in its run directory
    counts as failed. If the study is a job itself, its jobs inherit its working directory and its version of raydiv.
    """
    import ray

    cluster = Jobs(ray.get_runtime_context().gcs_address)
    statuses = cluster.retry(lambda: cluster.all(RUN_KEY))
    running = {status.name: status.id for status in statuses if status.exit_code is None}
    waiting = sorted(jobs, key=lambda job: str(job.run) not in running)
    with _stop_on_exit(cluster, report) as active:
        while waiting or active:
            while waiting and len(active) < at_once:
                job = waiting.pop(0)
                active[running.get(str(job.run)) or _submit(cluster, job)] = job
            time.sleep(POLL_S)
            by_id = {status.id: status for status in cluster.retry(lambda: cluster.all(RUN_KEY))}
            for submission, job in list(active.items()):
                status = by_id.get(submission)
                if status is None:
                    raise RuntimeError(f"job {submission} of {job.name} is missing from the cluster's list of jobs")
                if status.exit_code is not None:
                    del active[submission]
                    log = cluster.retry(partial(cluster.log, submission))
                    job.log.write_text(log)
                    succeeded = status.status == "SUCCEEDED"
                    on_end(job, _missing_result(job) if succeeded else _error_in(log) or status.status.lower())


def _submit(cluster: Jobs, job: CellJob) -> str:
    """Submit a job; returns its id. A directory whose run cannot be resumed with this recipe is removed first."""
    run = RunDirectory(job.run)
    if not (run.holds_a_run and resumes(run, load_recipe(job.recipe))):
        shutil.rmtree(job.run, ignore_errors=True)
    command = [sys.executable, "-m", "raydiv", "train", str(job.recipe), "--json", "--resume"]
    return cluster.submit(
        # relative paths in the recipe start at the study's working directory
        f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}",
        {**_inherited_environment(), "env_vars": _variables(job)},
        {RUN_KEY: str(job.run), "name": job.name},
    )


def _inherited_environment() -> dict[str, Any]:
    """The runtime environment of this process without its variables; empty if the process is no job."""
    import ray

    return {key: value for key, value in ray.get_runtime_context().runtime_env.items() if key != "env_vars"}


def _variables(job: CellJob) -> dict[str, str]:
    """The forwarded variables without those that the recipe sets: Ray refuses a variable that is set twice."""
    return {name: os.environ[name] for name in FORWARDED if name in os.environ and name not in job.recipe_variables}


def _missing_result(job: CellJob) -> str | None:
    if RunDirectory(job.run).result.is_file():
        return None
    return f"the job succeeded without a result in {job.run}: output_dir must be on shared storage"


@contextmanager
def _stop_on_exit(cluster: Jobs, report: Callable[[str], None]) -> Iterator[dict[str, CellJob]]:
    """Active jobs by submission id. Those left when the block ends are stopped, since a local Ray then shuts down."""
    active: dict[str, CellJob] = {}
    try:
        yield active
    finally:
        for submission in active:
            with suppress(*CONNECTION_ERRORS):  # an error for one job must not keep the others running
                cluster.stop(submission)
        if active:
            report(f"stopping {len(active)} cells, which write a checkpoint first; press Ctrl-C again to not wait")
        with suppress(*CONNECTION_ERRORS):
            while any(status.id in active and status.exit_code is None for status in cluster.all(RUN_KEY)):
                time.sleep(POLL_S)


def _error_in(log: str) -> str | None:
    """The last message of raydiv in a log, else its last line; None for an empty log."""
    lines = [line for line in log.splitlines() if line.strip()]
    prefix = "raydiv: "
    messages = [line.removeprefix(prefix).removeprefix("the run failed: ") for line in lines if line.startswith(prefix)]
    return (messages or lines)[-1] if lines else None
