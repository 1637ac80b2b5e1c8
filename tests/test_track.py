"""MLflow as a follower: parameters, metrics and artifacts arrive, and a store that is away costs nothing but a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raydiv.config import Recipe, load_recipe
from raydiv.track import Tracker, flatten, tracking_uri


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


def test_the_store_is_the_recipes_then_the_environments_then_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = recipe(tmp_path)
    assert tracking_uri(mine) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(mine) == "http://127.0.0.1:1"
    mine.track.uri = "sqlite:///elsewhere.db"
    assert tracking_uri(mine) == "sqlite:///elsewhere.db"


def test_an_outage_delays_metrics_in_order_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    tracker = Tracker(recipe(tmp_path), {"data.fingerprint": "f"}, warnings.append)
    tracker.metrics({"step": 1, "loss": 3.0})
    run_id = tracker.run_id  # all before this was sent
    assert run_id is not None
    send = MlflowClient.log_batch

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    tracker.metrics({"step": 2, "loss": 2.0})
    tracker.metrics({"step": 3, "loss": 1.0})
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


def test_names_of_sets_and_categories_may_hold_any_character(tmp_path: Path) -> None:
    tracker = Tracker(recipe(tmp_path), {}, print)
    tracker.metrics({"step": 1, "evaluate/safety/Fraud & Theft": 0.5, "evaluate/asr_set/Salad-Data:base_set": 0.25})
    assert tracker.finish()
    logged = MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics
    assert logged == {"evaluate/safety/Fraud _ Theft": 0.5, "evaluate/asr_set/Salad-Data:base_set": 0.25}


def test_a_store_that_never_comes_is_reported(tmp_path: Path) -> None:
    warnings: list[str] = []
    mine = recipe(tmp_path)
    mine.track.uri = "http://127.0.0.1:9"
    tracker = Tracker(mine, {}, warnings.append)
    tracker.metrics({"step": 1, "loss": 3.0})
    assert not tracker.finish()
    assert len(warnings) == 1
    assert "127.0.0.1:9" in warnings[0]


def test_a_run_that_fails_after_its_end_is_failed(tmp_path: Path) -> None:
    tracker = Tracker(recipe(tmp_path), {}, print)
    assert tracker.finish()
    assert tracker.finish("FAILED")
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FAILED"


def test_flatten_keeps_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
