"""The yardstick of start-up: workers under Ray Train that make one DeepSpeed step of a model of no size, and nothing else.

Run as a script of its own by ``raydiv.benchmarks.start``: WORKERS USE_GPU FOLDER. It leaves the file FOLDER/stepped when the
step is done.
"""

from __future__ import annotations

import sys
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


def main(workers: str, use_gpu: str, folder: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(include_dashboard=False, log_to_driver=False)
    share = round(0.9 * ray.cluster_resources()["CPU"] / int(workers), 3)
    trainer = TorchTrainer(
        step,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(
            num_workers=int(workers), use_gpu=use_gpu == "True", resources_per_worker={"CPU": share}
        ),
        run_config=RunConfig(storage_path=folder),
    )
    trainer.fit()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
