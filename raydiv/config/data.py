"""The recipe's section ``data``: sources of examples, and how the chat template turns them into tokens."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from raydiv.config.section import Section
from raydiv.config.source import Source, Sources

NO_TEMPLATE = "none"
"""``data.template`` for prompts that are rendered already."""

RESERVED_OPTIONS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now")
"""Variables of a template that raydiv sets."""


def template_text(template: str) -> str:
    """Jinja text as it is, or the content of the file that it names; ``none``, and a name, as they are.

    Raises ValueError for anything else.
    """
    if "{" in template:
        return template
    try:
        if Path(template).is_file():
            return Path(template).read_text()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{template[:100]!r}: cannot be read: {error.strerror}") from None
    if re.fullmatch(r"[A-Za-z_][\w-]*", template):  # of a tokenizer with several templates; Chat looks it up
        return template
    raise ValueError(f"neither Jinja text nor a file: {template}")


class ChatConfig(Section):
    """How texts and messages become tokens."""

    template: str | None = Field(
        default=None,
        description="a chat template (Jinja text or file) that replaces the tokenizer's, or the name of one of the "
        "tokenizer's; none: prompts are rendered already",
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template, such as {enable_thinking: false}"
    )
    template_date: date | None = Field(
        default=None,
        description="today's date for a template that prints it; by default the date of the start of the run, sweep or "
        "study; templates that print no date do not use it",
    )
    thinking: Literal["open", "closed"] | None = Field(
        default=None,
        description="needed where the generation prompt opens a thinking block: closed puts an empty block before each "
        "answer; open leaves responses as they are, inside the block",
    )
    end_of_turn: str | None = Field(
        default=None, description="the token that ends a response; by default the chat template's, else the EOS"
    )
    control_tokens: Literal["text", "tokens", "error"] = Field(
        default="text", description="control tokens in the text of a prompt or response: ordinary text, or an error"
    )

    @field_validator("template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        """Replace a template file by its text: workers may not see the file, and recipe.yaml must reproduce the run."""
        return value if value is None else template_text(value)

    @field_validator("template_options", mode="before")
    @classmethod
    def _no_reserved_option(cls, value: Any) -> Any:
        for name in RESERVED_OPTIONS:
            if isinstance(value, dict) and name in value:
                raise ValueError(f"{name} is set by raydiv and is not an option of a template")
        return value

    def of_chat(self) -> ChatConfig:
        """These keys alone, without those of a subclass."""
        return ChatConfig.model_construct(**{name: getattr(self, name) for name in ChatConfig.model_fields})


Fraction = Annotated[float, Field(gt=0, lt=1)]

FRACTION_OR_SOURCES = ("share", "sources")
"""Tags of the two types of ``data.eval``."""


class DataConfig(ChatConfig):
    """Sources of examples, the treatment of invalid rows, and the chat template."""

    train: Sources = Field(default_factory=lambda: [Source(path="bundled:compliance-refusal")])
    eval: (
        Annotated[
            Annotated[Fraction, Tag("share")] | Annotated[Sources, Tag("sources")],
            Discriminator(lambda value: FRACTION_OR_SOURCES[not isinstance(value, int | float)]),
        ]
        | None
    ) = Field(
        default=None, description="held-out examples: sources, or the fraction of the training prompts that is held out"
    )
    columns: dict[str, str] | None = Field(
        default=None, description="column names of every source without columns of its own"
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="columns that are left out, though other tools read them, such as images or history",
    )
    prefer: Literal["safer", "better"] = Field(
        default="safer", description="the preferred response of PKU-SafeRLHF's format: the safer one, or the better one"
    )
    on_bad_row: Literal["error", "quarantine"] = Field(
        default="error", description="invalid rows: an error, or left out, counted and listed"
    )

    @property
    def eval_sources(self) -> list[Source]:
        """Sources of held-out examples; empty if ``eval`` is a fraction of the training prompts."""
        return self.eval if isinstance(self.eval, list) else []

    @property
    def held_out_names(self) -> list[str]:
        """The name of each source of held-out examples, in their order; empty where all have one name."""
        sources = self.train if isinstance(self.eval, float) else self.eval_sources
        names = [source.short_name for source in sources]
        return names if len(set(names)) > 1 else []

    def columns_of(self, source: Source) -> dict[str, str]:
        """The column names of a source by the names of its format."""
        return (self.columns if source.columns is None else source.columns) or {}

    @model_validator(mode="after")
    def _held_out_sources_have_no_weight(self) -> DataConfig:
        for number, source in enumerate(self.eval_sources):
            if source.weight != 1:
                raise ValueError(f"eval.{number}.weight: not supported here: each held-out example is evaluated once")
        return self
