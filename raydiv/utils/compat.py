"""Libraries that others load where they are installed, for seconds, and that are of no use here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hide_module(library: str) -> Iterator[None]:
    """While the block runs, ``library`` is not installed, unless this process has loaded it already."""
    absent = library not in sys.modules
    if absent:
        sys.modules[library] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[library]


@contextmanager
def peft_without_quantizer() -> Iterator[None]:
    """Peft for weights that are whole: the quantizer that it loads imports torch's compiler."""
    with hide_module("bitsandbytes"):
        from peft import import_utils

        found = (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available)
        _forget(found)
        try:
            yield
        finally:
            _forget(found)


def _forget(found: tuple[object, ...]) -> None:
    """What peft remembers of what is installed holds for this block, or not in it."""
    for one in found:
        getattr(one, "cache_clear", lambda: None)()


def server_ray_version(client: Any) -> str:
    """Ray's version on the cluster of a ``JobSubmissionClient``; its public ``get_version`` returns the job API's version.

    Checked with Ray 2.60: ``SubmissionClient._server_ray_version``, set when the client connects.
    """
    return str(client._server_ray_version)


def is_missing_job_agent(error: RuntimeError) -> bool:
    """Whether Ray refused a job because no agent has started yet: it raises a bare RuntimeError with this text.

    Checked with Ray 2.60: ``ray.dashboard.modules.job.job_head``.
    """
    return "No available agent" in str(error)


def is_version_mismatch(error: RuntimeError) -> bool:
    """Whether ``ray.init`` refused a cluster of another Python or Ray: it raises a bare RuntimeError with this text.

    Checked with Ray 2.60: ``ray._private.utils.check_version_info``.
    """
    return str(error).lstrip().startswith("Version mismatch")
