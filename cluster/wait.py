"""Wait until a Ray cluster has so much, then become the command.

    python wait.py GPU=16 -- raydiv train mine.yaml --resume


raydiv refuses a cluster that is too small for its recipe, and one that scales by itself starts with no GPU at all. This asks
the autoscaler for what is wanted, and waits for it. WAIT_S (3600) is how many seconds it may take.
"""

from __future__ import annotations

import logging
import os
import sys
import time


def main(arguments: list[str]) -> None:
    if "--" not in arguments[1:-1]:
        sys.exit(__doc__)
    mark = arguments.index("--")
    try:
        wanted = {kind: int(number) for kind, number in (part.split("=") for part in arguments[:mark])}
        seconds = float(os.environ.get("WAIT_S", 3600))
    except ValueError:
        sys.exit(__doc__)
    wait(wanted, seconds)
    command = arguments[mark + 1 :]
    os.execvp(command[0], command)  # noqa: S606 its signals and its exit status are the command's


def wait(wanted: dict[str, int], seconds: float) -> None:
    """Return when the cluster has all of it; end the process where it has not after so many seconds."""
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(os.environ.get("RAY_ADDRESS", "auto"), logging_level=logging.ERROR, log_to_driver=False)
    request_resources(bundles=[{kind: 1} for kind, number in wanted.items() for _ in range(number)])
    end = time.monotonic() + seconds
    while missing := {kind: number for kind, number in wanted.items() if ray.cluster_resources().get(kind, 0) < number}:
        if time.monotonic() > end:
            request_resources(bundles=[])
            have = ", ".join(f"{ray.cluster_resources().get(kind, 0):g} of {n} {kind}s" for kind, n in missing.items())
            sys.exit(f"wait.py: after {seconds:g} s the cluster has {have}")
        time.sleep(2)
    # from here on Ray Train asks for its workers itself; a request that stayed would keep the nodes for ever
    request_resources(bundles=[])
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
