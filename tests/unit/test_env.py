"""``raydiv env``: the facts for a bug report, never a secret."""

from __future__ import annotations

import builtins
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydiv.cli import main
from raydiv.commands import env as command
from raydiv.commands.env import env
from raydiv.utils.versions import __version__

TOKEN = "hf_" + "Ab1" * 10


def test_versions_are_those_installed() -> None:
    versions = env()["versions"]
    assert versions["raydiv"] == __version__
    assert sys.version.startswith(versions["python"])
    for package in ("torch", "ray", "deepspeed", "transformers", "peft", "datasets", "mlflow"):
        assert versions[package] == metadata.version(package)


def test_devices_and_paths_are_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    report = env()
    assert report["devices"]["cpus"] >= 1
    assert report["devices"]["memory_bytes"] > 2**28
    assert report["paths"]["cache"] == report["paths"]["RAYDIV_CACHE"] == str(tmp_path / "cache")
    assert report["paths"]["RAY_ADDRESS"] is None


def test_json_is_what_the_function_returns(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == env()


def test_text_has_a_line_for_every_fact(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines())
    report = env()
    assert lines.keys() == report["versions"].keys() | {"cpus", "memory", "gpus"} | report["paths"].keys()
    assert lines["raydiv"] == __version__
    assert lines["RAY_ADDRESS"] == "not set"
    assert re.fullmatch(r"[\d.]+ GiB", lines["memory"])


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgresql://me:planted@host/db", "postgresql://***@host/db"),
        ("postgresql://me:pla/nted@host/db", "postgresql://***@host/db"),
        ("https://planted@host/mlflow", "https://***@host/mlflow"),
        ("https://host/mlflow?token=planted&a=1", "https://host/mlflow?token=***&a=1"),
        (f"https://host/{TOKEN}", "***"),
        ("https://host:5000/mlflow", "https://host:5000/mlflow"),
    ],
)
def test_secrets_are_masked(
    value: str,
    shown: str,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "HF_HOME", "RAYDIV_CACHE"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    assert main(["env", *options]) == 0
    printed = "".join(capfd.readouterr())
    assert not any(secret in printed for secret in ("planted", "pla/nted", TOKEN))
    assert printed.count(shown) >= 4


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device = SimpleNamespace(name="NVIDIA X", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    assert env()["devices"]["gpus"] == [{"name": "NVIDIA X", "memory_bytes": 80 * 2**30}] * 2
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines())
    assert lines["gpus"] == "NVIDIA X, 80.0 GiB; NVIDIA X, 80.0 GiB"
    assert (lines["cuda"], lines["nccl"]) == ("13.0", "2.27.5")


def test_a_broken_installation_is_reported_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A package that is missing or cannot be imported has an empty line."""
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name in ("torch", "psutil", "raydiv.utils.cache"):
            raise ImportError(f"{name}: broken")
        return real(name, *rest)

    def absent(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(command.metadata, "version", absent)
    report = env()
    assert report["versions"]["torch"] is report["versions"]["cuda"] is report["devices"]["memory_bytes"] is None
    assert report["devices"]["gpus"] == []
    assert report["paths"]["cache"] == "none: raydiv.utils.cache: broken"
    assert main(["env"]) == 0
    assert re.search(r"^torch +-$", capfd.readouterr().out, re.MULTILINE)
