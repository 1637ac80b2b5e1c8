"""The jobs of a cluster, through Ray's job API: sent, found by id or name, followed and stopped."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raydiv.runtime.session import LET_IN, is_submitted_job
from raydiv.utils.errors import UserError
from raydiv.utils.signals import STATUS as STOPPED

OLDEST = "2.55"
"""Ray that a cluster is to have at the least: that of pyproject.toml."""

NAME, COMMAND = "raydiv.name", "raydiv.command"
"""Of a job's metadata."""

AGAIN_S = 3.0
"""Seconds before a log that has not ended, or whose connection was lost, is taken up again."""

PATIENCE_S = 600.0
"""Seconds that a cluster may be away while a job is followed: its dashboard restarts, or a laptop has changed networks."""

QUIET_S = 300.0
"""Seconds without a word after which a log is taken up again: of a connection that died in its sleep nothing is heard."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Of a job: ``status`` is Ray's word; ``exit_code`` that of the command, None while it runs."""

    id: str
    name: str
    command: str
    status: str
    message: str
    exit_code: int | None
    started: float | None
    ended: float | None


class _AwayError(UserError):
    """Nothing answers at a cluster's address."""


LOST = (_AwayError, RuntimeError, OSError)
"""What is raised where a connection is lost, or a dashboard or what stands before it cannot answer for a moment."""


class _WriteError(Exception):
    """What was read could not be handed on, by no fault of the connection."""

    def __init__(self, reason: OSError) -> None:
        self.reason = reason


class _Log:
    """A log that is always read from its beginning, and handed on once. ``pieces`` counts those that were read."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._written, self.pieces = write, 0, 0

    async def take(self, pieces: AsyncIterator[str]) -> None:
        """Raises TimeoutError where nothing comes for QUIET_S, and _WriteError."""
        read, now = 0, asyncio.get_running_loop().time
        async with asyncio.timeout(QUIET_S) as quiet:
            async for piece in pieces:
                quiet.reschedule(now() + QUIET_S)
                self._hand_on(piece, read)
                read += len(piece)
                self.pieces += 1

    def take_whole(self, text: str) -> None:
        self._hand_on(text, 0)

    def _hand_on(self, piece: str, at: int) -> None:
        """What of a piece, which begins ``at`` so many characters, is new."""
        new = piece[max(0, self._written - at) :]
        if new:
            try:
                self._write(new)
            except OSError as error:
                raise _WriteError(error) from None
            self._written = at + len(piece)


class Jobs:
    """The jobs of the cluster at an ``address``: http://HEAD:8265, or HEAD:6379 where that is reached.

    Raises UserError where there is none, where it lets nobody in without a token, and where its Ray is too old.
    """

    def __init__(self, address: str) -> None:
        import ray
        from packaging.version import parse
        from ray.job_submission import JobSubmissionClient

        self.address = address
        with self._told():
            self._client = JobSubmissionClient(address)
        theirs = str(self._client._server_ray_version or ray.__version__)
        if parse(theirs) < parse(OLDEST):
            raise UserError(f"{address}: runs Ray {theirs}, and raydiv needs {OLDEST} or newer there")

    def send(self, name: str, words: Sequence[str], runtime_env: Mapping[str, Any]) -> str:
        """Send a command of raydiv; returns the job's id."""
        command = command_of(words)
        with self._told():
            return is_submitted_job(
                self._client,
                entrypoint=f"python -m raydiv {command}",
                runtime_env=dict(runtime_env),
                metadata={NAME: name, COMMAND: command},
            )

    def find(self, wanted: str) -> JobStatus:
        """The job of an id, or the newest one of a name. Raises UserError where there is none."""
        jobs = self.all()
        found = next((job for job in jobs if wanted in (job.id, job.name)), None)
        if found is None:
            names = ", ".join(dict.fromkeys(job.name for job in jobs)) or "none of raydiv's"
            raise UserError(f"{wanted}: no job of that id or name at {self.address}; there are: {names}")
        return found

    def running(self, name: str) -> JobStatus | None:
        """A job of that name which has not ended."""
        return next((job for job in self.all() if job.name == name and job.exit_code is None), None)

    def all(self) -> list[JobStatus]:
        """Those that raydiv sent, the newest first."""
        with self._told():
            listed = self._client.list_jobs()
        jobs = [_job_status(job) for job in listed if job.submission_id and (job.metadata or {}).get(NAME)]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def follow(self, job: str, write: Callable[[str], object]) -> JobStatus:
        """Hand on what a job prints, from its beginning, until it has ended; a lost connection is taken up again.

        Raises UserError where the cluster does not answer for PATIENCE_S, and what ``write`` raises.
        """
        try:
            return self._follow(job, _Log(write))
        except _WriteError as error:
            raise error.reason from None

    def _follow(self, job: str, log: _Log) -> JobStatus:
        away: float | None = None
        while True:
            before = log.pieces
            whole = self._read(job, log)
            if whole or log.pieces > before:
                away = None
            try:
                found = self.find(job)
                if found.exit_code is not None:
                    if not whole:
                        with self._told():
                            log.take_whole(self._client.get_job_logs(job))
                    return found
                away = None
            except LOST:
                away = time.monotonic() if away is None else away
                if time.monotonic() - away >= PATIENCE_S:
                    raise UserError(
                        f"{self.address}: has not answered for {PATIENCE_S:.0f} s; job {job} goes on without us, and raydiv "
                        f"submit logs {job} follows it again"
                    ) from None
            time.sleep(AGAIN_S)

    def _read(self, job: str, log: _Log) -> bool:
        """Whether the log could be read as far as it goes."""
        try:
            with self._told():
                asyncio.run(log.take(self._client.tail_job_logs(job)))
        except LOST:
            return False
        return True

    def stop(self, job: str) -> None:
        """Ask a job to end: it gets SIGTERM, and the time for a checkpoint."""
        with self._told():
            self._client.stop_job(job)

    @contextmanager
    def _told(self) -> Iterator[None]:
        import aiohttp
        import ray.exceptions
        import requests

        try:
            yield
        except ray.exceptions.AuthenticationError:
            raise UserError(f"{self.address}: lets nobody in without its token; {LET_IN}") from None
        except (ConnectionError, requests.exceptions.ConnectionError, aiohttp.ClientError):  # of three families
            raise _AwayError(
                f"{self.address}: no Ray dashboard answers there; is the cluster up, and the port open (kubectl port-forward, "
                "ray dashboard, ssh -L 8265:localhost:8265)?"
            ) from None


def command_of(words: Sequence[str]) -> str:
    """A command of raydiv as a job has it, and as one of its name is compared with it."""
    return shlex.join(words)


def _job_status(job: Any) -> JobStatus:
    metadata, status = job.metadata or {}, str(job.status)
    code = None
    if job.status.is_terminal():
        ended = {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(status, 1)
        code = ended if job.driver_exit_code is None else int(job.driver_exit_code)
    return JobStatus(
        job.submission_id,
        metadata.get(NAME, ""),
        metadata.get(COMMAND, job.entrypoint),
        status,
        " ".join((job.message or "").split()),
        code,
        job.start_time / 1000 if job.start_time else None,
        job.end_time / 1000 if job.end_time else None,
    )


def address_of(flag: str | None, recipe: str | None) -> str:
    """The cluster that a flag, RAY_ADDRESS or a recipe names, in this order. Raises UserError where none does."""
    found = flag or os.environ.get("RAY_ADDRESS") or recipe
    if not found:
        raise UserError(
            "no cluster is named: --address http://HEAD:8265, RAY_ADDRESS, or cluster.address in the recipe"
        )
    return found
