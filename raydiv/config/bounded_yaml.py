"""YAML from users: text of bounded size, depth and number of values, whatever its aliases expand to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raydiv.utils.errors import one_line

MOST_BYTES, MOST_VALUES, MOST_LEVELS = 2**20, 100_000, 50
"""Of a YAML file: its size, and the values and levels that it has once its aliases are expanded."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises ValueError as ``parse_yaml`` does, OSError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"has {size:,} bytes, more than {MOST_BYTES:,}")
    return parse_yaml(path.read_text())


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError where it is none, or beyond the bounds."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, 0, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {one_line(error)}") from None
    except OverflowError as error:
        raise ValueError(one_line(error)) from None


def _count(node: yaml.Node, level: int, counts: dict[int, int]) -> int:
    """Values in a node, with those of its aliases each time that they are used. Raises ValueError beyond the bounds."""
    if level > MOST_LEVELS:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
    if id(node) not in counts:
        # inside itself, by an alias, a node has no end
        counts[id(node)] = MOST_VALUES + 1
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counts[id(node)] = 1 + sum(_count(child, level + 1, counts) for child in children)
    if counts[id(node)] > MOST_VALUES:
        raise ValueError(f"has more than {MOST_VALUES:,} values, or contains itself")
    return counts[id(node)]
