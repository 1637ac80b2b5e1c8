"""The recipe: everything that a run depends on, validated. The module imports neither torch nor ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raydiv.config.checkpoint import CheckpointConfig, EarlyStopConfig
from raydiv.config.cluster import ClusterConfig
from raydiv.config.data import DataConfig
from raydiv.config.evaluate import EvaluateConfig, is_url
from raydiv.config.loss import LossSection
from raydiv.config.section import Section
from raydiv.config.source import Source, Sources, unweighted
from raydiv.config.study import StudyConfig
from raydiv.config.sweep import SweepConfig
from raydiv.losses import objective_names
from raydiv.utils.secrets import find_secrets

LOSSES_WITH_REFERENCE = objective_names(lambda objective: objective.needs_reference and not objective.penalty)


class LoraConfig(Section):
    """Low-rank adapters instead of a full fine-tune. Modules are named as PEFT does it."""

    r: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="all-linear, endings of module names, or a regular expression of whole names",
    )
    exclude_modules: str | list[str] | None = Field(
        default=None, description="modules without an adapter: endings of names, or a regular expression"
    )
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)")
    use_dora: bool = Field(default=False, description="train magnitude and direction apart (DoRA, arXiv 2402.09353)")

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _is_a_regular_expression(cls, value: str | list[str] | None) -> str | list[str] | None:
        try:
            re.compile(value if isinstance(value, str) else "")
        except (re.error, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


LORA_KEYS = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
"""PEFT's names of the keys of ``model.lora``, where they differ."""


def adapter_directory(adapter: str) -> Path:
    """The directory of an adapter that is given as itself or as its run."""
    path = Path(adapter).expanduser()
    return path / "model" if (path / "model" / "adapter_config.json").is_file() else path


def _lora_of(adapter: str) -> dict[str, Any] | None:
    """The section ``model.lora`` of an adapter; None where its directory is not here. Raises ValueError."""
    path = adapter_directory(adapter) / "adapter_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {adapter} is of type {config.get('peft_type')}; only LORA is supported")
    names = {key: LORA_KEYS.get(key, key) for key in LoraConfig.model_fields}
    return {key: config[name] for key, name in names.items() if config.get(name) is not None}


class ModelConfig(Section):
    """The policy and its reference model."""

    id: str = Field(description="a Hugging Face directory, a hub id, or bundled:smollm2-135m-instruct")
    revision: str | None = None
    lora: LoraConfig | None = None
    adapter: str | None = Field(
        default=None,
        description="a run with adapters, or their directory: training goes on from them, the reference is the model "
        "with them, and model.lora is theirs",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto", description="auto: sdpa if the architecture supports it, else eager (such as Gemma 2)"
    )
    trust_remote_code: bool = False
    quantization: Literal["nf4"] | None = Field(
        default=None, description="frozen base weights in 4 bits under LoRA (needs the extra: raydiv[quantized])"
    )
    use_liger_kernel: bool = Field(
        default=False,
        description="Liger's kernels for norms, rotary embeddings and MLPs, on GPUs (needs the extra: raydiv[liger])",
    )
    reference: Literal["store", "adapter-off"] = Field(
        default="store",
        description="log-probs from the reference store, or from the policy with its adapters off at each step",
    )

    @model_validator(mode="before")
    @classmethod
    def _lora_is_that_of_the_adapter(cls, values: Any) -> Any:
        adapter = values.get("adapter") if isinstance(values, dict) else None
        if not isinstance(adapter, str):
            return values
        own, given = _lora_of(adapter), values.get("lora") or {}
        if own is None:
            if given:  # a finished run's recipe is read without the adapter that it started from
                return values
            raise ValueError(f"adapter: no adapter in {adapter} (adapter_config.json, there or in its folder model)")
        for key, value in given.items() if isinstance(given, dict) else ():
            found = own.get(key, LoraConfig.model_fields[key].default if key in LoraConfig.model_fields else value)
            same = sorted(value) == sorted(found) if isinstance(value, list) else value == found
            if not same and value != "all-linear":
                raise ValueError(f"adapter: its lora.{key} is {found}, and the recipe has {value}; remove model.lora")
        return values | {"lora": own}

    @model_validator(mode="after")
    def _adapter_is_the_reference(self) -> ModelConfig:
        if self.adapter is not None and self.reference == "adapter-off":
            raise ValueError("reference: adapter-off would be the base, and not the adapter that training starts from")
        return self

    @model_validator(mode="after")
    def _adapter_off_needs_lora(self) -> ModelConfig:
        if self.reference == "adapter-off" and self.lora is None:
            raise ValueError("reference: adapter-off needs model.lora: full fine-tuning has no adapters to switch off")
        return self

    @model_validator(mode="after")
    def _quantization_needs_lora(self) -> ModelConfig:
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization needs model.lora: 4-bit weights are not trained")
        return self


