"""The recipe: everything that a run depends on, with its bounds. Loads neither torch nor ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raydiv.config.loss import LossSection
from raydiv.config.section import Section
from raydiv.losses import named

REFERENCED = named(lambda objective: objective.reference and not objective.penalty)


def template_text(template: str) -> str:
    """Jinja text as it is, or the content of the file that it names. Raises ValueError when it is neither."""
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"neither Jinja text nor a file: {template}")
    return Path(template).read_text()


class Lora(Section):
    """Low-rank adapters instead of a full fine-tune."""

    r: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class Model(Section):
    """The policy, and how its reference is had."""

    id: str = Field(description="a Hugging Face directory, a hub id, or bundled:smollm2-135m-instruct")
    revision: str | None = None
    lora: Lora | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    reference: Literal["store", "adapter-off"] = Field(
        default="store",
        description="log-probs from the reference store, or from the policy with its adapters off at each step",
    )

    @model_validator(mode="after")
    def _adapter_off_needs_lora(self) -> Model:
        if self.reference == "adapter-off" and self.lora is None:
            raise ValueError(
                "reference: adapter-off needs model.lora, since a full fine-tune has no adapters to switch off"
            )
        return self


class Data(Section):
    """Where examples come from. A source is a file, a saved datasets directory, hf://org/name or bundled:NAME."""

    train: str = "bundled:compliance-refusal"
    eval: Annotated[float, Field(gt=0, lt=1)] | str | None = Field(
        default=None, description="held-out examples: a source, or the share of the training prompts set aside"
    )
    template: str | None = Field(
        default=None, description="a chat template (Jinja text or file), in place of the tokenizer's"
    )

    @field_validator("template")
    @classmethod
    def _template_as_text(cls, value: str | None) -> str | None:
        """The text of a template file, read here once: workers run elsewhere, and recipe.yaml re-runs the run exactly."""
        return value if value is None else template_text(value)


class Optim(Section):
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

    @model_validator(mode="after")
    def _one_duration(self) -> Optim:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, and set the other to null")
        return self


class Batch(Section):
    """Sizes: examples of the global batch, and tokens of a micro-batch, which changes speed and memory (and dropout masks)."""

    examples: PositiveInt = 16
    tokens_per_microbatch: PositiveInt = 4096
    max_length: PositiveInt = 1024
    max_prompt_length: PositiveInt = 512

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Batch:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or no response token fits"
            )
        return self


class Engine(Section):
    """DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    precision: Literal["fp32", "bf16"] = "fp32"


class Cluster(Section):
    """Ray's resources. Without RAY_ADDRESS a local Ray is started for the command and stopped after it."""

    num_workers: PositiveInt = 1
    use_gpu: bool = False
    cpus_per_worker: PositiveFloat | None = Field(
        default=None, description="CPUs of a training worker; by default nine tenths of the cluster's, in equal shares"
    )
    timeout_s: PositiveInt = Field(default=1800, description="seconds after which a collective is given up")
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of every worker")


class Separation(Section):
    """Prompts whose hidden states are compared before and after training."""

    prompts: str | None = "bundled:anchors"


class Evaluate(Section):
    """Evaluation on held-out examples during training (``every``), and of generated answers after it (``prompts``)."""

    every: PositiveInt | None = Field(default=None, description="steps between evaluations on data.eval")
    prompts: str | None = None
    max_new_tokens: PositiveInt = 48
    judge: Literal["string"] = Field(default="string", description="how answers are judged")


class Track(Section):
    """MLflow. The environment's MLFLOW_TRACKING_URI is used when ``uri`` is not given, then a SQLite file in output_dir."""

    uri: str | None = None
    experiment: str = "raydiv"


class Recipe(Section):
    """A run, completely."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = 0
    output_dir: str = "runs"
    model: Model
    data: Data = Field(default_factory=Data)
    loss: LossSection
    optim: Optim
    batch: Batch = Field(default_factory=Batch)
    engine: Engine = Field(default_factory=Engine)
    cluster: Cluster = Field(default_factory=Cluster)
    separation: Separation = Field(default_factory=Separation)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    track: Track = Field(default_factory=Track)

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
    def _a_pair_fits(self) -> Recipe:
        if self.loss.paired_terms and self.batch.examples < 2:
            raise ValueError(f"batch.examples must be at least 2: {self.loss.paired_terms[0]} takes pairs")
        return self

    @model_validator(mode="after")
    def _mixes_others(self) -> Recipe:
        names = [objective.name for objective, _, _ in self.loss.terms]
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
