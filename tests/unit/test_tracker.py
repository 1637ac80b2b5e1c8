"""MLflow as a follower: parameters, metrics and artifacts arrive, and an unreachable store costs only a warning."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raydiv.config import Recipe, load_recipe
from raydiv.runs.tracker import MlflowTracker, tracking_uri
from raydiv.utils.dotted import flatten
from raydiv.utils.signals import Terminated


def recipe(output: Path) -> Recipe:
    return load_recipe(
        {
            "name": "tracked",
            "output_dir": str(output),
            "model": {"id": "m"},
            "loss": {"type": "dpo"},
            "optim": {"steps": 3},
        }
    )


def test_the_store_is_of_the_recipe_else_the_environment_else_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = recipe(tmp_path)
    assert tracking_uri(configured) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(configured) == "http://127.0.0.1:1"
    configured.track.uri = "sqlite:///elsewhere.db"
    assert tracking_uri(configured) == "sqlite:///elsewhere.db"


def test_an_outage_delays_metrics_in_order_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    tracker = MlflowTracker(recipe(tmp_path), {"data.fingerprint": "f"}, warnings.append)
    tracker.log_metrics({"step": 1, "loss": 3.0})
    run_id = tracker.run_id  # all before this was sent
    assert run_id is not None
    send = MlflowClient.log_batch

    monkeypatch.setattr(MlflowClient, "log_batch", unreachable)
    tracker.log_metrics({"step": 2, "loss": 2.0})
    tracker.log_metrics({"step": 3, "loss": 1.0})
    assert tracker.run_id == run_id
    monkeypatch.setattr(MlflowClient, "log_batch", send)
    assert tracker.finish()
    assert len(warnings) == 1
    client = MlflowClient(tracker.uri)
    history = client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    run = client.get_run(run_id)
    assert run.data.params["loss.type"] == "dpo"
    assert run.data.tags["data.fingerprint"] == "f"


LINES = [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]


def sent_by(tracker: MlflowTracker) -> list[tuple[int, float]]:
    assert tracker.run_id is not None
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    return [(entry.step, entry.value) for entry in history]


def test_metrics_of_an_outage_are_sent_by_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "mlflow.json"
    first = MlflowTracker(recipe(tmp_path), {}, print, state_file=state)
    first.log_metrics(LINES[0])
    run_id = first.run_id
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", unreachable)
        first.log_metrics(LINES[1])
        assert not first.finish("KILLED")
    later = MlflowTracker(recipe(tmp_path), {}, print, state_file=state)
    assert later.lines_sent == 1
    for line in LINES[later.lines_sent :]:
        later.log_metrics(line)
    assert later.finish()
    assert later.run_id == run_id
    assert sent_by(later) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert MlflowClient(later.uri).get_run(str(run_id)).info.status == "FINISHED"


def test_a_sent_line_that_was_not_noted_is_not_sent_again(tmp_path: Path) -> None:
    state = tmp_path / "mlflow.json"
    first = MlflowTracker(recipe(tmp_path), {}, print, state_file=state)
    for line in LINES[:2]:
        first.log_metrics(line)
    assert first.run_id
    state.write_text(state.read_text().replace('"lines": 2', '"lines": 1'))
    later = MlflowTracker(recipe(tmp_path), {}, print, state_file=state)
    for line in LINES[later.lines_sent :]:
        later.log_metrics(line)
    assert sent_by(later) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_store_reached_late_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", unreachable)
        tracker = MlflowTracker(recipe(tmp_path), {}, print, state_file=tmp_path / "mlflow.json")
        tracker.log_metrics(LINES[0])
        assert tracker.run_id  # created, but without its parameters
    tracker.log_metrics(LINES[1])
    assert tracker.finish()
    assert sent_by(tracker) == [(1, 3.0), (2, 2.0)]
    client = MlflowClient(tracker.uri)
    assert len(client.search_runs([client.get_run(str(tracker.run_id)).info.experiment_id])) == 1


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("unreachable")


def test_names_of_sets_and_categories_may_have_any_character(tmp_path: Path) -> None:
    tracker = MlflowTracker(recipe(tmp_path), {}, print)
    tracker.log_metrics({"step": 1, "evaluate/safety/Fraud & Theft": 0.5, "evaluate/asr_set/Salad-Data:base_set": 0.25})
    assert tracker.finish()
    logged = MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics
    assert logged == {"evaluate/safety/Fraud _ Theft": 0.5, "evaluate/asr_set/Salad-Data:base_set": 0.25}


def test_a_store_that_is_never_reached_is_reported(tmp_path: Path) -> None:
    warnings: list[str] = []
    configured = recipe(tmp_path)
    configured.track.uri = "http://127.0.0.1:9"
    tracker = MlflowTracker(configured, {}, warnings.append)
    tracker.log_metrics({"step": 1, "loss": 3.0})
    assert not tracker.finish()
    assert len(warnings) == 1
    assert "127.0.0.1:9" in warnings[0]


def test_a_run_that_fails_after_finish_has_status_failed(tmp_path: Path) -> None:
    tracker = MlflowTracker(recipe(tmp_path), {}, print)
    assert tracker.finish()
    assert tracker.finish("FAILED")
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (Terminated, "KILLED"), (ValueError, "FAILED")]
)
def test_an_exception_sets_the_status(error: type[BaseException], status: str, tmp_path: Path) -> None:
    tracker = MlflowTracker(recipe(tmp_path), {}, print)
    with pytest.raises(error), tracker.end_on_error():
        raise error
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == status


def test_flatten_keeps_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_a_server_that_never_answers_costs_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests that time out: the first, that of the end, and one for the status after a failure."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    requests: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    requests.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        silent = recipe(tmp_path)
        silent.track.uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        tracker = MlflowTracker(silent, {}, lambda line: None)
        for step in range(2000):
            tracker.log_metrics({"step": step, "loss": 1.0})
        assert not tracker.finish()
        assert len(requests) <= 4
    for request in requests:
        request.close()


def test_lines_that_wait_are_sent_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(recipe(tmp_path), {}, lambda line: None)
    assert tracker.run_id is not None
    send, sizes = MlflowClient.log_batch, []

    def log_batch(client: Any, run: str, metrics: Any = (), **others: Any) -> None:
        sizes.append(len(metrics))
        send(client, run, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", unreachable)
    for step in range(700):
        tracker.log_metrics({"step": step, "loss": 1.0, "reward/margin": float(step)})
    assert tracker.run_id is not None
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    assert tracker.finish()
    assert sizes == [1000, 400]
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "reward/margin")
    by_step = sorted(history, key=lambda metric: metric.step)
    assert [metric.value for metric in by_step] == [float(step) for step in range(700)]
    assert tracker.lines_sent == 700
