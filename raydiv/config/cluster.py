"""The section ``cluster``: the resources of a run, and its restarts after a failure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raydiv.config.section import Section


class ReservedResources(Section):
    """The nodes of a kind of process, and what it reserves there in addition to CPUs and GPUs."""

    accelerator: str | None = Field(
        default=None, description="type of GPU of its node, by Ray's name: A100, H100, L4 ..."
    )
    custom: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Ray's custom resources, which select the nodes: {cpu_only: 1}"
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK", description="PACK: on few nodes; SPREAD: on many; STRICT_: on one node, or each on its own"
    )


class TaskResources(ReservedResources):
    """A task, or an actor of a pool. They start one by one, so strict placements do not apply."""

    cpus: PositiveFloat | None = Field(
        default=None, description="CPUs of an actor; by default 1, or all CPUs in equal shares"
    )
    placement: Literal["PACK", "SPREAD"] = Field(default="PACK", description="PACK: on few nodes; SPREAD: on many")


class PoolResources(TaskResources):
    """An actor that holds a model."""

    gpus: NonNegativeFloat | None = Field(
        default=None, description="GPUs of an actor; by default 1 with use_gpu. 0.5: two share one; 0: on CPUs"
    )


class ClusterConfig(Section):
    """Ray's resources. Without RAY_ADDRESS, a local Ray is started for the length of the command."""

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = Field(
        default=None, description="fewest workers to train with while nodes leave and join; by default num_workers"
    )
    use_gpu: bool = False
    cpus: PositiveFloat | None = Field(
        default=None, description="CPUs of all processes of a run; by default the cluster's"
    )
    cpus_per_worker: PositiveFloat | None = Field(
        default=None, description="CPUs of a training worker; by default nine tenths of the run's, in equal shares"
    )
    pool_actors: PositiveInt | None = Field(
        default=None,
        description="number of models that score, embed and answer in parallel; by default one a GPU, or one a CPU",
    )
    worker_memory_gb: PositiveFloat | None = Field(
        default=None, description="memory (GiB) of a worker's GPU, or its share of a node's; by default the actual one"
    )
    train: ReservedResources = Field(
        default_factory=ReservedResources,
        description="nodes of the training workers; their CPUs and GPUs are set above",
    )
    pool: PoolResources = Field(default_factory=PoolResources, description="an actor that scores, embeds or answers")
    tokenize: TaskResources = Field(default_factory=TaskResources, description="an actor that tokenizes")
    wait_s: NonNegativeInt = Field(
        default=0, description="seconds to wait for an autoscaler's nodes where the cluster is too small"
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        default=0, description="restarts of failed workers, from the newest checkpoint; -1: no limit"
    )
    address: str | None = Field(
        default=None,
        description="cluster of raydiv submit (http://HEAD:8265); no other command reads it",
    )
    timeout_s: PositiveInt = Field(
        default=1800, description="seconds without progress after which the workers are terminated"
    )
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of every worker")

    @model_validator(mode="after")
    def _can_shrink(self) -> ClusterConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than num_workers ({self.num_workers})")
        if self.max_failures == 0:
            raise ValueError("min_workers needs max_failures: without it, a lost worker ends the run")
        if not self.use_gpu and self.cpus_per_worker is None:
            raise ValueError("min_workers needs cpus_per_worker, by which Ray counts the workers that fit")
        return self

    @model_validator(mode="after")
    def _pool_gpus_apply(self) -> ClusterConfig:
        if self.pool.gpus is not None and not self.use_gpu:
            raise ValueError("pool.gpus needs use_gpu: true")
        return self

    @property
    def least_workers(self) -> int:
        """The smallest number of training workers."""
        return self.min_workers or self.num_workers

    @property
    def collective_timeout_s(self) -> int:
        """Timeout of torch.distributed collectives.

        It is longer than ``timeout_s``, so that the watchdog, which can name the straggler, fires first.
        """
        return self.timeout_s + 60
