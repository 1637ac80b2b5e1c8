"""Where a local Ray lives: on the loopback interface, and in a folder that its user alone reads.

The folder is removed with the session. One whose process was killed is removed at the next start, with the agents of
Ray that outlived it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import psutil

from raydiv.utils import compat
from raydiv.utils.claim import Holder
from raydiv.utils.errors import UserError

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment variables of training workers whose collectives stay on this machine."""

OWN_PRIORITY = {"RAY_worker_niceness": "0"}
"""Workers have the priority of the process that starts Ray, as other trainers have. Ray's default, a niceness of 15,
leaves them some 3% of a CPU beside any busy program, and Ray gives up on workers that start too slowly.
"""

OWNER = "owner.json"
"""The file of a session's folder that names its process."""


@contextmanager
def local_session() -> Iterator[Path]:
    """The folder of a new local Ray, which listens on the loopback interface while the block runs."""
    folder = _new_folder()
    # a value that the user set stays
    priority = patch.dict(os.environ, OWN_PRIORITY | os.environ)
    with priority, compat.ray_on_loopback(), compat.ray_agent_on_free_port():
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> Path:
    """``RAY_TMPDIR/raydiv-UID/TOKEN``, by default under /tmp: paths of Ray's sockets have at most 107 characters.

    Raises UserError where another user holds the place.
    """
    parent = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"raydiv-{os.getuid()}"  # noqa: S108 (its owner is checked)
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise UserError(f"{parent}: belongs to another user; set RAY_TMPDIR to a folder of yours")
    for earlier in parent.iterdir():
        _sweep(earlier)
    holder = Holder.this_process()
    folder = parent / holder.token[:8]
    folder.mkdir(mode=0o700)
    (folder / OWNER).write_text(json.dumps(asdict(holder)))
    return folder


def _sweep(folder: Path) -> None:
    """Remove the folder of a session whose process has ended, and end what it left running."""
    try:
        holder = Holder(**json.loads((folder / OWNER).read_text()))
    except (OSError, ValueError, TypeError):
        return
    if not holder.has_ended:
        return
    for process in psutil.process_iter():
        # by its log, since Ray's agents change their command line
        with suppress(psutil.Error):
            if any(file.path.startswith(f"{folder}/") for file in process.open_files()):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)
