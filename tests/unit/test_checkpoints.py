"""Checkpoints on storage: complete or absent, damaged ones skipped, old ones removed; and resuming from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raydiv.config import Recipe, load_recipe
from raydiv.config.checkpoint import EarlyStopConfig
from raydiv.runs.directory import RunDirectory
from raydiv.runs.resume import recipe_to_resume, require_same_content
from raydiv.training.checkpoint.manager import CheckpointManager
from raydiv.training.checkpoint.manifest import MANIFEST, CheckpointStore, Manifest
from raydiv.training.checkpoint.shards import CheckpointShard, ShardReader, find_damage, write_shard
from raydiv.training.metric_names import require_measured
from raydiv.training.state import EarlyStopping, TrainState
from raydiv.training.zero_state import KINDS, Fragment, Snapshot
from raydiv.utils.errors import UserError
from raydiv.utils.signals import Terminated, on_sigterm
from raydiv.utils.storage import Folder, sha256_of

PLAIN = {"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 6}}


def recipe_of(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(PLAIN | {"output_dir": str(tmp_path), "name": "mine"}, overrides)


def snapshot_of(start: int, length: int, size: int = 12) -> Snapshot:
    piece = Fragment("layer.weight", start, length, size)
    return {(piece, kind): torch.arange(start, start + length) + 100.0 * n for n, kind in enumerate(KINDS)}


def write_checkpoint(checkpoints: CheckpointStore, step: int, measured: float | None = None, run: str = "") -> Manifest:
    """A checkpoint of two ranks: five elements, and seven."""
    folder = checkpoints.at(step)
    shards = [write_shard(folder, 0, snapshot_of(0, 5)), write_shard(folder, 1, snapshot_of(5, 7))]
    manifest = Manifest(step, step, 2, {"logged": 0}, {"run": run}, measured, shards)
    checkpoints.commit(manifest)
    return manifest


@pytest.fixture(params=["local", "s3"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    root = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return CheckpointStore(Folder(f"{root}/checkpoints"))


def test_a_file_is_safetensors_and_its_digest_that_of_its_bytes(tmp_path: Path) -> None:
    """As safetensors reads it; also names beyond ASCII, and views of larger tensors."""
    of_bf16 = Fragment("größe", 2, 3, 9)
    state = snapshot_of(0, 5) | {(of_bf16, KINDS[0]): torch.arange(9).bfloat16()[::2][:3]}
    shard = write_shard(Folder(str(tmp_path)), 3, state)
    path = tmp_path / shard.file
    found = load_file(path)
    assert found.keys() == {f"{kind}/{fragment.name}" for fragment, kind in state}
    for (fragment, kind), values in state.items():
        read = found[f"{kind}/{fragment.name}"]
        assert read.dtype == values.dtype
        assert read.tolist() == values.tolist()
    assert (shard.size, shard.sha256) == (path.stat().st_size, sha256_of(path))


@pytest.mark.parametrize(("start", "length"), [(0, 12), (0, 5), (3, 4), (5, 7), (11, 1)])
def test_any_run_of_elements_is_read(checkpoints: CheckpointStore, start: int, length: int) -> None:
    manifest = write_checkpoint(checkpoints, 4)
    with ShardReader(checkpoints.at(4), manifest.shards) as shards:
        for (piece, kind), values in snapshot_of(start, length).items():
            assert torch.equal(shards.read(piece, kind), values)


def test_missing_elements_are_an_error(checkpoints: CheckpointStore) -> None:
    manifest = write_checkpoint(checkpoints, 4)
    with (
        ShardReader(checkpoints.at(4), manifest.shards[:1]) as shards,
        pytest.raises(ValueError, match=r"5 of the 12 elements of layer\.weight"),
    ):
        shards.read(Fragment("layer.weight", 0, 12, 12), "weight")


def test_a_manifest_is_read_as_written(checkpoints: CheckpointStore) -> None:
    manifest = write_checkpoint(checkpoints, 4, measured=0.25)
    assert checkpoints.manifest(4) == manifest
    assert isinstance(checkpoints.manifest(4).shards[0], CheckpointShard)


def test_a_folder_without_a_manifest_is_no_checkpoint(checkpoints: CheckpointStore) -> None:
    write_checkpoint(checkpoints, 2)
    write_shard(checkpoints.at(4), 0, snapshot_of(0, 5))
    assert checkpoints.steps() == [2]
    checkpoints.invalidate(2)
    assert checkpoints.steps() == []


def test_pruning_keeps_the_newest_and_the_best(checkpoints: CheckpointStore) -> None:
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.1), (4, None), (5, 0.7), (6, 0.6)):
        write_checkpoint(checkpoints, step, value)
    write_shard(checkpoints.at(7), 0, snapshot_of(0, 5))
    assert (checkpoints.best("min"), checkpoints.best("max")) == (2, 5)
    checkpoints.prune(2, "min")
    assert checkpoints.steps() == [6, 5, 2]
    checkpoints.prune(1, None)
    assert checkpoints.folder.folder_names() == ["step-00000006"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("file", ["rank-00001.safetensors", MANIFEST])
def test_a_damaged_checkpoint_is_logged_and_the_previous_one_used(tmp_path: Path, damage: Any, file: str) -> None:
    run, manager = make_manager(tmp_path)
    checkpoints = CheckpointStore(run.checkpoints(recipe_of(tmp_path)))
    for step in (2, 4):
        write_checkpoint(checkpoints, step, run=run.stage.read().id)
    assert manager.find() == checkpoints.manifest(4)
    assert not run.events.path.exists()
    damage(Path(checkpoints.at(4).uri_of(file)))
    assert manager.find() == checkpoints.manifest(2)
    if (file, damage) != (MANIFEST, Path.unlink):  # then it is incomplete
        assert "checkpoint after step 4 is damaged" in run.events.path.read_text()
        assert file in run.events.path.read_text()
    damage(Path(checkpoints.at(2).uri_of(file)))
    assert manager.find() is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run, manager = make_manager(tmp_path)
    write_checkpoint(CheckpointStore(run.checkpoints(recipe_of(tmp_path))), 2, run="somebody")
    with pytest.raises(UserError, match="is of another run"):
        manager.find()


def test_damage_of_a_file_is_described(checkpoints: CheckpointStore) -> None:
    shard = write_checkpoint(checkpoints, 4).shards[0]
    assert find_damage(checkpoints.at(4), shard) is None
    assert "cannot be read" in str(find_damage(checkpoints.at(5), shard))
    content = bytearray(checkpoints.at(4).read(shard.file))
    content[-3] ^= 1
    checkpoints.at(4).write(shard.file, bytes(content))
    assert "SHA-256" in str(find_damage(checkpoints.at(4), shard))
    checkpoints.at(4).write(shard.file, bytes(content[:-1]))
    assert f"has {shard.size - 1} bytes of {shard.size}" in str(find_damage(checkpoints.at(4), shard))


class FakePartitions:
    """The part of Partitions that a CheckpointManager uses to write."""

    updates = 3

    def snapshot(self) -> Snapshot:
        return snapshot_of(0, 12)


def make_manager(tmp_path: Path, *overrides: str) -> tuple[RunDirectory, CheckpointManager]:
    recipe = recipe_of(tmp_path, *overrides)
    run = RunDirectory.of(recipe)
    run.create(recipe, {"data": "d"})
    return run, CheckpointManager(run, recipe, FakePartitions())


def kept_steps(run: RunDirectory) -> list[int]:
    return CheckpointStore(run.checkpoints(run.read_recipe())).steps()


def test_checkpoints_every_so_many_steps(tmp_path: Path) -> None:
    run, manager = make_manager(tmp_path, "checkpoint.every=2", "checkpoint.keep=9")
    for step in range(1, 7):
        assert not manager.after_step(step, dict, {}, last=step == 6)
    assert kept_steps(run) == [6, 4, 2]
    manifest = CheckpointStore(run.checkpoints(run.read_recipe())).manifest(4)
    assert (manifest.step, manifest.updates, manifest.of) == (4, 3, {"run": run.stage.read().id, "data": "d"})


def test_checkpoints_every_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raydiv.training.checkpoint import manager as saving

    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    run, manager = make_manager(tmp_path, "checkpoint.every=2min", "checkpoint.keep=9")
    for step in range(1, 7):
        now[0] += 50.0
        manager.after_step(step, dict, {}, last=step == 6)
    assert kept_steps(run) == [6, 3]


def test_a_checkpoint_waits_for_its_best_metric(tmp_path: Path) -> None:
    run, manager = make_manager(tmp_path, "checkpoint.every=2", "checkpoint.keep=1", "checkpoint.best_metric=eval/loss")
    for step in range(1, 10):
        manager.after_step(step, dict, {"eval/loss": float(step)} if step % 3 == 0 else {}, last=step == 9)
    # due at 2, 4, 6 and 8, measured at 3, 6 and 9; 3 is the best one
    assert kept_steps(run) == [9, 3]


def test_a_run_stops_on_request_after_a_checkpoint(tmp_path: Path) -> None:
    run, manager = make_manager(tmp_path, "checkpoint.every=null")
    assert not manager.after_step(1, dict, {}, last=False)
    run.request_stop()
    assert manager.after_step(2, dict, {}, last=False)
    assert kept_steps(run) == [2]
    # the last step ends training anyway
    assert not manager.after_step(3, dict, {}, last=True)


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_checkpoint(tmp_path: Path) -> None:
    run, manager = make_manager(tmp_path, "checkpoint.every=2", "checkpoint.keep=9")
    for step in (1, 2, 3):
        manager.after_step(step, dict, {}, last=False)
    blocked = Path(CheckpointStore(run.checkpoints(run.read_recipe())).at(4).uri)
    blocked.write_text("in the way")
    for step in (4, 5, 6):
        manager.after_step(step, dict, {}, last=step == 6)
    assert kept_steps(run) == [6, 2]
    (event,) = [json.loads(line) for line in run.events.path.read_text().splitlines()]
    assert "checkpoint after step 4 could not be written" in event["message"]


def test_old_checkpoints_that_cannot_be_removed_cost_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, manager = make_manager(tmp_path, "checkpoint.every=1", "checkpoint.keep=1")

    def stuck(*_: Any) -> None:
        raise OSError("busy")

    monkeypatch.setattr(CheckpointStore, "prune", stuck)
    for step in (1, 2):
        manager.after_step(step, dict, {}, last=step == 2)
    assert kept_steps(run) == [2, 1]
    assert "old checkpoints in" in run.events.path.read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_costs_a_warning_and_leaves_the_previous_checkpoint(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, manager = make_manager(tmp_path, f"checkpoint.storage={small_disk}", "checkpoint.every=1", "checkpoint.keep=1")
    manager.after_step(1, dict, {}, last=False)
    monkeypatch.setattr(FakePartitions, "snapshot", lambda _: snapshot_of(0, 100_000, 100_000))
    manager.after_step(2, dict, {}, last=False)
    manager.after_step(3, dict, {}, last=True)
    assert kept_steps(run) == [1]
    assert CheckpointStore(run.checkpoints(run.read_recipe())).folder.folder_names() == ["step-00000001"]
    assert manager.find() is not None
    events = run.events.path.read_text()
    assert "checkpoint after step 2 could not be written" in events
    assert "No space left on device" in events
    # with room on the disk again
    monkeypatch.setattr(FakePartitions, "snapshot", lambda _: snapshot_of(0, 12))
    manager.after_step(4, dict, {}, last=True)
    assert kept_steps(run) == [4]


def test_a_read_only_folder_is_found_before_training(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        UserError, match=r"checkpoint\.storage: .*/disk/mine cannot be written: .*Read-only file system"
    ):
        make_manager(tmp_path, f"checkpoint.storage={small_disk}")


def test_checkpoint_storage_is_not_shared_by_two_runs(tmp_path: Path) -> None:
    make_manager(tmp_path, f"checkpoint.storage={tmp_path}/elsewhere", "checkpoint.every=1")[1].after_step(
        1, dict, {}, last=True
    )
    assert (tmp_path / "elsewhere" / "mine" / "step-00000001" / MANIFEST).is_file()
    other = recipe_of(tmp_path / "other", f"checkpoint.storage={tmp_path}/elsewhere")
    with pytest.raises(UserError, match=r"checkpoint\.storage: .* holds another run's checkpoints"):
        RunDirectory.of(other).create(other, {})


# ---- the run directory


def test_truncated_metrics_are_followed_without_repeats(tmp_path: Path) -> None:
    run, seen = RunDirectory(tmp_path), []
    with run.metrics.follow(seen.append):
        for step in (1, 2):
            run.metrics.append({"step": step})
        size = run.metrics.size
        for step in (3, 4):
            run.metrics.append({"step": step})
        wait_until(lambda: len(seen) == 4)
        run.metrics.truncate(size)
        for step in (3, 4, 5):
            run.metrics.append({"step": step})
    assert [line["step"] for line in seen] == [line["step"] for line in run.metrics.read()] == [1, 2, 3, 4, 5]
    later: list[Any] = []
    with run.metrics.follow(later.append, skip=3):
        pass
    assert [line["step"] for line in later] == [4, 5]


def wait_until(so: Any) -> None:
    import time

    end = time.monotonic() + 20
    while not so():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- resuming


def test_a_run_resumes_with_its_own_recipe_alone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "batch.tokens_per_microbatch=64", "engine.zero_stage=2")
    run = RunDirectory.of(recipe)
    run.create(recipe, {"data": "a" * 32, "model": "m"})
    assert recipe_to_resume(run, recipe) == recipe
    with pytest.raises(UserError) as caught:
        recipe_to_resume(run, recipe_of(tmp_path, "optim.lr=1e-3", "loss.beta=0.5"))
    message = str(caught.value)
    assert "loss.beta: 0.1 then, 0.5 now" in message
    assert "optim.lr: 5e-05 then, 0.001 now" in message
    assert "batch" not in message
    # the workers and the ZeRO stage may change
    elsewhere = recipe_of(tmp_path, "cluster.num_workers=4", "engine.zero_stage=3", "checkpoint.every=7")
    assert recipe_to_resume(run, elsewhere) == elsewhere
    # values of auto are those resolved before, on the same workers
    assert recipe_to_resume(run, recipe_of(tmp_path)).engine.zero_stage == 2
    assert recipe_to_resume(run, recipe_of(tmp_path)).batch.tokens_per_microbatch == 64


def test_a_run_resumes_with_the_date_that_its_template_was_given(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "data.template_date=2026-01-31")
    run = RunDirectory.of(recipe)
    run.create(recipe, {"data": "a" * 32, "model": "m"})
    assert recipe_to_resume(run, recipe_of(tmp_path)).data.template_date == date(2026, 1, 31)
    with pytest.raises(UserError, match=r"data\.template_date: 2026-01-31 then, 2026-02-01 now"):
        recipe_to_resume(run, recipe_of(tmp_path, "data.template_date=2026-02-01"))
    assert recipe_to_resume(run, recipe_of(tmp_path, "cluster.num_workers=4")).engine.zero_stage == "auto"


def test_changed_data_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run = RunDirectory.of(recipe)
    run.create(recipe, {"data": "a" * 32, "model": "m"})
    require_same_content(run, {"data": "a" * 32, "model": "m"})
    with pytest.raises(UserError, match=r"data\.train: .*aaaaaaaaaaaa then, bbbbbbbbbbbb now"):
        require_same_content(run, {"data": "b" * 32, "model": "m"})
    with pytest.raises(UserError, match=r"model\.id"):
        require_same_content(run, {"data": "a" * 32, "model": "n"})


def test_a_run_without_a_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage\.json"):
        RunDirectory(tmp_path).stage.read()


# ---- the state of the loop


def test_early_stopping_after_evaluations_that_are_no_better() -> None:
    section = EarlyStopConfig(patience=2, min_delta=0.1)
    early_stopping = EarlyStopping()
    assert [early_stopping.update(section, value) for value in (1.0, 0.95, 0.5, 0.45, 0.41)] == [False] * 4 + [True]
    rising = EarlyStopConfig(metric="eval/reward/accuracy", mode="max", patience=1)
    early_stopping = EarlyStopping()
    assert [early_stopping.update(rising, value) for value in (0.5, 0.6, 0.6)] == [False, False, True]


def test_the_state_of_the_loop_is_restored_to_the_bit() -> None:
    state = TrainState()
    state.means.update({"divergence": 0.1 + 0.2, "reward/margin": float(np.float32(0.7))})
    state.early_stopping.update(EarlyStopConfig(), 1 / 3)
    state.refused = 2
    loop = json.loads(json.dumps(state.as_json([{"log_mean": 1e-17}], 55)))
    assert TrainState.from_json(loop) == state
    assert (loop["states"], loop["logged"]) == ([{"log_mean": 1e-17}], 55)


# ---- the recipe


@pytest.mark.parametrize(("every", "seconds"), [("10min", 600.0), ("1.5h", 5400.0), ("90 s", 90.0), ("7", None)])
def test_a_checkpoint_is_due_by_steps_or_by_time(tmp_path: Path, every: str, seconds: float | None) -> None:
    section = recipe_of(tmp_path, f"checkpoint.every={every}").checkpoint
    assert section.interval_seconds == seconds
    assert seconds is not None or section.every == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("checkpoint.every=soon", r"checkpoint\.every: .*number of steps"),
        ("checkpoint.every=0min", r"checkpoint\.every: .*number of steps"),
        ("checkpoint.final=best", "needs best_metric"),
        ("checkpoint.mode=max", "needs best_metric"),
        ("optim.early_stop={patience: 2}", r"optim\.early_stop needs data\.eval"),
        ("optim.early_stop={metric: loss}", "pattern"),
        ("engine={nvme_path: /x, offload_optimizer: nvme}", r"checkpoint\.every: .*nvme"),
    ],
)
def test_invalid_checkpoint_settings(tmp_path: Path, override: str, expected: str) -> None:
    more = ("checkpoint.every=5",) if "nvme" in override else ()
    with pytest.raises(UserError, match=expected):
        recipe_of(tmp_path, override, *more)


def test_offload_to_nvme_disables_checkpoints(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "engine={nvme_path: /x, offload_optimizer: nvme}")
    assert recipe.checkpoint.every is None
    assert load_recipe(recipe.model_dump(by_alias=True)) == recipe


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint.best_metric=eval/loss"], r"checkpoint\.best_metric: eval/loss .*data\.eval"),
        (["checkpoint.best_metric=eval/depth/half"], "eval/depth/half has no value"),
        (["checkpoint.best_metric=reward/margins"], r"did you mean reward/margin\?"),
        (["checkpoint.best_metric=separation/d_b"], r"separation/d_b .*separation\.every"),
        (
            ["data.eval=0.1", "evaluate.every=2", "optim.early_stop={metric: eval/nothing}"],
            r"optim\.early_stop\.metric: eval/nothing",
        ),
    ],
)
def test_a_metric_that_is_never_measured_is_refused_before_training(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        require_measured(recipe_of(tmp_path, *overrides))


def test_metrics_that_are_measured_pass(tmp_path: Path) -> None:
    for overrides in (
        ["checkpoint.best_metric=loss"],
        ["checkpoint.best_metric=separation/d_b", "separation.every=2", "checkpoint.mode=max"],
        ["checkpoint.best_metric=eval/reward/margin", "data.eval=0.1", "evaluate.every=2", "optim.early_stop={}"],
    ):
        require_measured(recipe_of(tmp_path, *overrides))


# ---- SIGTERM


def test_the_first_sigterm_is_handled_and_the_second_ends() -> None:
    signals: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with on_sigterm(lambda: signals.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [1]
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_line_ends_with_143(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from raydiv.cli import info, main

    def losses(options: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(info, "_losses", losses)
    assert main(["losses"]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
