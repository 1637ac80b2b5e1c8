"""The baseline of start-up: Ray Train workers that make one DeepSpeed step of a tiny model, and nothing else.

A script with the arguments WORKERS USE_GPU FOLDER [TRIALS]. It creates the file FOLDER/stepped when the step is done.
With TRIALS it runs as many trials of Ray Tune, one after another, and prints the seconds of each as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from raydiv.utils.compat import skip_shared_memory_op

DONE_FILE = "stepped"


def step(config: dict[str, Any]) -> None:
    """The training function of each worker."""
    import deepspeed
    import ray.train
    import torch

    skip_shared_memory_op()  # as raydiv does: compiling it takes a minute
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
        (Path(config["folder"]) / DONE_FILE).touch()


def fit(workers: int, use_gpu: bool, folder: str) -> None:
    """Start the workers, make the step, and stop the workers."""
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
    """The trainable of Ray Tune."""
    from ray import tune

    fit(config["workers"], config["use_gpu"], config["folder"])
    tune.report({"stepped": 1})


def trials(workers: int, use_gpu: bool, folder: str, count: int) -> list[float]:
    """Seconds of each of ``count`` trials, from Ray Tune's start of the trial to its completion."""
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
    """One start without ``count``; with it, as many trials, whose seconds are printed as JSON."""
    import ray

    ray.init(
        address=os.environ.get("RAY_ADDRESS") or "local",
        include_dashboard=count is not None,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
    )
    arguments = (int(workers), use_gpu == "True", folder)
    if count is None:
        fit(*arguments)
    else:
        print(json.dumps({"seconds": trials(*arguments, int(count))}))
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
