"""DeepSpeed, and nothing of it elsewhere: partitioned weights, backward, the optimizer, and weights put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from raydiv.config import Recipe
from raydiv.training.zero_state import Partitions, Read, Snapshot, partitions_of, restore, snapshot, updates
from raydiv.utils import distributed as dist
from raydiv.utils.compat import hide_module

PERSISTENT_ELEMENTS = 1_000_000
"""Parameters up to this size are not partitioned between their uses under ZeRO-3."""


class DeepSpeedEngine:
    """A causal model under DeepSpeed at any ZeRO stage.

    ``build`` makes the model; under ZeRO-3 its weights go straight into partitions as they are read.
    """

    def __init__(self, recipe: Recipe, build: Callable[[], Any]) -> None:
        # its autotuner, of no use here, would load it for more than a second
        with hide_module("mlflow"):
            import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        # DeepSpeed would compile a shared-memory all-reduce for a minute, which ZeRO does not use: gloo serves it all
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        self._stage = recipe.engine.zero_stage
        assert self._stage != "auto", "the stage is settled before workers start (raydiv.commands.plan)"
        self._zero3 = self._stage == 3
        config = deepspeed_config(recipe)
        # transformers looks this object up while it loads, and forgets it when it is collected: another model that this
        # process loads later is to be whole
        loading = HfDeepSpeedConfig(config) if self._zero3 else None
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(
                dist_backend=None, timeout=timedelta(seconds=recipe.cluster.collective_timeout_s)
            )
        model = build()
        del loading
        if recipe.engine.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
        if self._stage == 0 and dist.world_size() == 1:
            # nothing to sum with nobody, which DeepSpeed does all the same, in a copy of all gradients
            self._deepspeed.enable_backward_allreduce = False
        if self._zero3:
            _look_ahead_less(self._deepspeed.optimizer.parameter_offload.param_coordinator)
        self.model = model
        self.device: torch.device = self._deepspeed.device
        self._partitions: Partitions = partitions_of(self._deepspeed, int(self._stage))

    def __call__(self, **inputs: Any) -> Any:
        """Forward of the model."""
        return self._deepspeed(**inputs)

    def backward(self, scalar: Tensor, last: bool) -> None:
        """Add the gradient of ``scalar``, this rank's share of the objective; ``last`` of the step on this rank.

        DeepSpeed averages over ranks where the objective sums, hence the factor.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(scalar * dist.world_size())

    def update(self, lr: float) -> float:
        """One optimizer update at rate ``lr``; returns the gradient's norm before clipping.

        Where that is not finite, nothing is updated.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        # without partitions DeepSpeed keeps no norm
        norm = self._whole_norm() if self._stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.discard()
            return norm
        self._deepspeed.step()
        return float(self._deepspeed.get_global_grad_norm() or 0.0) if norm is None else norm

    def discard(self) -> None:
        """Drop the gradients of the step without an update, as DeepSpeed does with gradients that are not finite.

        Raises RuntimeError where DeepSpeed made the update all the same: the weights are then wrong, and training must end.
        """
        made = self.updates
        self._drop_gradients()
        if self.updates != made:
            raise RuntimeError(
                "DeepSpeed applied a step that was to be discarded: this version of it is not supported (see "
                "cluster/constraints.txt for the versions tested)"
            )

    def _drop_gradients(self) -> None:
        optimizer = self._deepspeed.optimizer
        if self._stage == 0:
            for parameter in self.model.parameters():
                parameter.grad = None
        elif hasattr(optimizer, "clear_hp_grads"):  # its optimizer of bf16 under stage 1
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        else:
            name = "_get_norm_groups" if self._zero3 else "scaled_global_norm"
            invalid = torch.tensor(-1.0, device=self.device)
            # for this once its own method is hidden behind one that finds the norm not finite
            setattr(optimizer, name, lambda: [invalid] if self._zero3 else invalid)
            try:
                self._deepspeed.step()
            finally:
                delattr(optimizer, name)

    def _whole_norm(self) -> float:
        """Norm of the gradients, which every rank has whole once the last backward has summed them."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def whole(self, parameters: list[Tensor]) -> AbstractContextManager[None]:
        """Within the context these parameters are whole on every rank (they are partitioned under ZeRO-3)."""
        if not self._zero3:
            return nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(parameters)  # type: ignore[no-any-return]

    def weights(self, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) of every parameter, one at a time. All ranks must iterate together."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not trainable_only:
                with self.whole([parameter]):
                    yield name, parameter.detach().cpu().clone()

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made; a refused one is none."""
        return updates(self._deepspeed, self._partitions)

    def snapshot(self) -> Snapshot:
        """A copy on the CPU of this rank's share of what is trained, optimizer included."""
        return snapshot(self._deepspeed, self._partitions)

    def restore(self, read: Read, made: int) -> None:
        """Take up what ``read`` gives, after ``made`` updates, instead of what this engine has. All ranks must call it."""
        restore(self._deepspeed, self._partitions, read, made)

    def close(self) -> None:
        """Let go of hooks and buffers, for a process that builds another engine."""
        self._deepspeed.destroy()


LOOK_AHEAD = "_PartitionedParameterCoordinator__params_to_release"


def _look_ahead_less(coordinator: Any) -> None:
    """Let DeepSpeed look for the next use of a module's weights only where it could release them.

    It goes through the rest of the step for each module, those whose weights stay whole, or that have none, included: a small
    model with adapters has thousands, and its second step took a quarter of a minute longer.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import z3_leaf_module

    looks_ahead = getattr(coordinator, LOOK_AHEAD, None)
    if looks_ahead is None:  # of another DeepSpeed
        return

    def params_to_release(module: Any, step_id: int) -> set[int]:
        if all(parameter.ds_persist for parameter in iter_params(module, recurse=z3_leaf_module(module))):
            return set()
        found: set[int] = looks_ahead(module, step_id)
        return found

    setattr(coordinator, LOOK_AHEAD, params_to_release)


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration: what the recipe's sections say, and ``engine.deepspeed`` over it."""
    optim, engine = recipe.optim, recipe.engine
    bf16 = engine.precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip or 0.0,
        "bf16": {"enabled": bf16},
        # micro-batches add up in fp32 whatever they are computed in
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": engine.zero_stage,
            # small matrices stay whole: gathering them anew for every forward costs more than the memory that it saves
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            **_offload("offload_optimizer", engine.offload_optimizer, engine.nvme_path),
            **_offload("offload_param", engine.offload_parameters, engine.nvme_path),
        },
        "zero_force_ds_cpu_optimizer": False,
        # torch's AdamW on every device: DeepSpeed's own compiles for a minute at first use and rounds differently
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
    }
    return _merged(config, engine.deepspeed)


def _offload(key: str, device: str, nvme_path: str | None) -> dict[str, Any]:
    if device == "none":
        return {}
    return {key: {"device": device, "pin_memory": torch.cuda.is_available(), "nvme_path": nvme_path}}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on ``base``, section by section."""
    inner = {key: _merged(base[key], value) for key, value in over.items() if isinstance(base.get(key), dict)}
    return base | over | inner
