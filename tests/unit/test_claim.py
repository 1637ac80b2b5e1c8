"""One writer a directory: a second process is refused, and the claim of one that has ended is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from helpers.small_run import recipe_of, write_files
from raydiv.cli import main
from raydiv.config import save_recipe
from raydiv.utils import claim as claim_module
from raydiv.utils.claim import SILENT_SECONDS, claim, is_claimed
from raydiv.utils.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from raydiv.utils.claim import claim
with claim(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    directory, lines = tmp_path / "runs" / "run", []
    with held(directory) as process:
        refused = pytest.raises(UserError, match=rf"{directory}: .*process {process.pid} on .*raydiv status")
        with refused, claim(directory, lines.append):
            raise AssertionError("not reached")
        assert lines == []
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claim(directory, lines.append):
            pass
    assert len(lines) == 1
    assert f"process {process.pid}" in lines[0]
    with claim(directory, lines.append):
        pass
    assert len(lines) == 1, "a claim that was given back is not taken over"
    assert list(directory.parent.iterdir()) == []


def test_a_process_may_wait_for_another(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        process.terminate()
        with claim(tmp_path / "run", lambda line: None, wait=30):
            pass


@pytest.mark.parametrize("links", [True, False])
def test_the_claim_of_another_machine_lasts_as_long_as_it_is_renewed(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / ".run.claim"
    with claim(tmp_path / "run", print):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another", "host": "node-7", "pid": 1}))
        with pytest.raises(UserError, match="process 1 on node-7"), claim(tmp_path / "run", print):
            raise AssertionError("not reached")
    assert file.exists(), "nobody gives back the claim of another"
    past = time.time() - SILENT_SECONDS - 1
    os.utime(file, (past, past))
    with claim(tmp_path / "run", print):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_a_claim_is_seen_by_others(tmp_path: Path) -> None:
    directory, file = tmp_path / "run", tmp_path / ".run.claim"
    assert not is_claimed(directory)
    with held(directory) as process:
        assert is_claimed(directory)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_claimed(directory)
    with claim(directory, lambda line: None):
        assert is_claimed(directory)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another"}))
        assert is_claimed(directory)
        past = time.time() - SILENT_SECONDS - 1
        os.utime(file, (past, past))
        assert not is_claimed(directory)


def test_a_claim_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "RENEWAL_SECONDS", 0.05)
    with claim(tmp_path / "run", print):
        os.utime(tmp_path / ".run.claim", (0, 0))
        end = time.monotonic() + 30
        while (tmp_path / ".run.claim").stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_claim_that_was_taken_over_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that read the claim before another took it over: the new claim never leaves its place."""
    with held(tmp_path / "run"):
        pass
    file, is_stale = tmp_path / ".run.claim", claim_module._is_stale
    another = ExitStack()

    def but_the_claim(method: Any) -> Any:
        def checked(path: Path, *rest: Any, **options: Any) -> Any:
            assert path != file, "the new claim leaves its place"
            return method(path, *rest, **options)

        return checked

    def before_another(read: Path, holder: Any) -> bool:
        stale = is_stale(read, holder)
        monkeypatch.setattr(claim_module, "_is_stale", is_stale)
        another.enter_context(claim(tmp_path / "run", lambda line: None))
        for name in ("rename", "unlink"):
            monkeypatch.setattr(Path, name, but_the_claim(getattr(Path, name)))
        return stale

    monkeypatch.setattr(claim_module, "_is_stale", before_another)
    with pytest.raises(UserError, match=f"process {os.getpid()}"), claim(tmp_path / "run", lambda line: None):
        raise AssertionError("not reached")
    monkeypatch.undo()
    another.close()


def test_the_removal_by_a_process_that_was_killed_meanwhile_is_taken_over(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        pass
    file = tmp_path / ".run.claim"
    ended = json.loads(file.read_text())
    removal = file.with_name(f"{file.name}.{ended['token']}")
    removal.write_text(json.dumps(ended | {"token": "another"}))
    with claim(tmp_path / "run", lambda line: None):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def try_once(directory: str, ready: Any, results: Any, all_tried: Any) -> None:
    ready.wait()
    try:
        with claim(Path(directory), lambda line: None):
            results.put(1)
            all_tried.wait()
    except UserError:
        results.put(0)


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_processes_gets_it(stale: bool, tmp_path: Path) -> None:
    context, count = get_context("fork"), 8
    if stale:
        with held(tmp_path / "run"):
            pass
    ready, results, all_tried = context.Event(), context.Queue(), context.Event()
    arguments = (str(tmp_path / "run"), ready, results, all_tried)
    processes = [context.Process(target=try_once, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    ready.set()
    held_by = sum(results.get(timeout=60) for _ in range(count))
    all_tried.set()
    assert held_by == 1
    for process in processes:
        process.join()


@pytest.mark.parametrize("command", ["train", "train --resume", "sweep", "study", "export"])
def test_commands_leave_the_directory_of_another_process_alone(
    command: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {
        "sweep": ["sweep={space: {optim.lr: [0.1]}, search: grid, goal: maximize eval/reward/margin}"],
        "study": ["study={losses: [dpo]}"],
    }
    name, *options = command.split()
    recipe = recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "run", *sections.get(name, []))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    words = [str(tmp_path / "recipe.yaml")]
    if name == "export":
        words = [str(tmp_path / "another"), str(tmp_path / "runs" / "run")]
    with held(tmp_path / "runs" / "run") as process:
        assert main([name, *words, *options]) == 2
    message = capsys.readouterr().err
    assert f"process {process.pid}" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "runs" / "run").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=rf"output_dir: {tmp_path}/file cannot be written")
    with refused, claim(tmp_path / "file" / "run", print):
        raise AssertionError("not reached")
