"""Ray jobs of a cluster, through Ray's job API: submit, list, follow and stop them."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from raydiv.runtime.session import AUTH_HELP
from raydiv.utils import compat
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.signals import SIGTERM_EXIT_STATUS

MIN_RAY_VERSION = "2.55"
"""Oldest Ray of a cluster; the lower bound in pyproject.toml."""

NAME_KEY, COMMAND_KEY = "raydiv.name", "raydiv.command"
"""Keys of a job's metadata."""

RETRY_S = 3.0
"""Seconds before a request that failed, or a lost connection, is tried again."""

MAX_OUTAGE_S = 600.0
"""Seconds that a cluster may not answer: its dashboard restarts, or a laptop changes networks."""

IDLE_TIMEOUT_S = 300.0
"""Seconds without a message before a reconnect: a connection that was lost while a laptop slept reports no error."""

AGENT_TIMEOUT_S = 60.0
"""Seconds that a new cluster has to start its job agent."""

STOP_SECONDS = 600
"""Seconds that a stopped job has for its current step and its checkpoint; Ray's default is 3."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobStatus:
    """``status`` is Ray's; ``exit_code`` is the command's, None while it runs."""

    id: str
    name: str
    command: str
    status: str
    message: str
    exit_code: int | None
    started: float | None
    ended: float | None


class _UnreachableError(UserError):
    """No dashboard answers at a cluster's address."""


class OutageError(RuntimeError):
    """A cluster that answered before has not answered for MAX_OUTAGE_S."""


CONNECTION_ERRORS = (_UnreachableError, RuntimeError, OSError)
"""Errors of a lost connection, and of a dashboard or proxy that cannot answer for a moment."""


