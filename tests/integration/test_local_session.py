"""A local Ray: what listens while a run trains, who may read its files, and what a killed one leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from helpers.small_run import recipe_of, write_files
from raydiv.config import save_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.session import ray_session

pytestmark = pytest.mark.slow

SESSION = """
import sys
from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.session import ray_session
with ray_session(ClusterConfig()):
    print("started", flush=True)
    sys.stdin.read()
"""


def family_of(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def listening(pid: int) -> Iterator[tuple[str, str, int]]:
    """(name, address, port) of every socket on which a process or one that it started accepts connections."""
    for process in family_of(pid):
        try:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield " ".join(process.cmdline()), connection.laddr.ip, connection.laddr.port
        except psutil.Error:
            continue


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def sessions_folder(base: Path) -> Path:
    return base / f"raydiv-{os.getuid()}"


@pytest.mark.long
def test_a_run_listens_on_loopback_and_its_files_are_its_users(tiny_model: Path, tmp_path: Path) -> None:
    base = Path("/tmp") / f"t{os.getpid()}"  # paths of sockets are short
    recipe = recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "run", "optim.steps=40")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "raydiv", "train", str(tmp_path / "recipe.yaml")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # for readers of other users, as most systems have it
    with subprocess.Popen(command, env=environment | {"RAY_TMPDIR": str(base)}, umask=0o022) as process:
        open_ports: set[tuple[str, str]] = set()
        counted, modes = 0, set()
        while process.poll() is None:
            for name, address, _ in listening(process.pid):
                counted += 1
                if not is_loopback(address):
                    open_ports.add((name, address))
            if sessions_folder(base).exists():
                modes.add(sessions_folder(base).stat().st_mode & 0o777)
            time.sleep(0.2)
    assert process.returncode == 0
    assert counted > 20
    # torch's store, by which the ranks of a run find each other, knows no address to bind to
    # a training worker, whose process is named after the method that it runs
    training_workers = {"ray::RayTrainWorker", "ray::execute"}
    assert {name.split(".")[0].split()[0] for name, _ in open_ports} <= training_workers, open_ports
    assert modes == {0o700}
    assert list(sessions_folder(base).iterdir()) == []
    run = RunDirectory(tmp_path / "runs" / "run")
    assert run.path.stat().st_mode & 0o077 == 0


def test_what_a_killed_session_left_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path("/tmp") / f"u{os.getpid()}"
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == "started\n"
        (folder,) = sessions_folder(base).iterdir()
        family = family_of(p.pid)
        assert len(family) > 3
        p.kill()
    assert folder.is_dir()
    other = sessions_folder(base) / "of-a-living-process"
    other.mkdir()
    with ray_session(ClusterConfig()):
        assert not folder.exists()
        assert other.is_dir(), "no process is known to have made it"
    end = time.monotonic() + 30
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < end, [process.cmdline() for process in family if process.is_running()]
        time.sleep(0.1)