class OptimConfig(Section):
    """AdamW and its schedule. Warm-up and schedule count optimizer updates."""

    lr: PositiveFloat = 5e-5
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat | None = Field(default=1.0, description="maximum norm of the gradient")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: NonNegativeInt = Field(default=0, description="updates over which the rate rises linearly to lr")
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None

    target_margin: PositiveFloat | None = Field(
        default=None, description="stop when the running mean of reward/margin reaches this value"
    )
    early_stop: EarlyStopConfig | None = None
    max_refused: NonNegativeInt = Field(
        default=10,
        description="maximum steps with non-finite values, which are skipped and counted; one more ends the run",
    )

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> OptimConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("set either epochs or steps, and the other to null")
        return self


MOST_TOKENS = 2**20
"""Of an example."""


class BatchConfig(Section):
    """Sizes: examples of the global batch, and tokens of a micro-batch (speed, memory, and dropout masks)."""

    examples: PositiveInt = 16
    tokens_per_microbatch: PositiveInt | Literal["auto"] = Field(
        default="auto", description="auto: a worker's whole part of the step, or the most that fits its memory"
    )
    packing: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: several examples in a row without padding, if the model's attention can separate them",
    )
    max_length: Annotated[int, Field(gt=0, le=MOST_TOKENS)] = 1024
    max_prompt_length: PositiveInt = Field(
        default=512, description="tokens of a prompt, template included; half of max_length if only that is set"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_prompt_length(cls, values: Any) -> Any:
        length = values.get("max_length") if isinstance(values, dict) else None
        if type(length) is int and length > 1 and "max_prompt_length" not in values:
            return values | {"max_prompt_length": length // 2}
        return values

    @model_validator(mode="after")
    def _prompt_below_max_length(self) -> BatchConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}): "
                "no response token fits"
            )
        return self


Offload = Literal["none", "cpu", "nvme"]

DEEPSPEED_KEYS_OF_RECIPE = {
    "train_batch_size": "batch.examples",
    "train_micro_batch_size_per_gpu": "batch.tokens_per_microbatch",
    "gradient_accumulation_steps": "batch.tokens_per_microbatch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
    "activation_checkpointing": "engine.activation_checkpointing",
}
"""Keys of DeepSpeed's configuration that raydiv sets -> the recipe key that sets them."""


