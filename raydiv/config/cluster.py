"""The section ``cluster``: what a run takes of Ray, and how it is treated when something dies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raydiv.config.section import Section


class ReservedResources(Section):
    """Which nodes a kind of process may be on, and what of them it reserves beside CPUs and GPUs."""

    accelerator: str | None = Field(
        default=None, description="type of GPU that its node has, as Ray names it: A100, H100, L4 ..."
    )
    custom: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Ray's custom resources, by which nodes are told apart: {cpu_only: 1}"
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK", description="on few nodes, or on many; strictly: on one, or each on its own"
    )


class TaskResources(ReservedResources):
    """Of actors that come and go by themselves: strict placements are for those that start together."""

    cpus: PositiveFloat | None = Field(
        default=None, description="CPUs of each; by default 1, or all CPUs in equal shares"
    )
    placement: Literal["PACK", "SPREAD"] = Field(default="PACK", description="on few nodes, or on many")


class PoolResources(TaskResources):
    """Of actors that hold a model."""

    gpus: NonNegativeFloat | None = Field(
        default=None, description="GPUs of each; by default 1 with use_gpu. 0.5: two share one; 0: on CPUs"
    )


class ClusterConfig(Section):
    """Ray's resources. Without RAY_ADDRESS a local Ray is started for the command and stopped after it."""

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = Field(
        default=None, description="fewest workers to train with while nodes come and go; by default always num_workers"
    )
    use_gpu: bool = False
    cpus: PositiveFloat | None = Field(
        default=None, description="CPUs that a run may take in all; by default the cluster's"
    )
    cpus_per_worker: PositiveFloat | None = Field(
        default=None, description="CPUs of a training worker; by default nine tenths of the run's, in equal shares"
    )
    pool_actors: PositiveInt | None = Field(
        default=None,
        description="models that score, embed and answer side by side; by default one a GPU, or a CPU: fewer share its CPUs",
    )
    worker_memory_gb: PositiveFloat | None = Field(
        default=None, description="memory of a worker's GPU, or its share of a node's (GiB); by default what is there"
    )
    train: ReservedResources = Field(
        default_factory=ReservedResources, description="training workers, which take their CPUs and GPUs from above"
    )
    pool: PoolResources = Field(default_factory=PoolResources, description="an actor that scores, embeds or answers")
    tokenize: TaskResources = Field(default_factory=TaskResources, description="an actor that tokenizes")
    wait_s: NonNegativeInt = Field(
        default=0, description="seconds to wait for nodes that an autoscaler brings, where there is not room yet"
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        default=0, description="times that workers which died are started again, from the newest checkpoint; -1: always"
    )
    address: str | None = Field(
        default=None,
        description="of the cluster that raydiv submit sends to (http://HEAD:8265); no other command reads it",
    )
    timeout_s: PositiveInt = Field(
        default=1800, description="seconds without progress after which workers are given up"
    )
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of every worker")

    @model_validator(mode="after")
    def _can_shrink(self) -> ClusterConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than num_workers, which is {self.num_workers}")
        if self.max_failures == 0:
            raise ValueError("min_workers needs max_failures: a lost worker is a failure, and ends the run without it")
        if not self.use_gpu and self.cpus_per_worker is None:
            raise ValueError("min_workers needs cpus_per_worker: by it Ray knows how many workers there is room for")
        return self

    @model_validator(mode="after")
    def _gpus_are_used(self) -> ClusterConfig:
        if self.pool.gpus is not None and not self.use_gpu:
            raise ValueError("pool.gpus needs use_gpu: without it nothing reserves a GPU")
        return self

    @property
    def least_workers(self) -> int:
        """Workers that training takes at the least: what fits these fits more."""
        return self.min_workers or self.num_workers

    @property
    def collective_timeout_s(self) -> int:
        """Of torch's collectives: the watch over workers, which knows whom they wait for, is to speak first."""
        return self.timeout_s + 60
