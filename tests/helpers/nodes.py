"""A cluster of several nodes on this machine: raylets in network namespaces, optionally with their own disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAY = Path(sys.executable).parent / "ray"
BRIDGE, PORT = "rdnet", 6399
"""The bridge, whose name is also that of the interface in each namespace, so that one variable fits all; Ray's port."""

HEAD = "10.213.0.1"

COUNT = "import ray; ray.init(log_to_driver=False, logging_level=50); print(sum(node['Alive'] for node in ray.nodes()))"


def permitted() -> bool:
    """Whether this machine permits network namespaces."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    added = subprocess.run(["ip", "netns", "add", "rd-try"], capture_output=True).returncode == 0
    if added:
        subprocess.run(["ip", "netns", "del", "rd-try"], check=True)
    return added


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


class Nodes:
    """``start`` starts the head, ``add`` a node; all end with the block of ``several_nodes``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        self.environment = os.environ | token | {"RAY_ADDRESS": self.address}
        self._networks: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"{HEAD}:{PORT}"

    def start(self, cpus: int) -> None:
        _run(f"ip link add {BRIDGE} type bridge")
        _run(f"ip addr add {HEAD}/24 dev {BRIDGE}")
        _run(f"ip link set {BRIDGE} up")
        self._ray([], f"--head --port={PORT} --node-ip-address={HEAD} --num-cpus={cpus} --include-dashboard=false")

    def add(self, cpus: int, options: str = "", disk: Path | None = None, size: str = "") -> subprocess.Popen[bytes]:
        """Start a node in its own namespace, with options of ``ray start`` and its own ``disk`` of ``size``."""
        number = len(self._networks) + 2
        network, address = f"rd-{number}", f"10.213.0.{number}"
        self._networks.append(network)
        _run(f"ip netns add {network}")
        _run(f"ip link add rdv{number} type veth peer name {BRIDGE} netns {network}")
        _run(f"ip link set rdv{number} master {BRIDGE} up")
        for command in (f"addr add {address}/24 dev {BRIDGE}", f"link set {BRIDGE} up", "link set lo up"):
            _run(f"ip -n {network} {command}")
        prefix = ["ip", "netns", "exec", network]
        if disk is not None:
            mount = f"mount -t tmpfs {f'-o size={size}' if size else ''} none {disk}"
            prefix += ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
        return self._ray(prefix, f"--address={self.address} --node-ip-address={address} --num-cpus={cpus} {options}")

    def _ray(self, prefix: list[str], options: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*prefix, str(RAY), "start", *options.split(), "--block", "--disable-usage-stats"],
            env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def wait_for(self, number: int, seconds: float = 120) -> None:
        """Wait until the cluster has ``number`` nodes."""
        end = time.monotonic() + seconds
        while True:
            count = self.run("-c", COUNT).stdout.strip()
            if count == str(number):
                return
            assert time.monotonic() < end, count

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python on the head."""
        return subprocess.run(
            [sys.executable, *arguments], env=self.environment, capture_output=True, text=True, timeout=300
        )

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a node with all its processes, as by a loss of power."""
        import psutil

        for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            member.send_signal(signal.SIGKILL)
        process.wait()
        self._processes.remove(process)

    def stop(self) -> None:
        for process in reversed(list(self._processes)):
            self.end(process)
        for network in self._networks:
            # a namespace is removed, with its interfaces, only some time after it is deleted
            subprocess.run(["ip", "link", "del", network.replace("rd-", "rdv")], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", network], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        current = Path("/tmp/ray/ray_current_cluster")
        if current.is_file() and current.read_text().strip() == self.address:
            current.unlink()  # or Ray's tools would look for this cluster


@contextmanager
def several_nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.stop()
