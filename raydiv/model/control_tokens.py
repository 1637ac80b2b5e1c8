"""Control tokens in texts, such as ``<|im_end|>`` in a user's message: found, and encoded as ordinary text.

A tokenizer turns the characters of a control token into the token wherever they stand. ``mark`` wraps those of a text
in private characters before the template is applied; ``ids`` then encodes them as text, and only the template's own as
tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

START, END = "\U000f0000", "\U000f0001"
"""Private characters around a control token that is to be text."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the added ones that its template writes."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in template)
        }
        names = "|".join(re.escape(name) for name in sorted(self._added, key=len, reverse=True)) or "(?!)"
        self._pattern = re.compile(names)
        self._marked = re.compile(f"{START}({names}){END}|({names})|[{START}{END}]")

    def find(self, value: Any) -> list[str]:
        """The control tokens in a text, and in all texts of lists and mappings."""
        if isinstance(value, str):
            return self._pattern.findall(value)
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return [token for item in items for token in self.find(item)]

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
        if self._text_encoder is None:
            ids: list[int] = self._tokenizer(run, add_special_tokens=False, split_special_tokens=True).input_ids
            return ids
        if first or not self._prepends:
            return list(self._text_encoder.encode(run, add_special_tokens=False).ids)
        # SentencePiece puts a space before a text, and none in its middle: encode behind a line break, and remove it
        line, ids = (list(self._text_encoder.encode(t, add_special_tokens=False).ids) for t in ("\n", f"\n{run}"))
        return ids[len(line) :] if ids[: len(line)] == line else self._text_encoder.encode(run, False).ids

    @cached_property
    def _text_encoder(self) -> Any:
        """A copy of the fast tokenizer that finds no control tokens in a text; None for a slow tokenizer."""
        if not self._tokenizer.is_fast:
            return None
        from tokenizers import Tokenizer

        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in rules["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._added
        encoder = Tokenizer.from_str(json.dumps(rules))
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True
        return encoder

    @cached_property
    def _prepends(self) -> bool:
        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return '"prepend_scheme": "first"' in json.dumps(rules) or '"type": "Prepend"' in json.dumps(rules)

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy of the tokenizer, which each process makes when it needs it."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_text_encoder", "_prepends")}


def _stripped(run: str, left: bool, right: bool) -> str:
    """A run of text as the neighbouring control tokens leave it."""
    run = run.lstrip() if left else run
    return run.rstrip() if right else run
