"""A tokenizer's chat template: rendering, how it ends a turn, which roles it has, and where it puts thought."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from raydiv.config.data import NO_TEMPLATE, ChatConfig
from raydiv.model.control_tokens import any_of
from raydiv.model.template_bounds import require_bounded
from raydiv.utils.errors import UserError, one_line

Message = dict[str, Any]
"""``role`` and ``content``; an assistant's may have ``reasoning_content`` and ``tool_calls``."""

Messages = list[Message]

USER, ANSWER = "raydiv-user-turn", "raydiv-answer"
"""Contents of the turns that a template is probed with."""

THOUGHT_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
"""Markers of the beginning and the end of a thinking block."""

_LAST_OF_OPENINGS = {opening[-1] for opening, _ in THOUGHT_MARKERS}


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """What ends a response: ``text`` (white space, mostly none), then the token ``token``, whose id is ``id``.

    ``source``: the key or file that says so. ``note`` is for the user, such as that the template has no terminator.
    """

    text: str
    token: str
    id: int
    source: str
    note: str = ""


class ChatTemplate:
    """The template that ``config`` chooses for a tokenizer.

    Raises UserError where there is none, where it is unknown, or where it fails on a single user turn.
    """

    def __init__(self, tokenizer: Any, config: ChatConfig, directory: Path) -> None:
        self._tokenizer, self._config, self._directory = tokenizer, config, directory
        self.source = "data.template"
        if config.template == NO_TEMPLATE:
            self.source = NO_TEMPLATE
        elif config.template is not None and "{" in config.template:
            tokenizer.chat_template = config.template
        elif not tokenizer.chat_template:
            raise UserError(f"data.template: missing, and the tokenizer of {directory} has no chat template")
        else:
            tokenizer.chat_template, self.source = _named_template(tokenizer, config.template)
        self.text: str = tokenizer.chat_template or ""
        self.date: date | None = None
        if "strftime_now" in self.text:
            self.date = config.template_date or date.today()
            self.text = _with_date(self.text, self.date)
        self.opening = ""
        """What the template writes before a conversation's first user turn, such as a default system turn."""
        self._roles: dict[str, bool] = {}
        if self.renders:
            try:
                require_bounded(self.text, self._render_first)
                self.opening = self.render([{"role": "user", "content": USER}]).partition(USER)[0]
            except ValueError as error:
                raise UserError(f"data.template: {error}") from None

    def _render_first(self) -> None:
        user, assistant = {"role": "user", "content": USER}, {"role": "assistant", "content": USER}
        for messages in ([user], [user, assistant], [user, assistant, user]):
            self.render(messages, generation=messages[-1] is user)

    @property
    def renders(self) -> bool:
        """False under ``data.template: none``."""
        return self.source != NO_TEMPLATE

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation: bool = True,
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, with or without the generation prompt. Raises ValueError where that fails."""
        variables = {**self._config.template_options, **(options or {})}
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.text,
                tools=tools or None,
                add_generation_prompt=generation,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the chat template fails: {_reason(error, messages)}") from None
        return rendered

    @cached_property
    def end_of_turn(self) -> EndOfTurn:
        """The end of a response: of ``data.end_of_turn``, else of the template's assistant turn, else the EOS.

        Raises UserError for a token that the tokenizer does not have, and where there is no EOS either.
        """
        if self._config.end_of_turn is not None:
            return self._end(self._config.end_of_turn, "data.end_of_turn")
        suffix = self._assistant_suffix()
        if suffix is None:
            return self._eos("the chat template renders no assistant turn")
        added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
        match = re.search(any_of(token for token in added if token.strip()), suffix)
        if match is None:
            reason = "the chat template ends an assistant turn with no token of its own"
            return self._eos(reason + (f", only with {suffix!r}" if suffix.strip() else ""))
        after = suffix[match.end() :].strip()
        note = f"the chat template writes {after!r} after it, which is not trained" if after else ""
        return self._end(match[0], "the template", suffix[: match.start()], note)

    def _assistant_suffix(self) -> str | None:
        """What the template writes after the content of a last assistant turn; None where it renders none."""
        turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        try:
            _, found, suffix = self.render(turns, generation=False).rpartition(ANSWER)
        except ValueError:
            return None
        return suffix if found else None

    def _end(self, token: str, key: str, text: str = "", note: str = "") -> EndOfTurn:
        ids = self._tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(f"{key}: {token!r} is {len(ids)} tokens of this tokenizer; a turn ends with one")
        return EndOfTurn(text, token, ids[0], key, note)

    def _eos(self, reason: str) -> EndOfTurn:
        token, number = self._tokenizer.eos_token, self._tokenizer.eos_token_id
        if number is None:
            raise UserError(
                f"model.id: the tokenizer of {self._directory} has no EOS token and {reason}, so answers "
                "would never end; set data.end_of_turn"
            )
        return EndOfTurn("", token, number, "the EOS", reason if self.renders else "")

    @cached_property
    def answer_prefix(self) -> str:
        """What the template writes after the generation prompt and before an answer, such as gpt-oss's final channel.

        White space and thinking blocks do not count: whether there is a thought is the data's matter.
        """
        user: Message = {"role": "user", "content": USER}
        try:
            prompt = self.render([user])
            whole = self.render([user, {"role": "assistant", "content": ANSWER}], generation=False)
        except ValueError:
            return ""
        written, found, _ = whole.removeprefix(prompt).partition(ANSWER)
        if not found or not whole.startswith(prompt) or not written.strip() or prompt == self.render([user], False):
            return ""
        return "" if any(marker in written for pair in THOUGHT_MARKERS for marker in pair) else written

    @cached_property
    def thought_markers(self) -> tuple[str, str] | None:
        """The markers of a thinking block that the template mentions."""
        return next((pair for pair in THOUGHT_MARKERS if pair[0] in self.text or pair[1] in self.text), None)

    def require_roles(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a message whose role the template does not render: its text would be lost."""
        for number, message in enumerate(messages, start=1):
            if not self._renders_role(message["role"]):
                first = message["role"] in FIRST_ROLES
                remedy = "write its text at the beginning of the first user message" if first else "rename the role"
                raise ValueError(
                    f"message {number} has the role {message['role']}, which the template does not render; {remedy}"
                )

    def _renders_role(self, role: str) -> bool:
        if role in ("user", "assistant"):
            return True
        if role not in self._roles:
            probe: Message = {"role": role, "content": ANSWER}
            user: Message = {"role": "user", "content": USER}
            calling: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
            places = [[probe, user]] if role in FIRST_ROLES else [[user, calling, probe], [user, probe]]
            self._roles[role] = any(self._appears(turns) for turns in places)
        return self._roles[role]

    def _appears(self, turns: Messages) -> bool:
        try:
            return ANSWER in self.render(turns)
        except ValueError:
            return False


