"""Hangs of training workers: which rank the diagnosis suspects, and that every hung worker ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.heartbeats import BEAT, beats
from raydiv.commands.train import _fit_or_explain
from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import diagnose_hang
from raydiv.training.step_timer import StepTimer
from raydiv.training.watchdog import HUNG_EXIT_STATUS, Watchdog


def test_no_hang_before_the_timeout() -> None:
    assert diagnose_hang([], 60) is None
    assert diagnose_hang(beats({"idle": 59.0}, {"idle": 3.0}), 60) is None


def test_the_straggler_is_the_suspect() -> None:
    message = diagnose_hang(beats({}, {"passed": 49, "phase": "data", "where": "training/feed.py:75 (read)"}, {}), 60)
    assert message == (
        "no progress for 60 s (cluster.timeout_s). Suspect: rank 1 (a, pid 7), in data of step 6 at "
        "training/feed.py:75 (read). Waiting in a collective: 2 ranks, in score of step 6"
    )


def test_a_silent_rank_is_suspected_before_the_straggler() -> None:
    message = diagnose_hang(beats({"passed": 49}, {"silent": 16.0}), 60)
    assert message is not None
    assert "Suspect: rank 1 (a, pid 7), in score of step 6 (no heartbeat for 16 s). " in message
    assert message.endswith(": 1 rank, in score of step 6")


def test_of_many_suspects_four_are_named() -> None:
    message = diagnose_hang(beats(*({},) * 7), 60)
    assert message is not None
    assert [f"rank {rank} (" in message for rank in range(7)] == [True] * 4 + [False] * 3
    assert "; and 3 more" in message
    assert "Waiting" not in message


def test_the_step_timer_counts_the_time_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow_steps() -> Iterator[int]:
        for wait in (3, 1):
            now[0] += wait
            yield wait
        now[0] += 50

    timer, steps = StepTimer(), []
    timer.take_seconds()
    for wait in timer.timed_steps(slow_steps(), behind=4):
        for phase, seconds in (("score", 10), ("judge", 2), ("score", 5)):
            timer.enter(phase)
            now[0] += seconds
        assert timer.idle == 5
        timer.enter("log")
        assert timer.seconds_to_judge == wait + 10
        steps.append((wait, timer.step, timer.take_seconds()))
        now[0] += 20
    before = timer.progress
    timer.advance()
    assert timer.progress == before + 1
    assert timer.idle == 0
    assert steps == [
        (3, 5, {"start": 0, "data": 3, "score": 15, "judge": 2, "log": 0}),
        (1, 6, {"log": 20, "data": 1, "score": 15, "judge": 2}),
    ]


def test_heartbeats_are_of_this_start_only_and_silence_is_measured(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.heartbeats.clear()
    run.heartbeats.write(replace(BEAT, rank=3))
    run.heartbeats.clear()
    for beat in beats({}, {}):
        run.heartbeats.write(beat)
    os.utime(run.path / "workers" / "1.json", (1, time.time() - 100))
    read = run.heartbeats.read()
    assert [beat.rank for beat in read] == [0, 1]
    assert [beat.is_silent for beat in read] == [False, True]
    assert run.heartbeats.claim_report("stalled")
    assert not run.heartbeats.claim_report("stalled")
    assert run.heartbeats.read() == read


def test_a_worker_that_makes_progress_does_not_end(tmp_path: Path) -> None:
    run, timer = RunDirectory(tmp_path), StepTimer()
    run.heartbeats.clear()
    with Watchdog(run, timer, timeout=0.5):
        for _ in range(10):
            timer.advance()
            time.sleep(0.1)
    assert run.heartbeats.read()[0].passed == 10
    assert not run.events.path.exists()


STUCK = """
import sys, time
from pathlib import Path
from raydiv.runs.directory import RunDirectory
from raydiv.training.step_timer import StepTimer
from raydiv.training.watchdog import Watchdog

def waits_for_ever():
    time.sleep(60)

run, timer = RunDirectory(Path(sys.argv[1])), StepTimer()
run.heartbeats.clear()
timer.enter("data")
with Watchdog(run, timer, timeout=0.5):
    waits_for_ever()
"""


def test_a_hung_worker_logs_its_line_of_code_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    ended = subprocess.run([sys.executable, script, tmp_path / "run"], timeout=60)
    assert ended.returncode == HUNG_EXIT_STATUS
    event = json.loads(RunDirectory(tmp_path / "run").events.path.read_text())
    assert f"in data of step 0 at {tmp_path.name}/stuck.py:9 (waits_for_ever)" in event["message"]


def test_the_failure_of_a_hang_is_its_diagnosis(tmp_path: Path) -> None:
    from ray.train import TrainingFailedError

    run = RunDirectory(tmp_path)
    run.heartbeats.clear()

    def fit() -> None:
        raise TrainingFailedError("another worker's connection was closed")

    run.heartbeats.write(replace(BEAT, idle=3.0))
    with pytest.raises(RuntimeError, match="connection was closed"):
        _fit_or_explain(fit, run, 60)
    run.heartbeats.write(BEAT)
    with pytest.raises(RuntimeError, match=r"60 s \(cluster\.timeout_s\)"):
        _fit_or_explain(fit, run, 60)
