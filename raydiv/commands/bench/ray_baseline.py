"""The yardstick of start-up: workers under Ray Train that make one DeepSpeed step of a model of no size, and nothing else.

Run as a script of its own: WORKERS USE_GPU FOLDER [TRIALS]. It leaves the file FOLDER/stepped when a step is done. With TRIALS
it does so in as many trials of Ray Tune, one after another, and prints the seconds of each as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STEPPED = "stepped"


def step(config: dict[str, Any]) -> None:
    """What each worker does."""
    import deepspeed
    import ray.train
    import torch

    # or DeepSpeed compiles for a minute, as it would in raydiv
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=torch.nn.Linear(8, 8),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 3},
        },
    )
    engine.backward(engine(torch.ones(1, 8, device=engine.device)).sum())
    engine.step()
    if ray.train.get_context().get_world_rank() == 0:
        (Path(config["folder"]) / STEPPED).touch()


def fit(workers: int, use_gpu: bool, folder: str) -> None:
    """Start the workers, let them step, and stop them."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    share = round(0.9 * ray.cluster_resources()["CPU"] / workers, 3)
    TorchTrainer(
        step,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": share}),
        run_config=RunConfig(storage_path=folder),
    ).fit()


def trial(config: dict[str, Any]) -> None:
    """What Ray Tune runs as a trial."""
    from ray import tune

    fit(config["workers"], config["use_gpu"], config["folder"])
    tune.report({"stepped": 1})


def trials(workers: int, use_gpu: bool, folder: str, count: int) -> list[float]:
    """Seconds of each of ``count`` trials, from when Ray Tune starts it until it is complete."""
    from ray import tune

    class Clock(tune.Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            started.append(time.monotonic())

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            seconds.append(time.monotonic() - started[-1])

    started: list[float] = []
    seconds: list[float] = []
    space = {"workers": workers, "use_gpu": use_gpu, "folder": folder, "number": tune.grid_search(list(range(count)))}
    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0, "memory": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=folder, callbacks=[Clock()], verbose=0),
    ).fit()
    return seconds


def main(workers: str, use_gpu: str, folder: str, count: str | None = None) -> None:
    """Without a ``count`` one start, else so many trials, whose seconds are printed as JSON."""
    import ray

    ray.init(
        address=os.environ.get("RAY_ADDRESS") or "local",
        include_dashboard=count is not None,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
    )
    given = (int(workers), use_gpu == "True", folder)
    if count is None:
        fit(*given)
    else:
        print(json.dumps({"seconds": trials(*given, int(count))}))
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
