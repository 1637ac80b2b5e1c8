"""Notes on examples that are read, and may not be what their author meant."""

from __future__ import annotations

from enum import IntFlag


class Note(IntFlag):
    """What may be wrong with an example. The index stores it as a number."""

    NONE = 0
    CONTROL_TOKENS = 1
    END_IN_RESPONSE = 2
    RENDERED = 4
    EQUAL_SIDES = 8
    EQUAL_WHEN_CUT = 16
    SIDE_BEGINS_OTHER = 32
    OWN_CONTEXT = 64
    UNSAFE_PREFERRED = 128


NOTE_TEXTS = {
    Note.CONTROL_TOKENS: "control tokens in the text of a prompt or response",
    Note.END_IN_RESPONSE: "the token that ends a turn within a response",
    Note.RENDERED: "the prompt is rendered already",
    Note.EQUAL_SIDES: "both responses of a pair are equal",
    Note.EQUAL_WHEN_CUT: "both responses of a pair are equal once truncated",
    Note.SIDE_BEGINS_OTHER: "one response of a pair is the beginning of the other",
    Note.OWN_CONTEXT: "both sides part before their last turn: each answer has its own prompt, and no partner",
    Note.UNSAFE_PREFERRED: "the preferred response is labelled unsafe",
}
"""Each note in a sentence."""
