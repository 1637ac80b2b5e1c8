"""Token ids of prompts and responses. They are tokenised separately, so that a prompt is always a prefix."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config import Recipe
from raydiv.config.data import ChatConfig
from raydiv.model.control_tokens import START, ControlTokens
from raydiv.model.resolve import load_error
from raydiv.model.template import THOUGHT_MARKERS, USER, ChatTemplate, Message, Messages, open_thought
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError, one_line

Ids = Sequence[int] | np.ndarray
"""Token ids."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with the tools and the template options of their record (``tools``, ``chat_template_kwargs``)."""

    messages: Messages
    tools: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


ChatPrompt = str | Messages | Conversation
"""A user's text, messages, or messages with what their record says to the template."""

Response = str | Message
"""A text, or an assistant message with ``reasoning_content`` or ``tool_calls``."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of one example; ``prompt_cut`` and ``response_cut`` count the tokens that were truncated."""

    prompt: list[int]
    response: list[int]
    prompt_cut: int
    response_cut: int


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """``text``: the template's; ``beginning``: what the prompt's last assistant message has of the answer.

    ``conversation``: the prompt with control tokens of its texts marked.
    """

    conversation: Conversation
    text: str
    beginning: str = ""

    @property
    def open_thought(self) -> tuple[str, str] | None:
        """The markers of the thinking block in which the answer begins."""
        return open_thought(self.text, self.beginning)


