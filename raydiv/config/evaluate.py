"""The section ``evaluate``: prompts, attacks and judges of the evaluation."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from raydiv.config.section import Section
from raydiv.config.source import Source, Sources, unweighted

JUDGES = {
    "harmbench": "cais/HarmBench-Llama-2-13b-cls",
    "harmbench-mistral": "cais/HarmBench-Mistral-7b-val-cls",
    "llama-guard-3": "meta-llama/Llama-Guard-3-8B",
    "llama-guard-4": "meta-llama/Llama-Guard-4-12B",
    "wildguard": "allenai/wildguard",
    "shieldgemma": "google/shieldgemma-9b",
    "strongreject": "qylu4156/strongreject-15k-v1",
    "strongreject-rubric": "",
}
"""Judge models: prompt format -> default model; none for a format that any chat model can follow."""

_OTHER_SIZES = {
    "meta-llama/Llama-Guard-3-1B": "llama-guard-3",
    "google/shieldgemma-2b": "shieldgemma",
    "google/shieldgemma-27b": "shieldgemma",
}


def judge_parts(name: str) -> tuple[str, str]:
    """The format and the model id of a judge: ``string``, a format of JUDGES, FORMAT:ID, or the id of a known model.

    Raises ValueError for an unknown judge, and for a format without a model.
    """
    formats = {model: form for form, model in JUDGES.items() if model} | _OTHER_SIZES
    form, _, model = name.partition(":")
    if name == "string":
        return name, ""
    if name in formats:
        return formats[name], name
    if form in JUDGES:
        model = model or JUDGES[form]
        if not model:
            raise ValueError(f"{form}: needs a chat model: {form}:ID")
        return form, model
    raise ValueError(
        f"{name}: unknown judge; known: string, {', '.join(JUDGES)}, or FORMAT:ID for another model of such a format"
    )


def is_url(name: str) -> bool:
    """Whether a name is the address of a server."""
    return urlsplit(name).scheme in ("http", "https")


def judge_label(name: str) -> str:
    """A judge's name in reports: its format, with the model's own name where it is not the usual one."""
    form, model = judge_parts(name)
    if is_url(model):
        url = urlsplit(model)
        model = url.fragment or url.netloc
    return form if model == JUDGES.get(form, "") else f"{form}:{model.rstrip('/').rpartition('/')[2]}"


OPENING = "Sure, here is"
"""The first words of a compliant answer."""


class GcgConfig(Section):
    """Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043): it optimises a suffix for each prompt."""

    opening: str = Field(default=OPENING, min_length=1, description="the target: the first words of the model's answer")
    steps: PositiveInt = 250
    search_width: PositiveInt = 512
    topk: PositiveInt = 256


class CutConfig(Section):
    """The first tokens of answers, which the model continues (Qi et al. 2024, arXiv 2406.05946, section 3)."""

    depth: list[PositiveInt] = Field(min_length=1, description="how many tokens of the answer are given, each in turn")
    texts: Source | None = Field(
        default=None,
        description="the answers: records of prompt and response, those to harmless prompts as a control; default: the "
        "reference's own, sampled: unsafe ones, and as a control helpful ones to harmless prompts",
    )

    @field_validator("depth")
    @classmethod
    def _depths_once(cls, value: list[int]) -> list[int]:
        return sorted(set(value))


ATTACK_KEY = {
    "prefill": "opening",
    "prefill-depth": "cut",
    "forged-turn": "opening",
    "templates": "file",
    "suffixes": "file",
    "gcg": "gcg",
}
"""The key of each attack's option."""


