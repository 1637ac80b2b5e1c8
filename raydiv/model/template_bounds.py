"""Bounds on what a chat template may take: it is a program of whoever published the model."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from raydiv.utils.cache import cache_dir, cached_text, digest

MOST_SECONDS, MOST_BYTES = 5, 2**30
"""Processor time and memory of a template's first renderings."""

POLL_SECONDS = 0.01

_OUT_OF_MEMORY = 3


def require_bounded(template: str, render: Callable[[], None]) -> None:
    """Raise ValueError where ``render``, the first renderings of a template, does not end within the bounds.

    It runs in a child process, once for a template on a machine. What it raises otherwise is left for its next use.
    """
    checked = cache_dir("templates") / digest(template, MOST_SECONDS, MOST_BYTES)
    if not checked.exists():
        _try_in_child(render)
        cached_text(checked, lambda: "bounded")


def _try_in_child(render: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        status = 0
        try:
            _limit_this_process()
            render()
        except BaseException as error:
            out_of_memory = isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError)
            status = _OUT_OF_MEMORY if out_of_memory else 0
        finally:
            os._exit(status)
    end = time.monotonic() + 4 * MOST_SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            psutil.Process(child).kill()
            os.waitpid(child, 0)
            status = -1
            break
        time.sleep(POLL_SECONDS)
    code = os.waitstatus_to_exitcode(status) if status >= 0 else -1
    if code == _OUT_OF_MEMORY:
        raise ValueError(f"the chat template takes more than {MOST_BYTES // 2**20} MiB to render a short conversation")
    if code < 0:
        raise ValueError(f"the chat template takes more than {MOST_SECONDS} s to render a short conversation")


def _limit_this_process() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
    spent = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + MOST_SECONDS, spent + MOST_SECONDS))
