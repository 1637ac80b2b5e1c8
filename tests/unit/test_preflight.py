"""Checks before any computation: nodes that differ, folders that are not shared, disks without space."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray._private.utils import check_version_info

from helpers.small_run import recipe_of
from raydiv.commands.plan.architecture import architecture_of
from raydiv.commands.preflight import (
    SAME_VERSIONS,
    NodeReport,
    _folder_problems,
    _inspect_node,
    _missing_file_problems,
    _probe_files,
    _version_problems,
    require_disk_space,
)
from raydiv.config.cluster import ClusterConfig
from raydiv.model import resolve as model_files
from raydiv.model.resolve import model_directory
from raydiv.runtime.session import ray_session
from raydiv.utils import compat
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder
from raydiv.utils.versions import versions

SAME_NODE = NodeReport("far", versions(), {"output_dir": ""}, [])


def test_equal_nodes_are_no_problem() -> None:
    assert set(SAME_VERSIONS) <= versions().keys()
    assert _version_problems([SAME_NODE]) == _missing_file_problems([SAME_NODE]) == []
    assert _folder_problems([SAME_NODE], {"output_dir": Folder("/shared")}) == []


@pytest.mark.parametrize("name", SAME_VERSIONS)
def test_a_different_version_is_named_with_its_node(name: str) -> None:
    (problem,) = _version_problems([SAME_NODE, replace(SAME_NODE, host="odd", versions=versions() | {name: "0.0.1"})])
    assert f"{name} is 0.0.1 on odd and {versions()[name]} here" in problem


@pytest.mark.parametrize(
    "theirs", [{"ray_version": "2.40.0"}, {"python_version": "3.10.2"}], ids=["another Ray", "another Python"]
)
def test_a_cluster_of_another_ray_or_python_is_refused_with_both(
    theirs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is Ray's own, which it raises when a driver connects."""
    mine = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: check_version_info(mine | theirs, "node 10.0.0.1"))
    monkeypatch.setattr(compat, "require_cluster", lambda address, seconds: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    with pytest.raises(UserError, match="raydiv submit") as refused, ray_session(ClusterConfig()):
        pass
    message = str(refused.value)
    assert message.startswith("RAY_ADDRESS: 10.0.0.9:6379: Version mismatch")
    assert all(version in message for version in (*mine.values(), *theirs.values()))
    assert "\n" not in message


def test_a_folder_is_shared_if_driver_and_node_read_each_others_files(tmp_path: Path) -> None:
    here, other = Folder(str(tmp_path / "here")), Folder(str(tmp_path / "other"))
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    with _probe_files({"output_dir": here}, "token"):
        shared = _inspect_node({"output_dir": here}, {str(data): 2}, "token")
        assert shared.folders == {"output_dir": ""}
        assert shared.missing == []
        separate = _inspect_node({"output_dir": other}, {str(data): 3, str(tmp_path / "no"): 1}, "token")
        assert len(here.file_names("")) == 2
    assert here.file_names("") == []
    (problem,) = _folder_problems([shared, separate], {"output_dir": here})
    assert f"output_dir: {separate.host} does not see the same {here.uri} as the driver (" in problem
    (problem,) = _missing_file_problems([shared, separate])
    assert f"data: {separate.host} does not see the same {data} " in problem


def test_a_folder_that_cannot_be_written_leaves_no_file_in_the_others(tmp_path: Path) -> None:
    here, file = Folder(str(tmp_path / "here")), tmp_path / "file"
    file.write_text("")
    folders = {"output_dir": here, "RAYDIV_CACHE": Folder(str(file / "in"))}
    with pytest.raises(UserError, match=r"RAYDIV_CACHE: .* cannot be written"), _probe_files(folders, "token"):
        pass
    assert here.file_names("") == []


def test_a_bucket_that_a_node_cannot_reach_is_reported_by_its_key() -> None:
    class Unreachable:
        def read(self, name: str) -> bytes:
            raise UserError("s3://b: cannot be reached")

    report = _inspect_node({"checkpoint.storage": cast("Folder", Unreachable())}, {}, "token")
    assert report.folders == {"checkpoint.storage": "s3://b: cannot be reached"}


@pytest.mark.parametrize(
    ("overrides", "files"),
    [
        # a model, and three checkpoints (two kept, one being written) of weights and two moments
        ((), 1 + 3 * 3),
        (("checkpoint.keep=4",), 1 + 5 * 3),
        (("checkpoint.best_metric=loss",), 1 + 4 * 3),
        (("checkpoint.every=null",), 1 + 3),
        (("checkpoint.storage=s3://bucket/x",), 1),
    ],
)
def test_a_run_that_would_fill_its_disk_is_refused(
    overrides: tuple[str, ...], files: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_model, {"train": "t", "eval": "e"}, tmp_path, "run", *overrides)
    architecture = architecture_of(recipe)
    needed = 4 * architecture.parameters * files

    def has(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        require_disk_space(recipe, architecture, tmp_path / "not" / "yet")

    has(needed)
    with pytest.raises(UserError, match=rf"output_dir: {tmp_path} has [\d.]+ [KM]iB free, .* lower checkpoint\.keep"):
        has(needed - 1)


def test_adapters_need_no_disk_space_for_the_base(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_model, {"train": "t", "eval": "e"}, tmp_path, "run", "model.lora={r: 2}")
    architecture = architecture_of(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=40 * architecture.trainable))
    require_disk_space(recipe, architecture, tmp_path)


def test_a_model_of_another_node_is_downloaded_here_at_its_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[Any] = []

    def download(model_id: str, revision: str | None, key: str) -> Path:
        requested.append((model_id, revision))
        return tiny_model

    monkeypatch.setattr(model_files, "_from_hub", download)
    assert model_directory(str(tiny_model)) == tiny_model.resolve()
    assert requested == []
    assert model_directory("/far/hub/models--org--a-model/snapshots/0123abcd") == tiny_model.resolve()
    assert model_directory("org/a-model", "main") == tiny_model.resolve()
    assert requested == [("org/a-model", "0123abcd"), ("org/a-model", "main")]
    with pytest.raises(UserError, match=r"/far/away/model is not on .*: put it on storage that all nodes mount"):
        model_directory("/far/away/model")


def test_a_bundled_model_of_another_node_is_created_here(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    requested: list[str] = []
    monkeypatch.setattr(model_files, "_bundled", lambda name, key: requested.append(name) or tiny_model)
    for name in ("smollm2-135m-instruct", "w1-01234567"):
        assert model_directory(f"/far/cache/raydiv/models/{name}") == tiny_model.resolve()
    assert requested == ["bundled:smollm2-135m-instruct", "bundled:w1"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "it is gated: accept its terms"),
        ("RepositoryNotFoundError", "no token for it"),
        ("RevisionNotFoundError", r"no such model\.revision"),
    ],
)
def test_a_refusal_of_the_hub_is_reported_with_its_remedy(
    error: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise type(error, (Exception,), {})("403 Client Error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        model_directory("org/gated")
