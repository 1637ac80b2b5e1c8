"""Examples as a model sees them: their tokens, which of them the chat template writes, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from raydiv.data.formats import Example
from raydiv.data.index import Index
from raydiv.data.readers import file_chunks, parse_record, read_chunk
from raydiv.model.chat import Chat, ChatPrompt, TokenizedExample, as_messages

SHOWN = 3
"""Examples of each class that are shown."""

Part = Literal["template", "text", "trained", "end of turn"]
"""What a run of tokens is: the template's, a message's, the response's, or the token that ends the response."""


@dataclass(frozen=True, slots=True)
class ShownExample:
    """An example: its place, its class, its tokens as text in runs of one part, and how many tokens were cut."""

    place: str
    aligned: bool
    parts: list[tuple[Part, list[str]]]
    prompt_cut: int
    response_cut: int

    def as_json(self) -> dict[str, Any]:
        """The example as ``--json`` prints it."""
        return {
            "place": self.place,
            "class": "aligned" if self.aligned else "unaligned",
            "parts": [{"part": part, "tokens": tokens} for part, tokens in self.parts],
            "prompt_cut": self.prompt_cut,
            "response_cut": self.response_cut,
        }


def shown_examples(index: Index, chat: Chat) -> list[ShownExample]:
    """The first SHOWN examples of each class, as training tokenises them."""
    aligned = index.columns["aligned"]
    rows = np.sort(np.concatenate([np.flatnonzero(aligned == label)[:SHOWN] for label in (True, False)]))
    examples = _examples(index, rows.tolist())
    return sorted((_shown(index.where(row), example, index, chat) for row, example in examples), key=_by_class)


def _by_class(shown: ShownExample) -> bool:
    return not shown.aligned


def _examples(index: Index, rows: Sequence[int]) -> list[tuple[int, Example]]:
    """The examples of some rows of the index, read from their files once more."""
    file, position = index.columns["file"], index.columns["position"]
    wanted: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        wanted.setdefault((int(file[row]), int(position[row])), []).append(row)
    found = []
    for place, members in wanted.items():
        examples = index.opened.reader.examples(parse_record(_record(index, *place)), "")
        first = int(np.flatnonzero((file == place[0]) & (position == place[1]))[0])
        found += [(row, examples[row - first]) for row in members]
    return found


def _record(index: Index, file: int, position: int) -> Any:
    """The content of the record at a position of a file."""
    chunks = file_chunks(index.opened.files[file])
    records = (record for chunk in chunks if not chunk.start or chunk.start <= position for record in read_chunk(chunk))
    return next(content for found, content in records if found == position)


def _shown(place: str, example: Example, index: Index, chat: Chat) -> ShownExample:
    tokens = chat.tokenize([example.prompt], [example.response], *index.opened.lengths, trained=True)[0]
    runs = [*_prompt_parts(example.prompt, tokens, chat), *_response_parts(tokens, chat)]
    parts = [(part, [text for _, text in run]) for part, run in groupby(runs, key=lambda token: token[0])]
    return ShownExample(place, example.aligned, parts, tokens.prompt_cut, tokens.response_cut)


def _prompt_parts(prompt: ChatPrompt, tokens: TokenizedExample, chat: Chat) -> list[tuple[Part, str]]:
    """Each token of a prompt with its part: a message's text, or the template's."""
    texts = _token_texts(tokens.prompt, chat)
    whole = "".join(texts)
    inside = np.zeros(len(whole) + 1, bool)
    cursor = 0
    for message in as_messages(prompt):
        content = str(message["content"]).strip()
        start = whole.find(content, cursor) if content else -1
        if start < 0 and not cursor and tokens.prompt_cut:  # the message's beginning was cut
            content = next((content[n:] for n in range(1, len(content)) if content[n:] in whole), "")
            start = whole.find(content)
        if start >= 0:
            cursor = start + len(content)
            inside[start:cursor] = True
    parts: list[tuple[Part, str]] = []
    start = 0
    for text in texts:
        # a token that begins before the text, such as one of a space and a word, is the text's by its end
        end = start + len(text)
        parts.append(("text" if inside[max(start, end - 1)] or not chat.template.renders else "template", text))
        start = end
    return parts


def _response_parts(tokens: TokenizedExample, chat: Chat) -> list[tuple[Part, str]]:
    """Each token of a response with its part."""
    texts = _token_texts(tokens.response, chat)
    parts: list[tuple[Part, str]] = [("trained", text) for text in texts]
    if tokens.response and not tokens.response_cut:
        parts[-1] = ("end of turn", texts[-1])
    return parts


def _token_texts(ids: Sequence[int], chat: Chat) -> list[str]:
    """The text that each token adds to those before it; a token that ends within a character adds nothing."""
    texts, shown = [], ""
    for count in range(1, len(ids) + 1):
        text = str(chat.tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(whole[len(shown) :])
        shown = whole if len(whole) > len(shown) else shown
    return texts