class Jobs:
    """The jobs of the cluster at ``address``: http://HEAD:8265, or HEAD:6379 where that port is reachable.

    Raises UserError where no cluster answers, where it refuses the token, and where its Ray is too old.
    """

    def __init__(self, address: str) -> None:
        from packaging.version import parse
        from ray.job_submission import JobSubmissionClient

        self.address = address
        with self._user_errors():
            self._client = JobSubmissionClient(address)
        version = compat.server_ray_version(self._client)
        if parse(version) < parse(MIN_RAY_VERSION):
            raise UserError(f"{address}: runs Ray {version}; raydiv needs Ray {MIN_RAY_VERSION} or newer there")

    def submit(self, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
        """Submit a job; returns its id. Raises UserError where no agent of the cluster starts jobs."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **runtime_env.get("env_vars", {})}
        job = {"runtime_env": {**runtime_env, "env_vars": variables}, "metadata": dict(metadata)}
        end = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            try:
                with self._user_errors():
                    return str(self._client.submit_job(entrypoint=entrypoint, **job))
            except RuntimeError as error:
                if not compat.is_missing_job_agent(error):
                    raise
                if time.monotonic() > end:
                    raise UserError(
                        f"{self.address}: the Ray cluster's job agent does not answer. Its port (52365) can belong to "
                        "one Ray of a machine: stop the other one, or start the cluster's head with another port (ray "
                        "start --head --dashboard-agent-listen-port PORT)"
                    ) from None
            time.sleep(RETRY_S)

    def submit_command(self, name: str, words: Sequence[str], runtime_env: Mapping[str, Any]) -> str:
        """Submit a command of raydiv; returns the job's id."""
        command = command_of(words)
        return self.submit(f"python -m raydiv {command}", runtime_env, {NAME_KEY: name, COMMAND_KEY: command})

    def find(self, job: str) -> JobStatus:
        """The job with an id, or the newest one with a name. Raises UserError where there is none."""
        jobs = self.all()
        status = next((status for status in jobs if job in (status.id, status.name)), None)
        if status is None:
            names = ", ".join(dict.fromkeys(status.name for status in jobs)) or "none"
            raise UserError(f"{job}: no job with this id or name at {self.address}; raydiv's jobs there: {names}")
        return status

    def running(self, name: str) -> JobStatus | None:
        """A job with this name that has not ended."""
        return next((job for job in self.all() if job.name == name and job.exit_code is None), None)

    def all(self, key: str = NAME_KEY) -> list[JobStatus]:
        """The jobs whose metadata has ``key``, newest first; the key's value is their name."""
        with self._user_errors():
            details = self._client.list_jobs()
        jobs = [_job_status(job, key) for job in details if job.submission_id and (job.metadata or {}).get(key)]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        with self._user_errors():
            return str(self._client.get_job_logs(job))

    def retry(self, request: Callable[[], T]) -> T:
        """The result of ``request``, which is repeated for MAX_OUTAGE_S while the cluster does not answer.

        Raises OutageError after that.
        """
        end = time.monotonic() + MAX_OUTAGE_S
        while True:
            try:
                return request()
            except CONNECTION_ERRORS as error:
                if time.monotonic() >= end:
                    raise OutageError(
                        f"{self.address}: the cluster has not answered for {MAX_OUTAGE_S:.0f} s: {error}"
                    ) from None
            time.sleep(RETRY_S)

    def follow(self, job: str, write: Callable[[str], object]) -> JobStatus:
        """Write what a job prints, from its beginning, until it has ended; reconnects where the connection is lost.

        Returns the status of the ended job. Raises UserError where the cluster does not answer for MAX_OUTAGE_S.
        """
        log = _LogWriter(write)
        while True:
            complete = self._tail(job, log)
            try:
                status = self.retry(lambda: self.find(job))
                if status.exit_code is not None:
                    if not complete:
                        log.write(self.retry(lambda: self.log(job)))
                    return status
            except OutageError as error:
                raise UserError(
                    f"{error}; job {job} was not stopped: raydiv submit logs {job} follows it again"
                ) from None
            time.sleep(RETRY_S)

    def _tail(self, job: str, log: _LogWriter) -> bool:
        """Write a job's log from its beginning as it arrives; returns whether it was read to its end."""
        position, messages = 0, self._client.tail_job_logs(job)
        with asyncio.Runner() as runner:
            while True:
                try:
                    with self._user_errors():
                        text = runner.run(asyncio.wait_for(anext(messages, None), IDLE_TIMEOUT_S))
                except CONNECTION_ERRORS:
                    return False
                if text is None:
                    return True
                log.write(text, position)
                position += len(text)

    def stop(self, job: str) -> None:
        """Stop a job: it gets SIGTERM, and STOP_SECONDS for a checkpoint."""
        with self._user_errors():
            self._client.stop_job(job)

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        """Raise the client's authentication and connection errors as UserError."""
        import aiohttp
        import ray.exceptions
        import requests

        try:
            yield
        except ray.exceptions.AuthenticationError:
            raise UserError(f"{self.address}: the cluster refused the request without its token; {AUTH_HELP}") from None
        except (ConnectionError, requests.exceptions.ConnectionError, aiohttp.ClientError):  # three unrelated classes
            raise _UnreachableError(
                f"{self.address}: no Ray dashboard answers there. Is the cluster up, and the port forwarded (kubectl "
                "port-forward, ray dashboard, ssh -L 8265:localhost:8265)?"
            ) from None


class _LogWriter:
    """Writes a log that every connection sends from its beginning, each part once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._written = write, 0

    def write(self, text: str, position: int = 0) -> None:
        """Write what is new of ``text``, which begins at ``position`` of the log."""
        new = text[max(0, self._written - position) :]
        if new:
            self._write(new)
            self._written = position + len(text)


def command_of(words: Sequence[str]) -> str:
    """A command of raydiv as a job's metadata has it."""
    return shlex.join(words)


def _job_status(details: Any, name_key: str) -> JobStatus:
    metadata, status = details.metadata or {}, str(details.status)
    exit_code = None
    if details.status.is_terminal():
        by_status = {"SUCCEEDED": 0, "STOPPED": SIGTERM_EXIT_STATUS}.get(status, 1)
        exit_code = by_status if details.driver_exit_code is None else int(details.driver_exit_code)
    return JobStatus(
        details.submission_id,
        metadata.get(name_key, ""),
        metadata.get(COMMAND_KEY, details.entrypoint),
        status,
        one_line(details.message or ""),
        exit_code,
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
    )


def address_of(option: str | None, recipe: str | None) -> str:
    """The cluster's address: of --address, RAY_ADDRESS or the recipe, in this order. Raises UserError without any."""
    address = option or os.environ.get("RAY_ADDRESS") or recipe
    if not address:
        raise UserError(
            "no cluster address: set --address http://HEAD:8265, RAY_ADDRESS, or cluster.address in the recipe"
        )
    return address
