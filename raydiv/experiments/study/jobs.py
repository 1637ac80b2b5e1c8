"""Runs as Ray jobs: each a process of its own on the cluster, of which so many run at once."""

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

PASSED = ("RAYDIV_CACHE", "HF_HOME")
"""Environment variables that a run needs as they are here; no secret, since whoever sees the cluster's jobs sees them."""

RUN_KEY = "raydiv.run"
"""Key of a job's metadata: the run that it trains."""

POLL_S = 1.0
"""Seconds between two requests for the status of the jobs."""


@dataclass(frozen=True, slots=True)
class CellJob:
    """A run that is to be trained from a recipe file, where what it prints is kept, and which environment it sets itself."""

    name: str
    recipe: Path
    run: Path
    log: Path
    own_environment: frozenset[str]


Ended = Callable[[CellJob, str | None], None]
"""Told of each job that ended, with what it failed with, or None."""


def run_jobs(jobs: Sequence[CellJob], at_once: int, ended: Ended, say: Callable[[str], None]) -> None:
    """Run the jobs in order, ``at_once`` of them at a time, until all have ended; needs a Ray session with its dashboard.

    One that the cluster still runs for an earlier attempt is followed, not started again. Interrupted, those that run are
    stopped, and have the time for a checkpoint. A job that ends well and leaves no result where it is looked for has failed
    too. Where the study is a job itself, its jobs have what came with it: its folder, its version of raydiv.
    """
    import ray

    cluster = Jobs(ray.get_runtime_context().gcs_address)
    earlier = cluster.retry(lambda: cluster.all(RUN_KEY))
    running = {status.name: status.id for status in earlier if status.exit_code is None}
    waiting = sorted(jobs, key=lambda job: str(job.run) not in running)
    with _stopped_at_the_end(cluster, say) as active:
        while waiting or active:
            while waiting and len(active) < at_once:
                job = waiting.pop(0)
                active[running.get(str(job.run)) or _submit(cluster, job)] = job
            time.sleep(POLL_S)
            statuses = {status.id: status for status in cluster.retry(lambda: cluster.all(RUN_KEY))}
            for submission, job in list(active.items()):
                status = statuses.get(submission)
                if status is None:
                    raise RuntimeError(f"job {submission} of {job.name} is missing from the cluster's list of jobs")
                if status.exit_code is not None:
                    del active[submission]
                    log = cluster.retry(partial(cluster.log, submission))
                    job.log.write_text(log)
                    ended(job, _unseen(job) if status.status == "SUCCEEDED" else _reason(log, status.status))


def _submit(cluster: Jobs, job: CellJob) -> str:
    run = RunDirectory(job.run)
    if not (run.holds_a_run and resumes(run, load_recipe(job.recipe))):
        shutil.rmtree(job.run, ignore_errors=True)
    command = [sys.executable, "-m", "raydiv", "train", str(job.recipe), "--json", "--resume"]
    return cluster.submit(
        # relative paths of a recipe are of where the study was started
        f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}",
        {**_came_along(), "env_vars": _environment(job)},
        {RUN_KEY: str(job.run), "name": job.name},
    )


def _came_along() -> dict[str, Any]:
    """What this process was given as a job of the cluster, but for variables; nothing where it is none."""
    import ray

    return {key: value for key, value in ray.get_runtime_context().runtime_env.items() if key != "env_vars"}


def _environment(job: CellJob) -> dict[str, str]:
    """Ray refuses a variable that the run's own environment names too."""
    return {name: os.environ[name] for name in PASSED if name in os.environ and name not in job.own_environment}


def _unseen(job: CellJob) -> str | None:
    there = RunDirectory(job.run).result.is_file()
    return None if there else f"it ended well, and left nothing at {job.run}: output_dir must be on shared storage"


@contextmanager
def _stopped_at_the_end(cluster: Jobs, say: Callable[[str], None]) -> Iterator[dict[str, CellJob]]:
    """Jobs by submission id; those that are left when the block ends are stopped: a local Ray goes when this returns."""
    active: dict[str, CellJob] = {}
    try:
        yield active
    finally:
        for submission in active:
            with suppress(*CONNECTION_ERRORS):  # an error for one job must not keep the others running
                cluster.stop(submission)
        if active:
            say(
                f"cells told to stop: {len(active)}; one that trains writes a checkpoint, and Ctrl-C again does not wait"
            )
        with suppress(*CONNECTION_ERRORS):
            while any(status.id in active and status.exit_code is None for status in cluster.all(RUN_KEY)):
                time.sleep(POLL_S)


def _reason(log: str, status: str) -> str:
    """What a job failed with: the line that raydiv says it in, else the last one."""
    lines = [line for line in log.splitlines() if line.strip()]
    own = [
        line.removeprefix("raydiv: ").removeprefix("the run failed: ") for line in lines if line.startswith("raydiv: ")
    ]
    return (own or lines or [status.lower()])[-1]