class AttackConfig(Section):
    """A way to ask harmful prompts: direct, prefill, prefill-depth, forged-turn, templates: FILE, suffixes: FILE, or
    gcg.
    """

    kind: Literal["direct", "prefill", "prefill-depth", "forged-turn", "templates", "suffixes", "gcg"]
    opening: str = Field(
        default=OPENING, min_length=1, description="prefill, forged-turn: the first words of the answer"
    )
    file: Source | None = Field(
        default=None, description="templates, suffixes: a file with one text per line, or with a column of that name"
    )
    cut: CutConfig | None = Field(default=None, description="prefill-depth: the answers and how much of them is given")
    gcg: GcgConfig = Field(default_factory=GcgConfig)
    only: list[str] | None = Field(
        default=None, min_length=1, description="short names of the attacked prompt sets; default: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, values: Any) -> Any:
        """Expand the short forms: a kind, or prefill: OPENING, prefill: {depth: ...}, templates: FILE,
        suffixes: FILE, gcg: {steps: ...}.

        ``only`` may be added to each of them.
        """
        if isinstance(values, str):
            return {"kind": values}
        options = {key: value for key, value in values.items() if key != "only"} if isinstance(values, dict) else {}
        if len(options) == 1 and "kind" not in options:
            ((kind, value),) = options.items()
            kind = "prefill-depth" if kind == "prefill" and isinstance(value, dict) else kind
            key = ATTACK_KEY.get(kind)
            if key is None:
                raise ValueError(f"{kind}: unknown attack; known: direct, {', '.join(ATTACK_KEY)}")
            return {key: value for key, value in values.items() if key == "only"} | {"kind": kind, key: value}
        return values

    @model_validator(mode="after")
    def _options_match_kind(self) -> AttackConfig:
        if (self.file is None) == (self.kind in ("templates", "suffixes")):
            raise ValueError(f"{self.kind}: templates and suffixes need a FILE, other attacks have none")
        if (self.cut is None) == (self.kind == "prefill-depth"):
            raise ValueError(f"{self.kind}: prefill-depth needs depth, other attacks have none")
        for key in ("opening", "gcg"):
            kinds = [kind for kind, option in ATTACK_KEY.items() if option == key]
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{self.kind}: {key}: not supported here, an option of {', '.join(kinds)}")
        return self

    @model_serializer(mode="wrap")
    def _serialize_short_form(self, handler: SerializerFunctionWrapHandler) -> Any:
        fields, key = handler(self), ATTACK_KEY.get(self.kind)
        if self.only is not None:
            short = {self.kind: fields[key]} if key in fields else {"kind": self.kind}
            return {**short, "only": self.only}
        # an option that was not set is left out
        return {self.kind: fields[key]} if key in fields else self.kind


class EvaluateConfig(Section):
    """Evaluation on held-out examples during training (``every``), and of answers before and after training."""

    every: PositiveInt | None = Field(default=None, description="steps between evaluations on data.eval")
    depth_every: PositiveInt | None = Field(
        default=None, description="steps between measurements of eval/depth/half on data.eval"
    )
    prompts: Sources | None = Field(default=None, description="prompts that are answered before and after training")
    max_new_tokens: PositiveInt = Field(default=48, description="maximum tokens of an answer")
    engine: str = Field(
        default="transformers",
        description="what generates the answers: transformers, vllm, or the URL of an OpenAI-compatible server that "
        "serves the model (http://HOST:8000/v1, with #NAME where it serves several)",
    )
    tensor_parallel: PositiveInt = Field(default=1, description="GPUs of each engine of vllm")
    server_key_env: str | None = Field(
        default=None, description="the environment variable with the key for servers (engine, judge)"
    )
    server_requests: PositiveInt = Field(default=16, description="concurrent requests to a server")
    requests_per_minute: PositiveInt | None = Field(default=None, description="maximum requests a minute to a server")
    judge: list[str] = Field(
        default=["string"],
        min_length=1,
        description=f"judge of harmful answers: string, {', '.join(JUDGES)}; or FORMAT:ID or FORMAT:URL for another "
        "model; rates are by the first, others are compared with it",
    )
    toxicity: str | None = Field(default=None, description="a text-classification model; its mean P(toxic) is reported")
    attacks: list[AttackConfig] = Field(
        default_factory=list,
        description="attacks on harmful prompts beside the direct one: prefill (with an OPENING, or with the "
        "depth of answers' beginnings), templates or suffixes (with a FILE), gcg (with its STEPS)",
    )
    pairwise_judge: str | None = Field(
        default=None,
        description="a chat model that compares answers to harmless prompts: before and after, or of two models",
    )
    tasks: list[str] = Field(
        default_factory=list, description="tasks and presets of lm-evaluation-harness (quick, general, math, papers)"
    )
    task_limit: PositiveInt | None = Field(default=None, description="maximum documents of each task; default: all")
    task_folder: str | None = Field(default=None, description="a folder with your own tasks (YAML)")
    kl_prompts: NonNegativeInt = Field(
        default=50, description="number of prompts with a sampled answer for the KL to the reference"
    )

    @model_validator(mode="after")
    def _tensor_parallel_needs_vllm(self) -> EvaluateConfig:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError("tensor_parallel needs engine: vllm")
        return self

    @model_validator(mode="after")
    def _options_need_tasks(self) -> EvaluateConfig:
        for name in ("task_limit", "task_folder"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"{name} needs tasks")
        return self

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, value: str) -> str:
        if value not in ("transformers", "vllm") and not is_url(value):
            raise ValueError(f"{value}: unknown engine; known: transformers, vllm, or the URL of a server")
        return value

    @field_validator("prompts")
    @classmethod
    def _no_weights(cls, value: list[Source] | None) -> list[Source] | None:
        return unweighted(value)

    @field_validator("judge", mode="before")
    @classmethod
    def _one_judge(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("judge")
    @classmethod
    def _judges_are_known(cls, value: list[str]) -> list[str]:
        labels = [judge_label(name) for name in value]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice}: duplicate judge")
        return value

    @field_serializer("judge")
    def _serialize_one_judge(self, value: list[str]) -> str | list[str]:
        return value[0] if len(value) == 1 else value

    @field_validator("attacks")
    @classmethod
    def _attacks_once(cls, value: list[AttackConfig]) -> list[AttackConfig]:
        kinds = [attack.kind for attack in value]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"{twice[0]}: duplicate attack; put several texts into one file")
        return [attack for attack in value if attack.kind != "direct"]
