"""Secrets in recipes, variables and addresses: a recipe is written into every run, to MLflow and to Ray's jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from raydiv.utils.dotted import leaves

SECRET_NAME = re.compile(
    r"(?:^|_|-|\.)(?:api_?key|tokens?|secrets?|passwords?|passwd|keys?|credentials?)(?:$|_|-|\.)", re.IGNORECASE
)
"""Names of variables, options and tags whose value is a secret, such as HF_TOKEN and AWS_SECRET_ACCESS_KEY."""

TEXT_TOKEN_NAME = re.compile(r"(?:pad|bos|eos|unk|sep|cls|mask|max|new|num|batched)[_-]tokens?$", re.IGNORECASE)
"""Names of a tokenizer's tokens, or of their number: no secrets."""

URI_PASSWORD = re.compile(r"\b([a-z][a-z0-9+.-]*://[^/\s:@]*):[^/\s@]+@", re.IGNORECASE)
"""The beginning of a URI with a password: ``scheme://user:password@``."""

QUERY_PASSWORD = re.compile(
    r"([?&;](?:[a-z0-9]+[_-])*(?:token|secret|password|passwd|pwd|key|sig|signature|credential)=)[^&;\s#]+",
    re.IGNORECASE,
)
"""A password among the parameters of a URI, as in addresses of databases and in signed URLs."""

TOKEN = re.compile(r"\b(?:hf_|ghp_|github_pat_|AKIA|(?:sk|xox[bp])-(?:\w+-)*)[A-Za-z0-9]{16,}")
"""A token of Hugging Face, GitHub, AWS, OpenAI (and services with the same prefix) or Slack. A folder whose name has
such a prefix, as in ``hf_datasets_cache``, has no 16 letters and digits in a row.
"""

FREE_SECTIONS = ("cluster.env", "track.tags", "engine.deepspeed")
"""Sections whose keys are the user's own, or another library's."""

REMEDY = (
    "a recipe is written into every run, so it must not hold a secret: set it in the environment of the command, and "
    "of each node of a cluster"
)


def find_secrets(recipe: Mapping[str, Any]) -> Iterator[str]:
    """An error message for each secret in an unvalidated recipe. No message shows a value."""
    for path, value in leaves(recipe):
        if isinstance(value, str) and has_password(value):
            yield f"{path}: has a password in its address; {REMEDY}"
        elif value is not None and _is_secret(path, value):
            yield f"{path}: {REMEDY}"


def _is_secret(path: str, value: Any) -> bool:
    """Whether a value of a free section, which a study may nest in its entries, is a secret by its name or form."""
    section = next((section for section in FREE_SECTIONS if f".{section}." in f".{path}."), None)
    if section is None:
        return False
    return (isinstance(value, str) and has_token(value)) or _is_secret_key(path, section, value)


def _is_secret_key(path: str, section: str, value: Any) -> bool:
    """Whether the key of a value in a free section is the name of a secret."""
    name = f".{path}.".partition(f".{section}.")[2].rstrip(".")
    name = name if name.isdigit() else re.sub(r"(\.\d+)+$", "", name)  # the index of a sweep's choice
    if section == "engine.deepspeed":  # numbers there are counts of tokens and parameters of schedules
        name = name.rpartition(".")[2] if isinstance(value, str) else ""
    elif isinstance(value, str) and (not name or name.isdigit()):  # NAME=VALUE in place of a mapping
        name = value.partition("=")[0]
    return is_secret_name(name)


def is_secret_name(name: str) -> bool:
    """Whether the value of a variable of this name is a secret."""
    return bool(SECRET_NAME.search(name) and not TEXT_TOKEN_NAME.search(name))


def has_password(text: str) -> bool:
    """Whether a URI, or a text that contains one, has a password."""
    return bool(URI_PASSWORD.search(text) or QUERY_PASSWORD.search(text))


def has_token(text: str) -> bool:
    """Whether a text contains a token of a known form."""
    return bool(TOKEN.search(text))


def mask_password(text: str) -> str:
    """A URI, or a text that contains one, with ``***`` for the password."""
    return QUERY_PASSWORD.sub(r"\1***", URI_PASSWORD.sub(r"\1:***@", text))
