"""One writer a directory: a claim beside it names the process that writes there, and is renewed while that lives."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from raydiv.utils.errors import UserError

RENEWAL_SECONDS = 10.0
"""Seconds between two renewals of a claim."""

SILENT_SECONDS = 60.0
"""Seconds without a renewal after which the process of another machine counts as ended."""

POLL_SECONDS = 0.2

SUFFIX = ".claim"

FOLLOW = "follow it (raydiv status {path}), and once it has ended resume it (--resume), or set another name=..."
"""What to do about the directory of another process's run, sweep or study."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a claim. ``started``: its creation time; ``token`` tells its claims apart.

    ``machine`` is that of its process ids, which containers of one host do not share.
    """

    host: str
    machine: str
    pid: int
    started: float
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            platform.node(),
            _machine(),
            os.getpid(),
            psutil.Process().create_time(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            uuid.uuid4().hex,
        )

    @property
    def has_ended(self) -> bool | None:
        """Whether a process of this machine has ended; None for another machine."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            is_another = abs(process.create_time() - self.started) > 1  # one second: clocks are adjusted
            return bool(is_another or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def claim(
    directory: Path, tell: Callable[[str], None], wait: float = 0.0, key: str = "output_dir", remedy: str = FOLLOW
) -> Iterator[None]:
    """Be the only process that writes into ``directory``, which need not exist, while the block runs.

    The claim of a process that has ended is taken over, and ``tell`` gets a line on that. Raises UserError where
    another process still holds it after ``wait`` seconds, with the ``remedy``, and where nothing can be written there,
    with the ``key`` that names the place. Works on any storage with atomic links or exclusive creation, such as NFS.
    """
    file, holder = _claim_of(directory), Holder.this_process()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _acquire(file, holder, tell, wait, remedy.format(path=directory))
    except OSError as error:
        raise UserError(f"{key}: {file.parent} cannot be written: {error.strerror or error}") from None
    done = threading.Event()
    renewal = threading.Thread(target=_renew, args=(file, done), daemon=True, name="claim")
    renewal.start()
    try:
        yield
    finally:
        done.set()
        renewal.join()
        if _holder_of(file) == holder:
            file.unlink(missing_ok=True)


def is_claimed(directory: Path) -> bool:
    """Whether a living process writes into ``directory``."""
    file = _claim_of(directory)
    holder = _holder_of(file)
    if holder is None:
        return False
    ended = holder.has_ended
    if ended is not None:
        return not ended
    try:
        # by this machine's clock: _is_stale writes a file to read that of the storage, and a reader writes nothing
        return time.time() - file.stat().st_mtime <= SILENT_SECONDS
    except FileNotFoundError:
        return False


def _claim_of(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{SUFFIX}")


def _acquire(file: Path, holder: Holder, tell: Callable[[str], None], wait: float, remedy: str) -> None:
    directory, end = file.with_name(file.name[1:].removesuffix(SUFFIX)), time.monotonic() + wait
    while not _create(file, holder):
        before = _holder_of(file)
        stale = _is_stale(file, before)
        if stale and _remove_stale(file, before, holder):
            tell(f"{directory}: taken over from {before or 'a process'}, which has ended")
        elif not stale and time.monotonic() >= end and file.exists():
            raise UserError(f"{directory}: another process writes here ({before or 'not known yet'}); {remedy}")
        else:
            time.sleep(POLL_SECONDS)


def _create(file: Path, holder: Holder) -> bool:
    """Whether this process made the claim. It appears with its content at once."""
    draft = file.with_name(f"{file.name}.{holder.token}")
    draft.write_text(json.dumps(asdict(holder)))
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    except OSError:  # storage without links
        return _create_exclusively(file, holder)
    finally:
        draft.unlink(missing_ok=True)
    return True


def _create_exclusively(file: Path, holder: Holder) -> bool:
    try:
        with file.open("x") as content:
            content.write(json.dumps(asdict(holder)))
    except FileExistsError:
        return False
    return True


def _holder_of(file: Path) -> Holder | None:
    """The holder that a claim names; None where there is none, or not yet its content."""
    try:
        return Holder(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_stale(file: Path, holder: Holder | None) -> bool:
    ended = None if holder is None else holder.has_ended
    return _silence(file) > SILENT_SECONDS if ended is None else ended


def _silence(file: Path) -> float:
    """Seconds since the last renewal by the clock of the storage; 0 where the claim is gone."""
    clock = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    clock.touch()
    try:
        return clock.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        clock.unlink(missing_ok=True)


def _remove_stale(file: Path, ended: Holder | None, by: Holder) -> bool:
    """Whether this process removed the claim of ``ended``; several may try at once.

    Only the process with a claim on the removal removes: the claim that another has taken over meanwhile stays.
    """
    removal = file.with_name(f"{file.name}.{ended.token if ended else 'unknown'}")
    if not _create(removal, by):
        before = _holder_of(removal)
        if _is_stale(removal, before):
            _remove_stale(removal, before, by)
        return False
    try:
        is_stale = _holder_of(file) == ended and _is_stale(file, ended)
        if is_stale:
            file.unlink(missing_ok=True)
        return is_stale
    finally:
        removal.unlink(missing_ok=True)


def _renew(file: Path, done: threading.Event) -> None:
    while not done.wait(RENEWAL_SECONDS):
        with suppress(OSError):
            os.utime(file)


def _machine() -> str:
    """What tells apart machines, and containers that count processes by themselves."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()
