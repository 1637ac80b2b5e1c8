"""``raydiv submit``: run a command as a Ray job on a cluster.

The working directory of the job holds the recipe and the local files that it names. Only one job runs under a name: the
same command is not submitted again while it runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raydiv.data.bundled import QUICKSTART
from raydiv.runtime.submit.bundle import JobBundle, make_bundle
from raydiv.runtime.submit.environment import job_variables, read_runtime_environment, runtime_environment
from raydiv.runtime.submit.jobs import Jobs, JobStatus, address_of, command_of
from raydiv.utils.errors import UserError

RESUMABLE = ("train", "sweep", "study")
"""Commands that resume an earlier run; their jobs always get ``--resume``."""

RUN_WRITERS = (*RESUMABLE, "bench")
"""Commands that write into the recipe's output_dir."""


@dataclass(frozen=True, slots=True)
class Submission:
    """The ID and name of a job at ``jobs``. ``bundle`` was uploaded for it; None where the job was running already."""

    jobs: Jobs
    job: str
    name: str
    bundle: JobBundle | None


def submit(
    words: Sequence[str],
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    address: str | None = None,
    env: Sequence[str] = (),
    runtime_env: Path | None = None,
    token_path: Path | None = None,
) -> Submission:
    """Submit a command line ``words``, such as ``["train", "recipe.yaml", "optim.lr=1e-4"]``; returns its job.

    ``recipe`` and ``overrides`` are those among the words. The job's ``name`` is by default the recipe's; ``env`` holds
    ``NAME`` or ``NAME=VALUE``; ``runtime_env`` is a YAML file with further keys of Ray's runtime environment.

    Raises UserError for a command that cannot run as a job, an unreachable cluster, a secret among the variables, and a
    name under which another command runs.
    """
    command, *rest = words
    if command == "submit":
        raise UserError("submit: the command to submit cannot be submit itself")
    if command == "quickstart":  # a job trains the bundled recipe by its file
        command, recipe, rest = "train", str(QUICKSTART), [str(QUICKSTART), *rest]
    resume = ["--resume"] if command in RESUMABLE and "--resume" not in rest else []
    variables, extra = job_variables(env), read_runtime_environment(runtime_env)
    with make_bundle([command, *rest, *resume], recipe, overrides, leaves_a_run=command in RUN_WRITERS) as bundle:
        bundled = bundle.recipe
        name = name or (bundled.name if bundled is not None else command)
        jobs = jobs_at(address, bundled.cluster.address if bundled is not None else None, token_path)
        running = jobs.running(name)
        if running is None:
            job = jobs.submit_command(name, bundle.command, runtime_environment(bundle, variables, extra))
            return Submission(jobs, job, name, bundle)
        if running.command != command_of(bundle.command):
            raise UserError(
                f"--name: job {running.id} named {name} runs another command ({running.command}); wait for it, stop it "
                f"(raydiv submit stop {running.id}), or choose another name (--name)"
            )
        return Submission(jobs, running.id, name, None)


def jobs_at(address: str | None, recipe_address: str | None = None, token_path: Path | None = None) -> Jobs:
    """The jobs of the cluster at ``address``, else RAY_ADDRESS, else the recipe's. Raises UserError if none answers."""
    if token_path is not None:
        if not token_path.is_file():
            raise UserError(f"--token-path {token_path}: no such file")
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
    return Jobs(address_of(address, recipe_address))


def missing_module(job: JobStatus) -> str | None:
    """The Python module that a failed job could not import."""
    match = re.search(r"No module named '([^']+)'", job.message) if job.exit_code else None
    return match[1] if match else None
