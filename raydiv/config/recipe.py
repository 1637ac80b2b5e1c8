"""The recipe: everything that a run depends on, with its bounds. Loads neither torch nor ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from raydiv.config.checkpoint import CheckpointConfig, EarlyStopConfig
from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig
from raydiv.config.loss import LossSection
from raydiv.config.section import Section
from raydiv.config.source import Source, Sources, unweighted
from raydiv.config.study import StudyConfig
from raydiv.config.sweep import SweepConfig
from raydiv.losses import named
from raydiv.utils.secrets import find_secrets

REFERENCED = named(lambda objective: objective.reference and not objective.penalty)


def template_text(template: str) -> str:
    """Jinja text as it is, or the content of the file that it names. Raises ValueError when it is neither."""
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"neither Jinja text nor a file: {template}")
    return Path(template).read_text()


class LoraConfig(Section):
    """Low-rank adapters instead of a full fine-tune."""

    r: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class ModelConfig(Section):
    """The policy, and how its reference is had."""

    id: str = Field(description="a Hugging Face directory, a hub id, or bundled:smollm2-135m-instruct")
    revision: str | None = None
    lora: LoraConfig | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto", description="auto: sdpa where the architecture has it, else eager (such as Gemma 2)"
    )
    trust_remote_code: bool = False
    quantization: Literal["nf4"] | None = Field(
        default=None, description="frozen base weights in 4 bits under LoRA (needs the extra: raydiv[quantized])"
    )
    reference: Literal["store", "adapter-off"] = Field(
        default="store",
        description="log-probs from the reference store, or from the policy with its adapters off at each step",
    )

    @model_validator(mode="after")
    def _adapter_off_needs_lora(self) -> ModelConfig:
        if self.reference == "adapter-off" and self.lora is None:
            raise ValueError(
                "reference: adapter-off needs model.lora, since a full fine-tune has no adapters to switch off"
            )
        return self

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> ModelConfig:
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization needs model.lora: 4-bit weights are not trained")
        return self


Fraction = Annotated[float, Field(gt=0, lt=1)]

FRACTION_OR_SOURCES = ("share", "sources")
"""What ``data.eval`` may be."""


class DataConfig(Section):
    """Where examples come from, and what is done with rows that are wrong."""

    train: Sources = Field(default_factory=lambda: [Source(path="bundled:compliance-refusal")])
    eval: (
        Annotated[
            Annotated[Fraction, Tag("share")] | Annotated[Sources, Tag("sources")],
            Discriminator(lambda value: FRACTION_OR_SOURCES[not isinstance(value, int | float)]),
        ]
        | None
    ) = Field(default=None, description="held-out examples: sources, or the share of the training prompts set aside")
    columns: dict[str, str] | None = Field(
        default=None, description="columns of every source that names none of its own"
    )
    on_bad_row: Literal["error", "quarantine"] = Field(
        default="error", description="stop at rows that are wrong, or leave them out, counted and listed"
    )
    template: str | None = Field(
        default=None, description="a chat template (Jinja text or file), in place of the tokenizer's"
    )

    @property
    def eval_sources(self) -> list[Source]:
        """Sources of held-out examples; none where they are a share of the training prompts."""
        return self.eval if isinstance(self.eval, list) else []

    def columns_of(self, source: Source) -> dict[str, str]:
        """What a source calls the columns of a known format."""
        return (self.columns if source.columns is None else source.columns) or {}

    @model_validator(mode="after")
    def _held_out_once(self) -> DataConfig:
        for number, source in enumerate(self.eval_sources):
            if source.weight != 1:
                raise ValueError(f"eval.{number}.weight means nothing: held-out examples are evaluated once each")
        return self

    @field_validator("template")
    @classmethod
    def _template_as_text(cls, value: str | None) -> str | None:
        """The text of a template file, read here once: workers run elsewhere, and recipe.yaml re-runs the run exactly."""
        return value if value is None else template_text(value)


class OptimConfig(Section):
    """AdamW and its schedule. Warm-up and schedule count optimizer updates."""

    lr: PositiveFloat = 5e-5
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat | None = Field(default=1.0, description="largest norm of the gradient")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: NonNegativeInt = Field(default=0, description="updates over which the rate rises linearly to lr")
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None

    target_margin: PositiveFloat | None = Field(
        default=None, description="stop once the running mean of reward/margin reaches this, schedule or not"
    )
    early_stop: EarlyStopConfig | None = None
    max_refused: NonNegativeInt = Field(
        default=10, description="steps whose numbers are not finite, left out and counted; one more ends the run"
    )

    @model_validator(mode="after")
    def _one_duration(self) -> OptimConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, and set the other to null")
        return self


class BatchConfig(Section):
    """Sizes: examples of the global batch, and tokens of a micro-batch, which changes speed and memory (and dropout masks)."""

    examples: PositiveInt = 16
    tokens_per_microbatch: PositiveInt | Literal["auto"] = Field(
        default="auto", description="auto: a worker's whole share of the step, or as much of it as its memory takes"
    )
    packing: Literal["auto", "never"] = Field(
        default="auto", description="examples end to end without padding, where the model's attention keeps them apart"
    )
    max_length: PositiveInt = 1024
    max_prompt_length: PositiveInt = Field(
        default=512, description="tokens of a prompt, template included; half of max_length where only that is set"
    )

    @model_validator(mode="before")
    @classmethod
    def _prompt_takes_half(cls, values: Any) -> Any:
        length = values.get("max_length") if isinstance(values, dict) else None
        if type(length) is int and length > 1 and "max_prompt_length" not in values:
            return values | {"max_prompt_length": length // 2}
        return values

    @model_validator(mode="after")
    def _room_for_a_response(self) -> BatchConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or no response token fits"
            )
        return self


Offload = Literal["none", "cpu", "nvme"]

OWNED = {
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
"""Keys of DeepSpeed's configuration that the recipe says elsewhere, and where."""


