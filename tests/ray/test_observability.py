"""Observability of a run in training: Ray metrics, MLflow's system metrics, a profiler's trace."""

from __future__ import annotations

import gzip
import json
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from helpers.small_run import recipe_of
from raydiv.config import load_recipe
from raydiv.runs.prometheus import PrometheusMetrics
from raydiv.runs.tracker import MlflowTracker
from raydiv.training.metric_names import step_metrics
from raydiv.training.profiler import StepProfiler
from raydiv.training.utilisation import Utilisation, product_flops
from raydiv.utils.errors import UserError

SMALLEST = {"model": {"id": "m"}, "loss": {"type": "kldo"}, "optim": {"steps": 3}}


def test_utilisation_is_relative_to_the_flops_of_a_matrix_product() -> None:
    assert product_flops(torch.device("cpu"), torch.bfloat16, size=64) > 0
    assert Utilisation(multiplied_parameters=10**9, peak=8 * 500e12).share(
        tokens_per_second=200_000.0
    ) == pytest.approx(0.3)
    assert "mfu" in step_metrics(load_recipe(SMALLEST, ["cluster.use_gpu=true"]))
    assert "mfu" not in step_metrics(load_recipe(SMALLEST))


def test_a_trace_has_the_configured_steps(tmp_path: Path) -> None:
    profiled = StepProfiler((2, 3), tmp_path / "profile")
    for step in range(1, 6):
        profiled.before_step(step)
        torch.ones(step).sum()
        profiled.after_step(step, last=step == 5)
        assert (tmp_path / "profile").exists() == (step >= 3)
    (trace,) = (tmp_path / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::ones" and event["ph"] == "X" for event in events) == 2


def test_a_trace_is_written_where_training_ends_before_its_last_step(tmp_path: Path) -> None:
    profiled = StepProfiler((1, 100), tmp_path)
    profiled.before_step(1)
    profiled.after_step(1, last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json.gz"]


@pytest.mark.parametrize(("written", "steps"), [("3", (3, 3)), ("3-5", (3, 5)), ("null", None)])
def test_steps_to_profile(written: str, steps: tuple[int, int] | None) -> None:
    assert load_recipe(SMALLEST, [f"engine.profile={written}"]).engine.profiled_steps == steps


@pytest.mark.parametrize("written", ["5-3", "0", "x", "1-"])
def test_invalid_steps_to_profile(written: str) -> None:
    with pytest.raises(UserError, match=r"engine\.profile"):
        load_recipe(SMALLEST, [f"engine.profile={written}"])


def test_mlflow_gets_system_metrics_where_its_own_variable_enables_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = MlflowTracker(recipe_of(tmp_path / "m", {"train": "t", "eval": "e"}, tmp_path, "run"), {}, print)
    run = tracker.run_id
    assert run is not None
    client, end = MlflowClient(tracker.uri), time.monotonic() + 60
    while "system/cpu_utilization_percentage" not in client.get_run(run).data.metrics:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert tracker.finish()
    assert client.get_run(run).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_prometheus_scrapes_a_runs_metrics_from_a_node() -> None:
    import ray

    PrometheusMetrics("mine").show({"step": 3, "reward/margin": 0.25, "divergence/name": "KL"})
    (node,) = ray.nodes()
    page, end = "", time.monotonic() + 60
    while "raydiv_reward_margin{" not in page:
        assert time.monotonic() < end, page[:500]
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}", timeout=10) as answer:
            page = answer.read().decode()
    (line,) = [line for line in page.splitlines() if line.startswith("ray_raydiv_reward_margin{")]
    assert 'run="mine"' in line
    assert float(line.rpartition(" ")[2]) == 0.25
    assert "raydiv_divergence_name" not in page
