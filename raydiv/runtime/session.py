"""A Ray session: the cluster that RAY_ADDRESS names, or a local one that lives as long as the command."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.resources import require_resources
from raydiv.utils.errors import UserError

LET_IN = (
    "a cluster that asks for a token wants RAY_AUTH_MODE=token and its own token, in RAY_AUTH_TOKEN, in the file that "
    "RAY_AUTH_TOKEN_PATH names or in ~/.ray/auth_token"
)
"""What to do where a cluster does not let us in; of a wrong token Ray says no more than that it could not connect."""


FULL = (
    "Ray's object store is full, and so is the disk that it spills to (95% of it is as far as Ray goes): free some of the disk "
    "that has /tmp/ray, or name another folder in RAY_TMPDIR before Ray starts; what was prepared so far is kept"
)


@contextmanager
def ray_session(cluster: ClusterConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Connect to Ray, quietly, and check that the recipe's workers fit; a Ray that was running before is left running.

    A local one has a ``dashboard``, which Ray jobs need, if it is asked for; none but this machine reaches it. Ray lets nobody
    into a local one without a token, the user's own or one that it makes, and nothing here turns that off.

    Every process of the session gets ``cluster.env``, and DeepSpeed's word for the device.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # an idle accelerator must not be hidden from workers, nor warned about
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        try:
            with _core_log_silenced():
                ray.init(
                    # nothing said means the newest cluster that anybody has started on this machine
                    address=address or "local",
                    **({} if address else {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}),
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": worker_environment(cluster)},
                )
        except ray.exceptions.AuthenticationError:
            raise UserError(
                f"RAY_ADDRESS: {address}: RAY_AUTH_MODE is token, and there is none here; {LET_IN}"
            ) from None
        except ConnectionError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"RAY_ADDRESS: no cluster at {address} that lets us in: {reason}; {LET_IN}") from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            if not reason.startswith("Version mismatch"):
                raise
            raise UserError(
                f"RAY_ADDRESS: {address}: {reason}; give the command with the cluster's versions, or send it by raydiv submit"
            ) from None
    try:
        _quiet_ray_data()
        require_resources(cluster)
        yield
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
        raise RuntimeError(FULL) from None
    finally:
        if ours:
            ray.shutdown()


def require_dashboard(wanted_by: str) -> None:
    """Raise UserError when nothing answers of a cluster's dashboard, which a local Ray has where it is asked for."""
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # nothing said means the cluster of this machine, and there may be several
        list_nodes(ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except (RayStateApiException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{wanted_by} needs the dashboard of the Ray cluster, which does not answer: {reason}"
        ) from None


YOUNG_S, AGAIN_S = 60.0, 3.0
"""Seconds that a cluster which has just begun has to take a job, and between tries."""

STOP_SECONDS = 600
"""Seconds that a job which is told to stop has for its step and its checkpoint; Ray's own three are too few."""


def is_submitted_job(client: Any, runtime_env: Mapping[str, Any], **job: Any) -> str:
    """Send a job to a cluster by its client of Ray's job API; returns its id. Raises UserError where nothing starts jobs."""
    patient = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    whole = {**runtime_env, "env_vars": patient | dict(runtime_env.get("env_vars", {}))}
    end = time.monotonic() + YOUNG_S
    while True:
        try:
            return str(client.submit_job(runtime_env=whole, **job))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > end:
                raise UserError(
                    "the Ray cluster's job agent does not answer. One Ray of a machine has its port (52365): end the other, or "
                    "start the cluster's head with a port of its own (ray start --head --dashboard-agent-listen-port PORT)"
                ) from None
            time.sleep(AGAIN_S)


KEEPS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_ARENA_MAX": "1",  # Ray runs the loop in a thread, whose own arena would hold no large block
}
"""glibc's allocator keeps what is freed for the next request. ZeRO frees and asks for the same large tensors at every step:
with pages fresh from the kernel each time, a step of two workers takes a third longer. The price is up to as much memory again.
"""


def training_environment(recipe: Recipe, roomy: bool) -> dict[str, str]:
    """Environment variables of training workers, beside ``worker_environment``; ``cluster.env`` goes over them.

    ``roomy``: they have twice the memory that they need.
    """
    gains = roomy and recipe.engine.zero_stage != 0 and not recipe.cluster.use_gpu
    return (KEEPS_MEMORY if gains else {}) | recipe.cluster.env


@contextmanager
def _core_log_silenced() -> Iterator[None]:
    """Keep notes of Ray's C++ core to its own developers off the terminal; what fails is raised all the same.

    The core announces the log level that it is given, hence the redirection.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variables of every process of the session: libraries' settings, the device, and ``cluster.env``."""
    device = {} if cluster.use_gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {"TOKENIZERS_PARALLELISM": "false", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **device, **cluster.env}


def _quiet_ray_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it calls an error it raises too
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