class EngineConfig(Section):
    """DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = Field(
        default="auto", description="what is partitioned over the workers; auto: as little as fits their memory"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 keeps fp32 master weights")
    offload_optimizer: Offload = Field(default="none", description="where optimizer states live, under ZeRO 1 to 3")
    offload_parameters: Offload = Field(default="none", description="where partitioned weights live, under ZeRO 3")
    nvme_path: str | None = Field(default=None, description="a folder on each node's NVMe disk, for offload")
    activation_checkpointing: bool = Field(
        default=False, description="keep one activation a layer and compute the others again in the backward"
    )
    profile: Annotated[str, Field(pattern=r"^[1-9][0-9]*(-[1-9][0-9]*)?$", coerce_numbers_to_str=True)] | None = Field(
        default=None, description="steps of which PyTorch's profiler leaves a trace in the run directory: 3, or 3-5"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="keys of DeepSpeed's own configuration, merged over what raydiv writes"
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> EngineConfig:
        stage = 3 if self.zero_stage == "auto" else self.zero_stage
        if self.offload_optimizer != "none" and stage < 1:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters != "none" and stage < 3:
            raise ValueError("offload_parameters needs zero_stage 3: below it every worker holds all weights")
        if self.precision == "bf16" and stage < 1:
            raise ValueError("precision: bf16 needs zero_stage 1, 2 or 3, which keep the fp32 master weights")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path is for offload to nvme: give both or neither")
        return self

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step of ``profile``."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition("-")
        return int(first), int(last or first)

    @field_validator("profile")
    @classmethod
    def _ends_after_it_begins(cls, value: str | None) -> str | None:
        if value is not None and "-" in value and int(value.split("-")[1]) < int(value.split("-")[0]):
            raise ValueError("profile ends before it begins")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _not_said_elsewhere(cls, value: dict[str, Any]) -> dict[str, Any]:
        flat = {*value, *(f"zero_optimization.{key}" for key in value.get("zero_optimization") or {})}
        said = [f"{key} (recipe: {OWNED[key]})" for key in sorted(flat & OWNED.keys())]
        if said:
            raise ValueError(f"the recipe says this elsewhere: {', '.join(said)}")
        return value


class SeparationConfig(Section):
    """Prompts whose hidden states are compared before, during and after training."""

    prompts: Sources | None = Field(
        default_factory=lambda: [Source(path="bundled:anchors")],
        description="harmful and harmless prompts that are not trained on",
    )
    every: PositiveInt | None = Field(default=None, description="steps between separations during training")
    layers: list[int] | Literal["all"] = Field(
        default=[-1],
        min_length=1,
        description="layers that are read: all, or numbers such as 0,8,-1 (0: embeddings, -1: last); during training the last",
    )
    pooling: Literal["last", "mean"] = Field(
        default="last", description="a prompt's state: that of its last token, or the mean over its tokens"
    )
    sample: Annotated[int, Field(ge=20)] = Field(
        default=1000,
        description="maximum prompts for figures that need all states at once; a larger set is sampled",
    )
    intervals: Literal["last", "all"] = Field(default="last", description="layers whose D_B gets a 95% interval")

    @field_validator("prompts")
    @classmethod
    def _read_once(cls, value: list[Source] | None) -> list[Source] | None:
        return unweighted(value)

    @model_validator(mode="after")
    def _every_needs_prompts(self) -> SeparationConfig:
        if self.every is not None and self.prompts is None:
            raise ValueError("every needs prompts: there is nothing to separate")
        return self


class TrackConfig(Section):
    """MLflow. The environment's MLFLOW_TRACKING_URI is used when ``uri`` is not given, then a SQLite file in output_dir."""

    uri: str | None = None
    experiment: str = "raydiv"
    tags: dict[str, str] = Field(default_factory=dict, description="more tags of the run")