class Chat:
    """A tokenizer with its chat template.

    A prompt that ends in an assistant message is continued: its text follows the generation prompt, as in a prefill
    attack. Raises UserError when the directory has no tokenizer, for a template that is missing or fails, and where
    nothing would end a response.
    """

    def __init__(self, directory: Path, config: ChatConfig | None = None, trust_remote_code: bool = False) -> None:
        self.config = (config or ChatConfig()).of_chat()
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        self.template = ChatTemplate(self.tokenizer, self.config, directory)
        self.control_tokens = ControlTokens(self.tokenizer, self.template.text)
        self.end_of_turn = self.template.end_of_turn
        eos = self.tokenizer.eos_token
        self.ends = tuple(dict.fromkeys(token for token in (self.end_of_turn.token, eos) if token))
        """The tokens that a text may end with for the end of a turn."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, directory: Path) -> Chat:
        """The tokenizer of ``directory`` with the recipe's chat template."""
        return cls(directory, recipe.data, recipe.model.trust_remote_code)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the ids of a text."""
        tokenizer, config = self.tokenizer, self.config
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
        template = [self.template.text, self.template.renders, config.template_options]
        response = [self.end_of_turn.text, self.end_of_turn.id, config.thinking, config.control_tokens]
        return digest(rules, template, response, tokenizer.eos_token_id, tokenizer.bos_token_id)

    def facts(self) -> dict[str, Any]:
        """What a user should know of the template; ``chat_table`` writes it out."""
        template, end = self.template, self.end_of_turn
        prompt = self._render_prompt("?") if template.renders else None
        markers = template.thought_markers
        thinking = None
        if prompt is not None and prompt.open_thought:
            thinking = f"every prompt opens it ({prompt.open_thought[0]})"
        elif prompt is not None and markers and prompt.text.rstrip().endswith(markers[1]):
            thinking = "every prompt has an empty one"
        elif markers:
            thinking = f"the model writes it ({markers[0]})"
        return {
            "template": template.source,
            "end_of_turn": end.token,
            "end_of_turn_from": end.source,
            "note": end.note,
            "opening": template.opening,
            "bos": self._bos_of_prompts(),
            "thinking": thinking,
            "date": str(template.date) if template.date else None,
            "unused_date": str(self.config.template_date) if self.config.template_date and not template.date else None,
        }

    def _bos_of_prompts(self) -> str | None:
        """The BOS with which prompts begin, and what writes it; None where they begin with none."""
        bos = self.tokenizer.bos_token
        if bos and self.template.opening.startswith(bos):
            return f"{bos} (the template)"
        return f"{bos} (the tokenizer)" if self._adds_bos else None

    def prompt_ids(self, prompt: ChatPrompt, generation: bool = True, control_tokens: bool = False) -> list[int]:
        """Ids of the templated conversation, with the generation prompt or up to the end of the user's turn.

        They begin with exactly one BOS where the tokenizer adds one, whether or not the template writes it. With
        ``control_tokens`` those in the prompt's texts are tokens, as data.control_tokens=tokens would have it. Raises
        UserError when the template fails.
        """
        try:
            return self._prompt_ids([self._render_prompt(prompt, generation, control_tokens)])[0]
        except ValueError as error:
            raise UserError(f"data.template: {error}") from None

    def is_rendered(self, prompt: ChatPrompt) -> bool:
        """Whether a user's text begins with a control token, or as the template begins: it is rendered already."""
        messages = as_messages(prompt)
        if len(messages) > 1:
            return False
        text = str(messages[0]["content"]).lstrip()
        return self.control_tokens.begin(text) or (bool(self._opening) and text.startswith(self._opening))

    @cached_property
    def _opening(self) -> str:
        """What the template writes before a user's text, without BOS and white space."""
        return self.template.opening.removeprefix(self.tokenizer.bos_token or "").strip()

    def control_tokens_in(self, text: ChatPrompt | Response) -> set[str]:
        """The control tokens in the texts of a prompt, or in a response without the token that ends it."""
        if isinstance(text, Conversation):
            return set(self.control_tokens.find([text.messages, text.tools]))
        return set(self.control_tokens.find(self._without_end(text) if isinstance(text, str) else text))

    def tokenize(
        self,
        prompts: Sequence[ChatPrompt],
        responses: Sequence[Response],
        max_prompt_length: int,
        max_length: int,
        trained: bool = False,
    ) -> list[TokenizedExample]:
        """Ids of examples; equal prompts are tokenised once. A response ends with ``end_of_turn``.

        A long prompt is truncated at its beginning (after the BOS), a long response at its end. Raises ValueError for
        messages that the template cannot render, and for a ``trained`` response that would begin as thought and is
        none.
        """
        if not prompts:
            return []
        keys = [prompt_key(prompt) for prompt in prompts]
        rendered = {key: self._render_prompt(prompt) for key, prompt in dict(zip(keys, prompts, strict=True)).items()}
        prompt_ids = dict(zip(rendered, self._prompt_ids(list(rendered.values())), strict=True))
        texts = [
            self._response_text(rendered[key], response, trained) for key, response in zip(keys, responses, strict=True)
        ]
        examples = []
        for key, ids in zip(keys, self._ids(texts), strict=True):
            whole, response = prompt_ids[key], [*ids, self.end_of_turn.id]
            cut = whole if len(whole) <= max_prompt_length else self._truncate_left(whole, max_prompt_length)
            room = max_length - len(cut)
            cuts = (len(whole) - len(cut), max(0, len(response) - room))
            examples.append(TokenizedExample(cut, response[:room], *cuts))
        return examples

    def tokenize_one(
        self, prompt: ChatPrompt, response: Response, max_prompt_length: int, max_length: int
    ) -> TokenizedExample:
        """Ids of one example, as ``tokenize`` gives them."""
        return self.tokenize([prompt], [response], max_prompt_length, max_length)[0]

    def _truncate_left(self, ids: list[int], length: int) -> list[int]:
        """The BOS, where there is one, and the last of ``ids``: ``length`` in all."""
        first = ids[:1] if ids[0] == self.tokenizer.bos_token_id and length > 1 else []
        return first + ids[len(ids) - length + len(first) :]

    def _prompt_ids(self, prompts: Sequence[RenderedPrompt]) -> list[list[int]]:
        prompt_ids = self._ids([prompt.text for prompt in prompts])
        if self._adds_bos:
            bos = self.tokenizer.bos_token_id
            prompt_ids = [ids if ids[:1] == [bos] else [bos, *ids] for ids in prompt_ids]
        beginnings = self._ids([prompt.beginning for prompt in prompts])
        return [ids + beginning for ids, beginning in zip(prompt_ids, beginnings, strict=True)]

    def forged_turn(self, opening: str) -> str:
        """What a user appends to a message to make it seem that the assistant has begun to answer with ``opening``."""
        return self.template.render([{"role": "user", "content": USER}]).partition(USER)[2] + opening

    def _render_prompt(
        self, prompt: ChatPrompt, generation: bool = True, control_tokens: bool = False
    ) -> RenderedPrompt:
        """The prompt in the template, with control tokens of its texts marked. Raises ValueError where that fails."""
        if not self.template.renders:
            if not isinstance(prompt, str):
                raise ValueError("prompt has messages, and data.template=none takes rendered text")
            return RenderedPrompt(as_conversation(prompt), prompt)
        conversation = as_conversation(prompt)
        if not control_tokens:
            conversation = self._marked(conversation)
        messages, beginning = conversation.messages, ""
        self.template.require_roles(messages)
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            if not messages:
                raise ValueError("prompt is an assistant message alone, which answers nothing")
            beginning, generation = str(last["content"]), True
        text = self.template.render(messages, generation, conversation.tools, conversation.options)
        opened = open_thought(text) if generation else None
        if opened and self.config.thinking == "closed":
            text = f"{text.rstrip()}\n\n{opened[1]}\n\n"
        return RenderedPrompt(conversation, text, beginning)

    def _marked(self, conversation: Conversation) -> Conversation:
        messages, tools = self._as_text(conversation.messages, "prompt"), self._as_text(conversation.tools, "tools")
        return replace(conversation, messages=messages, tools=tools)

    def _as_text(self, value: Any, column: str) -> Any:
        """``value`` with control tokens marked as text, if ``data.control_tokens`` says so.

        Raises ValueError under data.control_tokens: error.
        """
        control_tokens = self.control_tokens.find(value) if self.config.control_tokens != "tokens" else []
        if control_tokens and self.config.control_tokens == "error":
            raise ValueError(
                f"{column} holds the control token {control_tokens[0]}; remove it, or set data.control_tokens to text "
                "or tokens"
            )
        return self.control_tokens.mark(value) if control_tokens else value

    def _response_text(self, rendered: RenderedPrompt, response: Response, trained: bool) -> str:
        """The text of a response without the token that ends it. Raises ValueError where it cannot be written."""
        message = {"role": "assistant", "content": response} if isinstance(response, str) else response
        if message.get("tool_calls"):
            return self._with_tool_calls(rendered, message)
        opened = rendered.open_thought
        thought, answer = message.get("reasoning_content"), message["content"]
        markers = opened or self.template.thought_markers
        if thought is None and markers is not None:
            thought, answer = split_thought(answer, markers, begun=opened is not None)
        answer = self._as_text(self._without_end(answer), "response")
        if thought is not None:
            thought = self._as_text(thought.strip("\n"), "response")
            message = message | {"content": answer.lstrip("\n"), "reasoning_content": thought}
            return self._with_thought(rendered, message) + self.end_of_turn.text
        if opened and trained and self.config.thinking is None:
            raise ValueError(
                f"the chat template opens a thinking block ({opened[0]}) before this response, which would be trained "
                "as thought; give its thought as reasoning_content, set an option of the template (such as "
                "data.template_options.enable_thinking=false), or set data.thinking to closed or open"
            )
        prefix = self.template.answer_prefix if self.template.renders and not rendered.beginning else ""
        return f"{prefix}{answer}{self.end_of_turn.text}"

    def _without_end(self, answer: str) -> str:
        """An answer without the token that ends a turn, which some data have at the end of their texts."""
        return next((answer.removesuffix(token) for token in self.ends if answer.endswith(token)), answer)

    def _with_thought(self, rendered: RenderedPrompt, message: Message) -> str:
        """An answer with its thought, as the template writes them, else in the template's thinking block."""
        thought, answer = message["reasoning_content"], message["content"]
        if rendered.open_thought:
            return f"{thought}\n{rendered.open_thought[1]}\n\n{answer}"
        markers = self.template.thought_markers
        if markers and rendered.text.rstrip().endswith(markers[1]):
            raise ValueError(
                "reasoning_content: the prompt ends in a closed thinking block (data.thinking=closed or an option of "
                "the template), so the thought has no place; change that, or remove the thought"
            )
        written = self._rendered_response(rendered, message)
        if written is not None and thought in written:
            return written
        if markers is None:
            raise ValueError(
                "reasoning_content: the chat template has no thinking block; remove it, or change the template"
            )
        return f"{markers[0]}\n{thought}\n{markers[1]}\n\n{answer}"

    def _with_tool_calls(self, rendered: RenderedPrompt, message: Message) -> str:
        written = self._rendered_response(rendered, self._as_text(message, "response"))
        names = [call["function"]["name"] for call in message["tool_calls"]]
        if written is None or not all(name in written for name in names):
            raise ValueError(
                "tool_calls: the chat template does not write them; change the template, or remove the row"
            )
        return written + self.end_of_turn.text

    def _rendered_response(self, rendered: RenderedPrompt, message: Message) -> str | None:
        """What the template writes of an assistant message after the prompt; None where it writes another prompt."""
        conversation = rendered.conversation
        messages = [*conversation.messages, message]
        whole = self.template.render(messages, False, conversation.tools, conversation.options)
        if rendered.beginning or not whole.startswith(rendered.text):
            return None
        written, end, _ = whole[len(rendered.text) :].rpartition(self.end_of_turn.token)
        return (written if end else whole[len(rendered.text) :].rstrip()).removesuffix(self.end_of_turn.text)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("").input_ids[:1] == [bos]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, without special tokens that the tokenizer would add; marked control tokens are text."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        ).input_ids
        for number, text in enumerate(texts):
            if START in text:
                ids[number] = self.control_tokens.ids(text)
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without added special tokens."""
        return self._ids([text])[0] if text else []

    def split_answer(self, prompt: ChatPrompt, ids: list[int]) -> tuple[str | None, str | None]:
        """The thought of an answer that a model wrote after ``prompt``, None without one, and the text after it.

        The text is None for a thought that does not end. Special tokens are left out.
        """
        text = self._with_special_tokens(ids)
        prefix = self.template.answer_prefix if self.template.renders else ""
        if prefix and self.control_tokens.begin(text):
            return self._split_at_prefix(ids, prefix)
        opened = self._render_prompt(prompt).open_thought
        markers = opened or next((pair for pair in THOUGHT_MARKERS if text.lstrip().startswith(pair[0])), None)
        if markers is None:
            return None, self.decode(ids)
        opening, closing = markers
        parts = self._part(ids, closing)
        if parts is None:
            return self.decode(ids).strip().removeprefix(opening).strip(), None
        return parts[0].strip().removeprefix(opening).strip(), parts[1].lstrip("\n")

    def _split_at_prefix(self, ids: list[int], prefix: str) -> tuple[str | None, str | None]:
        """As ``split_answer``, for a template that writes ``prefix`` before an answer and not before a thought."""
        parts = self._part(ids, prefix)
        if parts is None:
            return self.decode(ids).strip(), None
        return self.control_tokens.without(parts[0]).strip() or None, parts[1]

    def _part(self, ids: list[int], separator: str) -> tuple[str, str] | None:
        """What an answer has before a text, special tokens included, and after it, without them; None without it."""
        if separator not in self._with_special_tokens(ids):
            return None
        end = bisect_left(range(len(ids)), True, key=lambda count: separator in self._with_special_tokens(ids[:count]))
        before, _, rest = self._with_special_tokens(ids[:end]).partition(separator)
        return before, rest + self.decode(ids[end:])

    def _with_special_tokens(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def chat_table(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a chat (see Chat.facts) in words, by name."""
    table = {
        "chat template": facts["template"],
        "a response ends with": f"{facts['end_of_turn']} ({facts['end_of_turn_from']})",
        "note": facts["note"],
        "every prompt begins with": repr(facts["opening"]) if facts["opening"] else None,
        "BOS": facts["bos"],
        "thinking block": facts["thinking"],
        "date in the template": f"{facts['date']} (data.template_date)" if facts["date"] else None,
        # not in the facts of a run that an earlier version wrote
        "data.template_date": "not used: the chat template prints no date" if facts.get("unused_date") else None,
    }
    return {name: fact for name, fact in table.items() if fact}


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises UserError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        # always explicit: without a value transformers asks on the terminal, and accepts a piped "y"
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except Exception as error:  # files of nonsense may raise anything
        raise load_error(directory, error, f"has no usable tokenizer: {one_line(error, 200)}") from None


