"""A cluster of several nodes on this machine: each a raylet in a network of its own, with an address and, if asked, a disk."""

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
"""Also the name of the interface inside each network, so that one variable names it everywhere."""

HEAD = "10.213.0.1"

COUNT = "import ray; ray.init(log_to_driver=False, logging_level=50); print(sum(node['Alive'] for node in ray.nodes()))"


def permitted() -> bool:
    """Whether this machine lets us make networks."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "rd-try"], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "rd-try"], check=True)
    return made


def _run(words: str) -> None:
    subprocess.run(words.split(), check=True, capture_output=True)


class Nodes:
    """``add`` starts a node; what was started ends with the block of ``several_nodes``."""

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

    def add(self, cpus: int, words: str = "", own: Path | None = None, size: str = "") -> subprocess.Popen[bytes]:
        """A node in a network of its own; the folder ``own`` is another there than here, on a disk of ``size``."""
        number = len(self._networks) + 2
        network, address = f"rd-{number}", f"10.213.0.{number}"
        self._networks.append(network)
        _run(f"ip netns add {network}")
        _run(f"ip link add rdv{number} type veth peer name {BRIDGE} netns {network}")
        _run(f"ip link set rdv{number} master {BRIDGE} up")
        for more in (f"addr add {address}/24 dev {BRIDGE}", f"link set {BRIDGE} up", "link set lo up"):
            _run(f"ip -n {network} {more}")
        before = ["ip", "netns", "exec", network]
        if own is not None:
            disk = f"mount -t tmpfs {f'-o size={size}' if size else ''} none {own}"
            before += ["unshare", "-m", "sh", "-c", f'{disk} && exec "$@"', "sh"]
        return self._ray(before, f"--address={self.address} --node-ip-address={address} --num-cpus={cpus} {words}")

    def _ray(self, before: list[str], words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*before, str(RAY), "start", *words.split(), "--block", "--disable-usage-stats"],
            env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def wait_for(self, number: int, seconds: float = 120) -> None:
        """Until so many nodes are there."""
        end = time.monotonic() + seconds
        while True:
            found = self.run("-c", COUNT).stdout.strip()
            if found == str(number):
                return
            assert time.monotonic() < end, found

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of Python on the head."""
        return subprocess.run(
            [sys.executable, *words], env=self.environment, capture_output=True, text=True, timeout=300
        )

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """At once, and all that belongs to it: a node that loses its power."""
        import psutil

        for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            one.send_signal(signal.SIGKILL)
        process.wait()
        self._processes.remove(process)

    def stop(self) -> None:
        for process in reversed(list(self._processes)):
            self.end(process)
        for network in self._networks:
            # a network is taken down some time after it is deleted, with what is in it
            subprocess.run(["ip", "link", "del", network.replace("rd-", "rdv")], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", network], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        noted = Path("/tmp/ray/ray_current_cluster")
        if noted.is_file() and noted.read_text().strip() == self.address:
            noted.unlink()  # or Ray's tools would look for it there


@contextmanager
def several_nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.stop()