class EngineConfig(Section):
    """DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = Field(
        default="auto", description="DeepSpeed ZeRO stage; auto: the lowest that fits the workers' memory"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16 keeps fp32 master weights, and is the default on GPUs from ZeRO stage 1 on"
    )
    offload_optimizer: Offload = Field(default="none", description="storage of optimizer states, with ZeRO 1 to 3")
    offload_parameters: Offload = Field(default="none", description="storage of partitioned weights, with ZeRO 3")
    nvme_path: str | None = Field(default=None, description="a folder on each node's NVMe disk, for offload")
    activation_checkpointing: bool = Field(
        default=False, description="keep one activation per layer and recompute the others in the backward"
    )
    profile: Annotated[str, Field(pattern=r"^[1-9][0-9]*(-[1-9][0-9]*)?$", coerce_numbers_to_str=True)] | None = Field(
        default=None, description="steps that PyTorch's profiler traces into the run directory: 3, or 3-5"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="keys of DeepSpeed's configuration, merged over raydiv's"
    )

    @model_validator(mode="after")
    def _options_need_stage(self) -> EngineConfig:
        stage = 3 if self.zero_stage == "auto" else self.zero_stage
        if self.offload_optimizer != "none" and stage < 1:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters != "none" and stage < 3:
            raise ValueError("offload_parameters needs zero_stage 3: below it every worker holds all weights")
        if self.precision == "bf16" and stage < 1:
            raise ValueError("precision: bf16 needs zero_stage 1, 2 or 3, which keep the fp32 master weights")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path and offload to nvme need each other: set both or neither")
        return self

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of ``profile``; None without it."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition("-")
        return int(first), int(last or first)

    @field_validator("profile")
    @classmethod
    def _profile_is_ordered(cls, value: str | None) -> str | None:
        if value is not None and "-" in value and int(value.split("-")[1]) < int(value.split("-")[0]):
            raise ValueError("profile: the last step is before the first")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _no_key_of_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        zero = value.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"zero_optimization: must be a mapping, found {zero!r}")
        flat = {*value, *(f"zero_optimization.{key}" for key in zero)}
        duplicates = [
            f"{key} ({DEEPSPEED_KEYS_OF_RECIPE[key]})" for key in sorted(flat & DEEPSPEED_KEYS_OF_RECIPE.keys())
        ]
        if duplicates:
            raise ValueError(f"set the recipe key instead: {', '.join(duplicates)}")
        return value


class SeparationConfig(Section):
    """Separation of harmful and harmless prompts in hidden states, before, during and after training."""

    prompts: Sources | None = Field(
        default_factory=lambda: [Source(path="bundled:anchors")],
        description="harmful and harmless prompts that are not trained on",
    )
    every: PositiveInt | None = Field(
        default=None, description="steps between measurements of separation during training"
    )
    layers: list[int] | Literal["all"] = Field(
        default=[-1],
        min_length=1,
        description="all, or layers such as 0,8,-1 (0: embeddings, -1: last); during training the last one listed",
    )
    pooling: Literal["last", "mean"] = Field(
        default="last", description="the state of a prompt: of its last token, or the mean over its tokens"
    )
    sample: Annotated[int, Field(ge=20)] = Field(
        default=1000,
        description="maximum prompts for statistics that need all states at once; a larger set is sampled",
    )
    intervals: Literal["last", "all"] = Field(default="last", description="layers whose D_B gets a 95% interval")

    @field_validator("prompts")
    @classmethod
    def _no_weights(cls, value: list[Source] | None) -> list[Source] | None:
        return unweighted(value)

    @model_validator(mode="after")
    def _every_needs_prompts(self) -> SeparationConfig:
        if self.every is not None and self.prompts is None:
            raise ValueError("every needs prompts")
        return self


class TrackConfig(Section):
    """MLflow tracking. Without ``uri``: MLFLOW_TRACKING_URI, else a SQLite file in output_dir."""

    uri: str | None = None
    experiment: str = "raydiv"
    tags: dict[str, str] = Field(default_factory=dict, description="additional tags of the run")


class Recipe(Section):
    """All settings of a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = 0
    output_dir: str = "runs"
    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    loss: LossSection
    optim: OptimConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    separation: SeparationConfig = Field(default_factory=SeparationConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    sweep: SweepConfig | None = None
    study: StudyConfig | None = None

    @property
    def output_path(self) -> Path:
        """``output_dir`` as an absolute path."""
        return Path(self.output_dir).expanduser().resolve()

    @model_validator(mode="after")
    def _evaluation_needs_eval(self) -> Recipe:
        for name in ("every", "depth_every"):
            if getattr(self.evaluate, name) is not None and self.data.eval is None:
                raise ValueError(f"evaluate.{name} needs data.eval: the examples to evaluate on")
        return self

    @model_validator(mode="after")
    def _early_stop_needs_evaluation(self) -> Recipe:
        if self.optim.early_stop is not None and (self.data.eval is None or self.evaluate.every is None):
            raise ValueError("optim.early_stop needs data.eval and evaluate.every: its metric is measured there")
        return self

    @model_validator(mode="before")
    @classmethod
    def _bf16_on_gpus(cls, values: Any) -> Any:
        """Set ``engine.precision`` to bf16 where a recipe for GPUs leaves it open: fp32 is several times slower there.

        ZeRO stage 0 keeps no fp32 master weights, and stays in fp32.
        """
        if not isinstance(values, dict):
            return values
        engine, cluster = values.get("engine") or {}, values.get("cluster") or {}
        if not isinstance(engine, dict) or not isinstance(cluster, dict) or cluster.get("use_gpu") is not True:
            return values
        if "precision" in engine or engine.get("zero_stage") == 0:
            return values
        return values | {"engine": engine | {"precision": "bf16"}}

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        problems = list(find_secrets(values)) if isinstance(values, dict) else []
        if problems:
            raise ValueError("; ".join(problems))
        return values

    @model_validator(mode="before")
    @classmethod
    def _no_checkpoints_with_nvme(cls, values: Any) -> Any:
        """Set ``checkpoint.every`` to null with NVMe offload: checkpoints do not hold offloaded state."""
        if isinstance(values, dict) and isinstance(values.get("engine"), dict) and values["engine"].get("nvme_path"):
            section = values.get("checkpoint") or {}
            if isinstance(section, dict) and section.get("every") is not None:
                raise ValueError(
                    "checkpoint.every: not supported with offload to nvme; set it to null, or offload to cpu"
                )
            return values | {"checkpoint": {**section, "every": None}} if isinstance(section, dict) else values
        return values

    @model_validator(mode="after")
    def _liger_needs_gpus(self) -> Recipe:
        if self.model.use_liger_kernel and not self.cluster.use_gpu:
            raise ValueError("model.use_liger_kernel needs cluster.use_gpu: its kernels run on GPUs")
        return self

    @model_validator(mode="after")
    def _evaluation_needs_prompts(self) -> Recipe:
        if self.evaluate.prompts is None:
            for key in ("attacks", "toxicity", "pairwise_judge", "tasks"):
                if getattr(self.evaluate, key):
                    raise ValueError(f"evaluate.{key} needs evaluate.prompts")
        return self

    @model_validator(mode="after")
    def _no_server_has_the_trained_model(self) -> Recipe:
        if is_url(self.evaluate.engine):
            raise ValueError(
                "evaluate.engine: a server does not have the model that a run trains; serve the run's model, and use "
                "raydiv evaluate --engine"
            )
        return self

    @model_validator(mode="after")
    def _quantization_below_zero_3(self) -> Recipe:
        if self.model.quantization is not None:
            if self.engine.zero_stage == 3:
                raise ValueError(
                    "model.quantization needs engine.zero_stage 0, 1 or 2: 4-bit weights are not partitioned"
                )
            if self.engine.offload_parameters != "none":
                raise ValueError("model.quantization excludes engine.offload_parameters, which needs ZeRO stage 3")
        return self

    @model_validator(mode="after")
    def _batch_holds_a_pair(self) -> Recipe:
        if self.loss.paired_terms and self.batch.examples < 2:
            raise ValueError(f"batch.examples must be at least 2: {self.loss.paired_terms[0]} needs pairs")
        return self

    @model_validator(mode="after")
    def _no_objective_twice(self) -> Recipe:
        names = [term.name for term in self.loss.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"loss.mix.{self.loss.type}: is the main objective; mix in another one, or set it to null")
        return self

    @model_validator(mode="after")
    def _target_margin_needs_reference(self) -> Recipe:
        has_rewards = self.loss.objective.needs_reference or self.loss.needs_reference_tokens
        if self.optim.target_margin is not None and not has_rewards:
            raise ValueError(
                f"optim.target_margin does not apply: loss.type {self.loss.type} has no reference, so no rewards "
                f"(losses with a reference: {LOSSES_WITH_REFERENCE})"
            )
        return self

    @model_validator(mode="after")
    def _tokens_of_reference_are_stored(self) -> Recipe:
        if self.model.reference != "store" and self.loss.needs_reference_tokens:
            raise ValueError(f"loss.position.kind: {self.loss.position.kind} needs model.reference: store")
        return self

    @model_validator(mode="after")
    def _reference_option_needs_reference(self) -> Recipe:
        if self.model.reference != "store" and not self.loss.needs_reference:
            raise ValueError(
                f"model.reference does not apply: loss.type {self.loss.type} has no reference (losses with one: "
                f"{LOSSES_WITH_REFERENCE})"
            )
        return self