FIRST_ROLES = ("system", "developer")
"""Roles of a conversation's first message."""

_CALL = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": {}}}
"""A tool call before the result that probes the role ``tool``."""


def open_thought(prompt: str, beginning: str = "") -> tuple[str, str] | None:
    """The markers of the thinking block that a rendered prompt or the beginning of its answer opens and does not close.

    Markers elsewhere in a prompt are its messages' own.
    """
    if not beginning and prompt.rstrip()[-1:] not in _LAST_OF_OPENINGS:
        return None
    for opening, closing in THOUGHT_MARKERS:
        opened = prompt.rstrip().endswith(opening) or beginning.lstrip().startswith(opening)
        if opened and closing not in beginning:
            return opening, closing
    return None


def _with_date(template: str, today: date) -> str:
    """The template with a date in place of today's. Raises UserError where a format is not written out in it."""
    dated = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: json.dumps(today.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", dated):
        raise UserError("data.template: it prints the date in a format of its own making; give one that writes it out")
    return dated


def _named_template(tokenizer: Any, name: str | None) -> tuple[str, str]:
    """One of the tokenizer's templates, and where it comes from. Raises UserError for an unknown name."""
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        templates = {"default": templates}
    chosen = templates.get(name or "default")
    if chosen is None:
        names = ", ".join(sorted(templates))
        if name is None:
            raise UserError(f"data.template: missing: the tokenizer has several and no default; choose one of {names}")
        raise UserError(f"data.template: {name}: neither Jinja text, nor a file, nor one of the tokenizer's: {names}")
    return chosen, "tokenizer" if len(templates) == 1 else f"tokenizer ({name or 'default'})"


def _reason(error: Exception, messages: Sequence[Mapping[str, Any]]) -> str:
    """Why a template failed, without the text of a message: harmful text stays out of errors."""
    contents = [str(message.get("content") or "") for message in messages]
    if any(content and content in str(error) for content in contents):
        return type(error).__name__
    return one_line(error, 200)
