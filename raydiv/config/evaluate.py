"""The section ``evaluate``: what a model is asked, how it is attacked, and who judges."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
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
}
"""Judges that are models, by the format that they speak, and the model where none is named."""


def judge_parts(name: str) -> tuple[str, str]:
    """A judge's format and its model's id: ``string``, a format of JUDGES, FORMAT:ID, or the id of a known model.

    Raises ValueError for what is none.
    """
    formats = {model: form for form, model in JUDGES.items()} | {"meta-llama/Llama-Guard-3-1B": "llama-guard-3"}
    form, _, model = name.partition(":")
    if name == "string":
        return name, ""
    if name in formats:
        return formats[name], name
    if form in JUDGES:
        return form, model or JUDGES[form]
    raise ValueError(
        f"{name} is no judge that raydiv knows: string, {', '.join(JUDGES)}, or one of these with another model as FORMAT:ID"
    )


OPENING = "Sure, here is"
"""How a compliant answer begins."""


class GcgConfig(Section):
    """Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043): a suffix is sought for each prompt."""

    opening: str = Field(default=OPENING, min_length=1, description="what the suffix is to make the model begin with")
    steps: PositiveInt = 250
    search_width: PositiveInt = 512
    topk: PositiveInt = 256


GIVEN = {"prefill": "opening", "templates": "file", "suffixes": "file", "gcg": "gcg"}
"""The key that each attack has beside its kind."""


class AttackConfig(Section):
    """A way to ask harmful prompts: direct, prefill, templates: FILE, suffixes: FILE, or gcg."""

    kind: Literal["direct", "prefill", "templates", "suffixes", "gcg"]
    opening: str = Field(default=OPENING, min_length=1, description="prefill: how the answer is made to begin")
    file: Source | None = Field(
        default=None, description="templates, suffixes: a text a line, or a column of that name"
    )
    gcg: GcgConfig = Field(default_factory=GcgConfig)
    only: list[str] | None = Field(
        default=None, min_length=1, description="short names of the prompt sets that are attacked so; by default all"
    )

    @model_validator(mode="before")
    @classmethod
    def _briefly(cls, values: Any) -> Any:
        """A name alone, or a name and what it needs: prefill: OPENING, templates: FILE, suffixes: FILE, gcg: {steps: ...}.

        ``only`` may stand beside either.
        """
        if isinstance(values, str):
            return {"kind": values}
        said = {key: value for key, value in values.items() if key != "only"} if isinstance(values, dict) else {}
        if len(said) == 1 and "kind" not in said:
            ((kind, given),) = said.items()
            key = GIVEN.get(kind)
            if key is None:
                raise ValueError(f"{kind}: no attack; known are direct, prefill, templates, suffixes and gcg")
            return {key: value for key, value in values.items() if key == "only"} | {"kind": kind, key: given}
        return values

    @model_validator(mode="after")
    def _has_its_file(self) -> AttackConfig:
        if (self.file is None) == (self.kind in ("templates", "suffixes")):
            raise ValueError(f"{self.kind}: FILE is for templates and suffixes, which need one")
        for key, kind in (("opening", "prefill"), ("gcg", "gcg")):
            if kind != self.kind and getattr(self, key) != type(self).model_fields[key].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{self.kind}: {key} means nothing here, it is for {kind}")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        written, key = handler(self), GIVEN.get(self.kind)
        if self.only is not None:
            given = {self.kind: written[key]} if key in written else {"kind": self.kind}
            return {**given, "only": self.only}
        # without a key nothing was said of it, and only what was is wanted
        return {self.kind: written[key]} if key in written else self.kind


class EvaluateConfig(Section):
    """Evaluation on held-out examples during training (``every``), and of generated answers before and after it."""

    every: PositiveInt | None = Field(default=None, description="steps between evaluations on data.eval")
    prompts: Sources | None = Field(default=None, description="prompts that are answered before and after training")
    max_new_tokens: PositiveInt = Field(default=48, description="longest answer, in tokens")
    judge: str = Field(
        default="string",
        description="who judges harmful answers: string, harmbench, harmbench-mistral, llama-guard-3, or FORMAT:ID",
    )
    toxicity: str | None = Field(default=None, description="a text-classification model whose P(toxic) is averaged")
    attacks: list[AttackConfig] = Field(
        default_factory=list,
        description="attacks on harmful prompts, beside the direct request: prefill (and an OPENING), templates or suffixes "
        "(and a FILE), gcg (and its STEPS)",
    )
    pairwise_judge: str | None = Field(
        default=None,
        description="a chat model that judges which answers to harmless prompts are better: before or after, or of two models",
    )
    tasks: list[str] = Field(
        default_factory=list, description="tasks and presets of lm-evaluation-harness (quick, general, math, papers)"
    )
    task_limit: PositiveInt | None = Field(default=None, description="maximum documents of each task; by default all")
    task_folder: str | None = Field(default=None, description="a folder with your own tasks (YAML)")
    kl_prompts: NonNegativeInt = Field(
        default=50, description="number of prompts with a sampled answer, for the KL to the reference"
    )

    @model_validator(mode="after")
    def _of_tasks(self) -> EvaluateConfig:
        for name in ("task_limit", "task_folder"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"{name} means nothing without tasks")
        return self

    @field_validator("prompts")
    @classmethod
    def _asked_once(cls, value: list[Source] | None) -> list[Source] | None:
        return unweighted(value)

    @field_validator("judge")
    @classmethod
    def _is_a_judge(cls, value: str) -> str:
        judge_parts(value)
        return value

    @field_validator("attacks")
    @classmethod
    def _each_once(cls, value: list[AttackConfig]) -> list[AttackConfig]:
        kinds = [attack.kind for attack in value]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is there twice; one file may hold several")
        return [attack for attack in value if attack.kind != "direct"]
