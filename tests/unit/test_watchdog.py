"""Workers that stand still: who is named, and that none is left standing."""

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
from raydiv.commands.train import _report_failure
from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import diagnose_hang
from raydiv.training.step_timer import StepTimer
from raydiv.training.watchdog import HUNG_EXIT_STATUS, Watchdog


def test_nobody_is_named_before_the_time() -> None:
    assert diagnose_hang([], 60) is None
    assert diagnose_hang(beats({"idle": 59.0}, {"idle": 3.0}), 60) is None


def test_who_has_come_least_far_is_whom_the_others_wait_for() -> None:
    said = diagnose_hang(beats({}, {"passed": 49, "phase": "data", "where": "training/feed.py:75 (read)"}, {}), 60)
    assert said == (
        "training has stood still for 60 s (cluster.timeout_s) at worker 1 (a, process 7): data of step 6, at "
        "training/feed.py:75 (read); 2 others waited, in score of step 6"
    )


def test_who_says_nothing_comes_before_who_has_come_least_far() -> None:
    said = diagnose_hang(beats({"passed": 49}, {"silent": 16.0}), 60)
    assert said is not None
    assert "at worker 1 (a, process 7): score of step 6 (says nothing since 16 s); 1 other waited" in said


def test_where_all_stand_alike_some_are_named() -> None:
    said = diagnose_hang(beats(*({},) * 7), 60)
    assert said is not None
    assert [f"worker {rank}" in said for rank in range(7)] == [True] * 4 + [False] * 3
    assert said.endswith("; and 3 more there")


def test_phases_take_what_time_passes_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slowly() -> Iterator[int]:
        for wait in (3, 1):
            now[0] += wait
            yield wait
        now[0] += 50

    phases, seen = StepTimer(), []
    phases.spent()
    for wait in phases.timed_steps(slowly(), behind=4):
        for phase, seconds in (("score", 10), ("judge", 2), ("score", 5)):
            phases.enter(phase)
            now[0] += seconds
        assert phases.idle == 5
        phases.enter("log")
        assert phases.until_judged == wait + 10
        seen.append((wait, phases.step, phases.spent()))
        now[0] += 20
    before = phases.passed
    phases.advance()
    assert phases.passed == before + 1
    assert phases.idle == 0
    assert seen == [
        (3, 5, {"start": 0, "data": 3, "score": 15, "judge": 2, "log": 0}),
        (1, 6, {"log": 20, "data": 1, "score": 15, "judge": 2}),
    ]


def test_beats_are_of_this_start_alone_and_silence_is_seen(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.clear_heartbeats()
    run.write_heartbeat(replace(BEAT, rank=3))
    run.clear_heartbeats()
    for beat in beats({}, {}):
        run.write_heartbeat(beat)
    os.utime(run.path / "workers" / "1.json", (1, time.time() - 100))
    found = run.heartbeats()
    assert [beat.rank for beat in found] == [0, 1]
    assert [beat.is_silent for beat in found] == [False, True]
    assert run.claim_report("stalled")
    assert not run.claim_report("stalled")
    assert run.heartbeats() == found


def test_a_worker_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    run, phases = RunDirectory(tmp_path), StepTimer()
    run.clear_heartbeats()
    with Watchdog(run, phases, timeout=0.5):
        for _ in range(10):
            phases.advance()
            time.sleep(0.1)
    assert run.heartbeats()[0].passed == 10
    assert not run.events.exists()


STUCK = """
import sys, time
from pathlib import Path
from raydiv.runs.directory import RunDirectory
from raydiv.training.step_timer import StepTimer
from raydiv.training.watchdog import Watchdog

def waits_for_ever():
    time.sleep(60)

run, timer = RunDirectory(Path(sys.argv[1])), StepTimer()
run.clear_heartbeats()
timer.enter("data")
with Watchdog(run, timer, timeout=0.5):
    waits_for_ever()
"""


def test_a_worker_that_stands_still_says_where_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    ended = subprocess.run([sys.executable, script, tmp_path / "run"], timeout=60)
    assert ended.returncode == HUNG_EXIT_STATUS
    event = json.loads(RunDirectory(tmp_path / "run").events.read_text())
    assert f"data of step 0, at {tmp_path.name}/stuck.py:9 (waits_for_ever)" in event["message"]


def test_a_failure_of_workers_that_stood_still_says_so(tmp_path: Path) -> None:
    from ray.train import TrainingFailedError

    run = RunDirectory(tmp_path)
    run.clear_heartbeats()

    def fit() -> None:
        raise TrainingFailedError("another worker's connection was closed")

    run.write_heartbeat(replace(BEAT, idle=3.0))
    with pytest.raises(RuntimeError, match="connection was closed"):
        _report_failure(fit, run, 60)
    run.write_heartbeat(BEAT)
    with pytest.raises(RuntimeError, match="training has stood still for 60 s"):
        _report_failure(fit, run, 60)
