"""Secrets have no place in a recipe: it is written into every run, to MLflow and to the cluster's list of jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from raydiv.utils.dotted import leaves

NAMED = re.compile(
    r"(?:^|_|-|\.)(?:api_?key|tokens?|secrets?|passwords?|passwd|keys?|credentials?)(?:$|_|-|\.)", re.IGNORECASE
)
"""Names of variables, options and tags that say that their value is one, such as HF_TOKEN and AWS_SECRET_ACCESS_KEY."""

OF_TEXT = re.compile(r"(?:pad|bos|eos|unk|sep|cls|mask|max|new|num|batched)[_-]tokens?$", re.IGNORECASE)
"""Names of tokens that are no secrets but a tokenizer's, or a number of those."""

LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://[^/\s:@]*):[^/\s@]+@", re.IGNORECASE)
"""The beginning of a URI with a password in it."""

QUERY = re.compile(
    r"([?&;](?:[a-z0-9]+[_-])*(?:token|secret|password|passwd|pwd|key|sig|signature|credential)=)[^&;\s#]+",
    re.IGNORECASE,
)
"""A password among the parameters of a URI, as databases' and signed addresses have it."""

TOKEN = re.compile(r"\b(?:hf_|ghp_|github_pat_|AKIA|(?:sk|xox[bp])-(?:\w+-)*)[A-Za-z0-9]{16,}")
"""A token of Hugging Face, GitHub, AWS, OpenAI and those that write theirs alike, or Slack. Names of folders that only begin
so (``hf_datasets_cache``) have no such stretch of letters and digits.
"""

FREELY_NAMED = ("cluster.env", "track.tags", "engine.deepspeed")
"""Sections whose keys are the user's own, or another library's."""

INSTEAD = (
    "a recipe is written into every run, so no secret belongs there: set it in the environment of the command, and of each "
    "node of a cluster"
)


def secrets_in(recipe: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an unchecked recipe, without any of the values."""
    for path, value in leaves(recipe):
        if isinstance(value, str) and has_password(value):
            yield f"{path}: has a password in its address; {INSTEAD}"
        elif value is not None and _free_secret(path, value):
            yield f"{path}: {INSTEAD}"


def _free_secret(path: str, value: Any) -> bool:
    """Whether a value of a free section is a secret, by its name or by itself. The entries of a study have these further in."""
    section = next((one for one in FREELY_NAMED if f".{one}." in f".{path}."), None)
    if section is None:
        return False
    return (isinstance(value, str) and has_token(value)) or _named_secret(path, section, value)


def _named_secret(path: str, section: str, value: Any) -> bool:
    """Whether the name of a value of a free section says that it is a secret."""
    name = f".{path}.".partition(f".{section}.")[2].rstrip(".")
    name = name if name.isdigit() else re.sub(r"(\.\d+)+$", "", name)  # a choice of a sweep's
    if section == "engine.deepspeed":  # its own keys have tokens of text in them, and schedules' numbers
        name = name.rpartition(".")[2] if isinstance(value, str) else ""
    elif isinstance(value, str) and (not name or name.isdigit()):  # NAME=VALUE, where a mapping was meant
        name = value.partition("=")[0]
    return names_secret(name)


def names_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one."""
    return bool(NAMED.search(name) and not OF_TEXT.search(name))


def has_password(address: str) -> bool:
    """Whether a URI, or a text with one in it, has a password in it."""
    return bool(LOGIN.search(address) or QUERY.search(address))


def has_token(text: str) -> bool:
    """Whether a text has a token in it, as those look that are known."""
    return bool(TOKEN.search(text))


def without_password(address: str) -> str:
    """A URI as it may be shown and written down."""
    return QUERY.sub(r"\1***", LOGIN.sub(r"\1:***@", address))