class Recipe(Section):
    """A run, completely."""

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
    def _every_needs_eval(self) -> Recipe:
        if self.evaluate.every is not None and self.data.eval is None:
            raise ValueError("evaluate.every needs data.eval: there is nothing to evaluate on")
        return self

    @model_validator(mode="after")
    def _early_stop_is_evaluated(self) -> Recipe:
        if self.optim.early_stop is not None and (self.data.eval is None or self.evaluate.every is None):
            raise ValueError("optim.early_stop needs data.eval and evaluate.every: nothing is measured meanwhile")
        return self

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, values: Any) -> Any:
        problems = list(find_secrets(values)) if isinstance(values, dict) else []
        if problems:
            raise ValueError("; ".join(problems))
        return values

    @model_validator(mode="before")
    @classmethod
    def _nvme_is_not_saved(cls, values: Any) -> Any:
        """What is offloaded to NVMe is in no checkpoint: there is none, unless one is asked for, which is refused."""
        if isinstance(values, dict) and isinstance(values.get("engine"), dict) and values["engine"].get("nvme_path"):
            section = values.get("checkpoint") or {}
            if isinstance(section, dict) and section.get("every") is not None:
                raise ValueError(
                    "checkpoint.every: what is offloaded to nvme is in no checkpoint; set it to null, or offload to cpu"
                )
            return values | {"checkpoint": {**section, "every": None}} if isinstance(section, dict) else values
        return values

    @model_validator(mode="after")
    def _asked_of_something(self) -> Recipe:
        if self.evaluate.prompts is None:
            for key in ("attacks", "toxicity", "pairwise_judge", "tasks"):
                if getattr(self.evaluate, key):
                    raise ValueError(f"evaluate.{key} needs evaluate.prompts: without them nothing is evaluated")
        return self

    @model_validator(mode="after")
    def _quantized_is_whole(self) -> Recipe:
        if self.model.quantization is not None and self.engine.zero_stage == 3:
            raise ValueError("model.quantization needs engine.zero_stage 0, 1 or 2: 4-bit weights are not partitioned")
        return self

    @model_validator(mode="after")
    def _a_pair_fits(self) -> Recipe:
        if self.loss.paired_terms and self.batch.examples < 2:
            raise ValueError(f"batch.examples must be at least 2: {self.loss.paired_terms[0]} takes pairs")
        return self

    @model_validator(mode="after")
    def _mixes_others(self) -> Recipe:
        names = [term.name for term in self.loss.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"loss.mix.{self.loss.type}: is the main objective already; mix in others, or set it to null"
            )
        return self

    @model_validator(mode="after")
    def _margin_is_a_rewards(self) -> Recipe:
        if self.optim.target_margin is not None and not self.loss.objective.reference:
            raise ValueError(
                f"optim.target_margin does not apply: loss.type {self.loss.type} has no reference to count rewards from "
                f"(losses that have one: {REFERENCED})"
            )
        return self

    @model_validator(mode="after")
    def _reference_is_used(self) -> Recipe:
        if self.model.reference != "store" and not self.loss.needs_reference:
            raise ValueError(
                f"model.reference does not apply: loss.type {self.loss.type} has no reference (losses that have one: "
                f"{REFERENCED})"
            )
        return self