def as_conversation(prompt: ChatPrompt) -> Conversation:
    """A prompt as a conversation."""
    return prompt if isinstance(prompt, Conversation) else Conversation(as_messages(prompt))


def as_messages(prompt: ChatPrompt) -> Messages:
    """The messages of a prompt: a string is one user turn."""
    if isinstance(prompt, Conversation):
        return prompt.messages
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_key(prompt: ChatPrompt) -> str:
    """A text that equal prompts share: the prompt itself, or JSON with sorted keys."""
    if isinstance(prompt, Conversation):
        return json.dumps([prompt.messages, prompt.tools, prompt.options], sort_keys=True)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def without_beginning(prompt: ChatPrompt) -> ChatPrompt:
    """The prompt without an assistant message at its end, which begins the answer, in one notation."""
    messages = as_messages(prompt)
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if isinstance(prompt, Conversation):
        return replace(prompt, messages=messages)
    return in_one_notation(messages)


def in_one_notation(prompt: str | Messages) -> str | Messages:
    """A conversation of a single user turn as its text."""
    if isinstance(prompt, str) or [turn["role"] for turn in prompt] != ["user"]:
        return prompt
    return str(prompt[0]["content"])


def split_thought(text: str, markers: tuple[str, str], begun: bool) -> tuple[str | None, str]:
    """The thought that a text begins with, None without one, and the answer after it.

    ``begun``: the text begins inside the block, with or without the opening marker.
    """
    opening, closing = markers
    block, end, answer = text.partition(closing)
    inside = block.lstrip()
    if not end or not (begun or inside.startswith(opening)):
        return None, text
    return inside.removeprefix(opening), answer
