"""DeepSpeed: partitioned weights, backward, the optimizer, and gathered weights. Private parts of it stand in
``raydiv.utils.compat`` and ``raydiv.training.zero_state``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from raydiv.config import Recipe
from raydiv.training.zero_state import partitions_of
from raydiv.utils import distributed as dist
from raydiv.utils.compat import (
    hide_module,
    infinite_gradient_norm,
    limit_release_look_ahead,
    skip_shared_memory_op,
)

PERSISTENT_ELEMENTS = 1_000_000
"""Parameters up to this size stay whole between their uses under ZeRO-3."""


class DeepSpeedEngine:
    """A causal model under DeepSpeed at any ZeRO stage.

    ``build`` makes the model; under ZeRO-3 its weights are partitioned as they are read. ``partitions`` is this rank's
    part of the training state.
    """

    def __init__(self, recipe: Recipe, build: Callable[[], Any]) -> None:
        # DeepSpeed's autotuner, which is not used, would spend more than a second on it
        with hide_module("mlflow"):
            import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        if not recipe.cluster.use_gpu:  # on GPUs the look at DeepSpeed's kernels takes seconds in every worker
            skip_shared_memory_op()
        stage = recipe.engine.zero_stage
        assert stage != "auto", "engine.zero_stage is resolved before workers start (raydiv.commands.plan)"
        self._stage = int(stage)
        config = deepspeed_config(recipe)
        # transformers finds this object while it loads a model; it must not outlive the load, or a model that this
        # process loads later would be partitioned too
        loading = HfDeepSpeedConfig(config) if self._stage == 3 else None
        if not torch.distributed.is_initialized():  # Ray Train's workers have a process group already
            deepspeed.init_distributed(
                dist_backend=None, timeout=timedelta(seconds=recipe.cluster.collective_timeout_s)
            )
        model = build()
        del loading
        if recipe.engine.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
        if dist.world_size() == 1 and (self._stage == 0 or self._sums_in_fp32_on_every_rank):
            # DeepSpeed would all-reduce with no other rank, in a copy of all gradients
            self._deepspeed.enable_backward_allreduce = False
        self.model = model
        self.device: torch.device = self._deepspeed.device
        self.partitions = partitions_of(self._deepspeed, self._stage)
        if self._stage == 3:
            limit_release_look_ahead(self._deepspeed.optimizer)

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
        """Make one optimizer update at rate ``lr``; returns the gradient's norm before clipping.

        Where the norm is not finite, nothing is updated.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed keeps no norm at stage 0
        norm = self._total_norm() if self._stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.discard()
            return norm
        self._deepspeed.step()
        return float(self._deepspeed.get_global_grad_norm() or 0.0) if norm is None else norm

    def discard(self) -> None:
        """Drop the gradients of the step without an update, as DeepSpeed does with gradients that are not finite.

        Raises RuntimeError where DeepSpeed made the update all the same: the weights are then wrong, and training must
        end.
        """
        updates = self.partitions.updates
        self._drop_gradients()
        if self.partitions.updates != updates:
            raise RuntimeError(
                "DeepSpeed applied a step that was to be discarded: this version of it is not supported (see "
                "cluster/constraints.txt for the versions tested)"
            )

    def _drop_gradients(self) -> None:
        optimizer = self._deepspeed.optimizer
        if self._stage == 0:
            for parameter in self.model.parameters():
                parameter.grad = None
        elif self._sums_in_fp32_on_every_rank:
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        else:
            with infinite_gradient_norm(optimizer, self._stage, self.device):
                self._deepspeed.step()

    @property
    def _sums_in_fp32_on_every_rank(self) -> bool:
        """Whether DeepSpeed took its BF16_Optimizer, as it does at stage 1 in bf16 without offload."""
        return hasattr(self._deepspeed.optimizer, "clear_hp_grads")

    def _total_norm(self) -> float:
        """Norm of the gradients, which every rank has whole once the last backward has summed them."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def gathered(self, parameters: list[Tensor]) -> AbstractContextManager[None]:
        """Within the context these parameters are whole on every rank (they are partitioned under ZeRO-3)."""
        if self._stage != 3:
            return nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(parameters)  # type: ignore[no-any-return]

    def weights(self, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter, valid until the next one. All ranks must iterate together."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not trainable_only:
                with self.gathered([parameter]):
                    yield name, parameter.detach()

    def close(self) -> None:
        """Release hooks and buffers, for a process that builds another engine."""
        self._deepspeed.destroy()


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration: that of the recipe's sections, overridden by ``engine.deepspeed``."""
    optim, engine = recipe.optim, recipe.engine
    bf16 = engine.precision == "bf16"
    config: dict[str, Any] = {
        # placeholders: ``backward`` marks the last micro-batch of a step itself
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip or 0.0,
        "bf16": {"enabled": bf16},
        # a worker sums the gradients of its micro-batches in fp32 at any precision; between workers, DeepSpeed sums
        # them in the model's
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": engine.zero_stage,
            # on GPUs, gradients are reduced while the backward goes on; stage 3 does so by default
            **({"overlap_comm": True} if engine.zero_stage == 2 and recipe.cluster.use_gpu else {}),
            # gathering small matrices for every forward costs more than the memory that it saves
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
    return _merge(config, engine.deepspeed)


def _offload(key: str, device: str, nvme_path: str | None) -> dict[str, Any]:
    if device == "none":
        return {}
    return {key: {"device": device, "pin_memory": torch.cuda.is_available(), "nvme_path": nvme_path}}


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides``, merged section by section."""
    sections = {key: _merge(base[key], value) for key, value in overrides.items() if isinstance(base.get(key), dict)}
    return base | overrides | sections
