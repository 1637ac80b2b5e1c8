"""Shared by all tests: a cache and a tokenizer of their own, tiny random models."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.models import make_model, make_tokenizer
from raydiv.model.chat import Chat

FOLDERS = ("integration", "ray", "gpu", "unit", "distributed")
"""Folders in the order of their tests: those with Ray first, the longest without it last."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2``, file by file: one process begins with the tests that start Ray, the other with the last ones.

    So both end at the same time, and two clusters, which slow each other down on two cores, meet for a short time only.
    """
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False

    class FromBothEnds(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            if node is not self.nodes[0]:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return FromBothEnds(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FOLDERS.index(item.path.parent.name))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """No test reads or writes the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYDIV_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Commands that tests start end at Ctrl-C, also where a shell runs pytest in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tests' tokenizer alone, which puts no BOS by itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tokenizer: Path) -> Chat:
    return Chat(tokenizer)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test prepared."""
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A local Ray that a module's runs share."""
    from raydiv.config.cluster import ClusterConfig
    from raydiv.runtime.session import ray_session

    with ray_session(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def small_sources_use_ray() -> Iterator[None]:
    """Sources of any size are tokenised by a pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raydiv.data.index.SMALL_BYTES", -1)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of what a small run trains on, holds out and is asked."""
    from helpers.small_run import write_files

    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server on this machine, which this process and those that it starts find by the environment."""
    import logging

    from pyarrow import fs

    from raydiv.utils import storage

    server_of = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        made = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        made.create_dir("bucket")
        yield "s3://bucket"
    storage._connect.cache_clear()
    server.stop()
