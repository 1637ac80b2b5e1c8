"""Control tokens in texts, such as ``<|im_end|>`` in a user's message: found, and encoded as ordinary text.

A tokenizer turns the characters of a control token into the token wherever they stand. ``mark`` wraps those of a text
in private characters before the template is applied; ``ids`` then encodes them as text, and only the template's own as
tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

START, END = "\U000f0000", "\U000f0001"
"""Private characters around a control token that is to be text."""


def any_of(names: Iterable[str]) -> str:
    """The regular expression of one of ``names``, a longer one before those that it contains."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the added ones that its template writes."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in template)
        }
        names = any_of(self._added)
        self._pattern = re.compile(names)
        self._marked = re.compile(f"{START}({names}){END}|({names})|[{START}{END}]")

    def find(self, value: Any) -> list[str]:
        """The control tokens in a text, and in all texts of lists and mappings."""
        if isinstance(value, str):
            return self._pattern.findall(value)
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return [token for item in items for token in self.find(item)]

    def begin(self, text: str) -> bool:
        """Whether a text begins with a control token."""
        return self._pattern.match(text) is not None

    def without(self, text: str) -> str:
        """A text with spaces in place of its control tokens."""
        return self._pattern.sub(" ", text)

    def mark(self, value: Any) -> Any:
        """``value`` with all control tokens in its texts marked; marks that it has already are removed."""
        if isinstance(value, str):
            return self._pattern.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def ids(self, text: str) -> list[int]:
        """Ids of a text in which marked control tokens are text, and the others tokens. Nothing is added."""
        ids: list[int] = []
        run, position, strip = "", 0, False
        for match in self._marked.finditer(text):
            run += text[position : match.start()]
            position = match.end()
            if match[1]:
                run += match[1]
            elif match[2]:
                token = self._added[match[2]]
                ids += self._run_ids(_stripped(run, strip, token.lstrip), first=not ids)
                ids.append(self._tokenizer.convert_tokens_to_ids(token.content))
                run, strip = "", token.rstrip
        return ids + self._run_ids(_stripped(run + text[position:], strip, False), first=not ids)

    def _run_ids(self, run: str, first: bool) -> list[int]:
        """Ids of the text between two control tokens, all of it text."""
        if not run:
            return []
        encode, prepends = self._text_encoder
        if not first and prepends:
            # SentencePiece puts a space before a text, and none in its middle: encode behind a line break
            line, ids = encode("\n"), encode(f"\n{run}")
            if ids[: len(line)] == line:
                return ids[len(line) :]
        return encode(run)

    @cached_property
    def _text_encoder(self) -> tuple[Callable[[str], list[int]], bool]:
        """From a text to its ids, without finding control tokens; and whether a space is put before the text."""
        if not self._tokenizer.is_fast:
            return partial(self._tokenizer.encode, add_special_tokens=False, split_special_tokens=True), False
        from tokenizers import Tokenizer

        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in rules["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._added
        text = json.dumps(rules)
        copy = Tokenizer.from_str(text)
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        prepends = '"prepend_scheme": "first"' in text or '"type": "Prepend"' in text
        return lambda text: list(copy.encode(text, add_special_tokens=False).ids), prepends

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy of the tokenizer, which each process makes when it needs it."""
        return {key: value for key, value in self.__dict__.items() if key != "_text_encoder"}


def _stripped(run: str, left: bool, right: bool) -> str:
    """A run of text as the neighbouring control tokens leave it."""
    run = run.lstrip() if left else run
    return run.rstrip() if right else run
