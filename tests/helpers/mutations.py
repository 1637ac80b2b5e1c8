"""Mutations of what users hand over, with fixed seeds: recipes, rows, templates and files."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, -0.0, 1e22, -1e22, 2**63, 2**64, 1e308, float("inf"), float("nan"), "", " ",
    "none", "auto", "x" * 5000, "a\0b", "\ud800", "../..", "/dev/zero", "/", "~", "*", "{{", "{% for %}", "(",
    "[", "%s", "http://", "s3://", "hf://", "bundled:", "bundled:nothing", "1e5", "0x10", "2026-13-45",
    [], [[]], [None], [0], {}, {"": 1}, {"a": {"b": []}}, ["x"] * 50, {"type": "kldo"}, {"path": "x"},
    [{}], "\n", "\u202e", "\U0001f600",
]  # fmt: skip
"""What may stand where a value is expected."""


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a nested mapping or list."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths_of(value, (*path, key))


def mutated(tree: Any, seed: int) -> Any:
    """A copy of a nested value with one to three changes: another value, a key less, a key more, or a copied part."""
    draw, tree = random.Random(seed), copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 2, 3])):
        paths = list(paths_of(tree))
        if not paths:
            break
        *parents, key = draw.choice(paths)
        node = tree
        for parent in parents:
            node = node[parent]
        change = draw.choice(["value", "value", "value", "remove", "add", "copy"])
        if change == "remove":
            del node[key]
        elif change == "copy":
            *others, other = draw.choice(paths)
            source = tree
            for parent in others:
                source = source[parent]
            node[key] = copy.deepcopy(source[other])
        elif change == "add" and isinstance(node, dict):
            node[draw.choice(["path", "type", "x", "weight", "every", 0, None])] = copy.deepcopy(draw.choice(VALUES))
        else:
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def mutated_bytes(content: bytes, seed: int) -> bytes:
    """The content with bytes changed, cut out, doubled or put in."""
    draw, changed = random.Random(seed), bytearray(content)
    for _ in range(draw.choice([1, 2, 8])):
        if not changed:
            break
        place, length = draw.randrange(len(changed)), draw.choice([1, 1, 4, 64])
        change = draw.choice(["flip", "flip", "cut", "double", "insert", "end"])
        if change == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif change == "cut":
            del changed[place : place + length]
        elif change == "double":
            changed[place:place] = changed[place : place + length]
        elif change == "insert":
            changed[place:place] = draw.randbytes(length)
        else:
            del changed[place:]
    return bytes(changed)
