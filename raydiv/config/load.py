"""From YAML and dotted overrides to a checked recipe. All errors are reported at once, each with its key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raydiv.config.bounded_yaml import parse_yaml, read_yaml
from raydiv.config.data import FRACTION_OR_SOURCES
from raydiv.config.loss import TYPES, PositionConfig
from raydiv.config.recipe import Recipe
from raydiv.config.source import Source
from raydiv.losses import OBJECTIVES
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.nearest import nearest

MOST_PARENTS = 20
"""Recipes that extend each other."""

BUNDLED = Path(__file__).parents[1] / "data" / "bundled"
"""Folder of the recipes that ``extends: bundled:NAME`` names."""


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file (or mapping), with its ``extends`` and the ``section.key=value`` overrides.

    Raises UserError with every unknown key, wrong type and value out of range.
    """
    tree = load_tree(source, overrides)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        file = "" if isinstance(source, Mapping) else f"{source}: "
        messages: dict[str, list[str]] = {}
        for problem in error.errors():
            path, message = _explain(problem, tree)
            messages.setdefault(path, []).append(message)
        # a key of several types has a message for each type
        parts = [f"{path}: {' or '.join(texts)}" if path else "; ".join(texts) for path, texts in messages.items()]
        raise UserError(file + "; ".join(parts)) from None


def load_tree(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe as written, merged with what it ``extends`` and the overrides, not validated.

    Raises UserError where it cannot be read, or is not a mapping.
    """
    tree = dict(source) if isinstance(source, Mapping) else _read(Path(source), seen=())
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = _merge(changes, _parse_override(override))
    return _merge(tree, changes)


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of dotted keys, validated again, without its sections ``sweep`` and ``study``.

    Keys that were not set keep their defaults: a new ``loss.type`` gets its own defaults, not the former loss's. Raises
    UserError as ``load_recipe`` does.
    """
    tree = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"sweep", "study"})
    new: dict[str, Any] = {}
    for key, value in changes.items():
        new = _merge(new, _nested(key, value))
    return load_recipe(_merge(tree, new))


def parse_source(text: str) -> Source:
    """A source of the command line: a path, or a section such as ``{path: ..., columns: {...}}``.

    Raises UserError where it is neither.
    """
    try:
        return Source.model_validate(parse_yaml(text) if text.lstrip().startswith("{") else text)
    except ValidationError as error:
        messages = ("".join(f"{key}: " for key in problem["loc"]) + problem["msg"] for problem in error.errors())
        raise UserError(f"{text}: {'; '.join(messages)}") from None
    except ValueError:
        raise UserError(f"{text}: neither a path nor a section in YAML") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; ``load_recipe`` of the file returns an equal one."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML mapping, merged over the recipe that it ``extends``."""
    try:
        if path.resolve() in seen:
            raise UserError(f"{path}: extends itself, through {' -> '.join(p.name for p in (*seen, path))}")
        if len(seen) > MOST_PARENTS:
            raise UserError(f"{path}: extends more than {MOST_PARENTS} recipes, the first {seen[0].name}")
        tree = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{str(path)!r}: cannot be read: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe must be a mapping of sections, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _merge(_read(_extended(path, str(parent)), (*seen, path.resolve())), tree)


def _extended(path: Path, parent: str) -> Path:
    """The file that ``path`` extends: relative to it, or ``bundled:NAME``. Raises UserError for an unknown name."""
    if not parent.startswith("bundled:"):
        return path.parent / parent
    known = {file.stem: file for file in BUNDLED.glob("*.yaml")}
    name = parent.removeprefix("bundled:")
    if name not in known:
        raise UserError(f"{path}: extends: no bundled recipe {name!r}{nearest(name, known)}")
    return known[name]


def _parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` as {"a": {"b": 1}}; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{text!r}: an override must be section.key=value")
    try:
        tree: Any = parse_yaml(value)
    except ValueError as error:
        raise UserError(f"{key}: {value[:200]!r} is not a YAML value: {one_line(error)}") from None
    return _nested(key, tree)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """``a.b`` and a value as {"a": {"b": value}}."""
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree  # type: ignore[no-any-return]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` merged over ``base`` key by key. Another ``loss.type`` drops the options that it does not have."""
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            if key == "loss" and "type" in before and value.get("type", before["type"]) != before["type"]:
                before = _options_of(value["type"], before)
            merged[key] = _merge(before, value)
        else:
            merged[key] = value
    return merged


def _options_of(loss: Any, section: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a loss section that another loss keeps: ``mix``, ``position`` and the options that both have."""
    known = OBJECTIVES[loss].parameters if isinstance(loss, str) and loss in OBJECTIVES else {}
    return {key: value for key, value in section.items() if key in ("mix", "position") or key in known}


def _explain(problem: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[str, str]:
    """Key and message of a pydantic error."""
    location = _location(problem)
    path = ".".join(location)  # empty for an error of several sections, whose message names them
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return path, f"unknown key{_hint(location, tree)}"
    if kind == "missing":
        return path, "missing"
    if kind == "union_tag_not_found":
        return f"{path}.type", f"missing (one of {', '.join(TYPES)})"
    if kind == "union_tag_invalid":
        if context["tag"] in OBJECTIVES:
            return f"{path}.type", f"{context['tag']} is a penalty and trains nothing alone; set it under loss.mix"
        return f"{path}.type", f"no loss {context['tag']!r}{nearest(str(context['tag']), TYPES)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = "" if isinstance(problem["input"], dict | BaseModel) else f", found {problem['input']!r}"
    return path, message + value


def _location(problem: Mapping[str, Any]) -> list[str]:
    """The key of a pydantic error, without the parts that pydantic adds: a loss's name, a type of a union."""
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["data"]:
        location = [part for part in location if part not in FRACTION_OR_SOURCES]
    if location[:1] == ["loss"] and len(location) > 1 and location[1] in OBJECTIVES:
        del location[1]
    if location[:1] != ["loss"] and len(location) > 2 and problem["type"] != "extra_forbidden":
        section = Recipe.model_fields[location[0]].annotation
        field = getattr(section, "model_fields", {}).get(location[1])
        if field is not None and not _sections(field.annotation) and get_origin(field.annotation) is not dict:
            del location[2:]
    return location


def _hint(location: list[str], tree: Mapping[str, Any]) -> str:
    """The nearest known key, or the losses that have the option."""
    *parents, key = location
    if parents == ["loss", "mix"]:
        return nearest(key, OBJECTIVES)
    if parents[:1] == ["loss"]:
        if parents[1:] == ["position"]:
            return nearest(key, PositionConfig.model_fields)
        own = ["type", "mix", "position"]
        loss, keys = (tree["loss"]["type"], own) if len(parents) == 1 else (parents[2], ["weight"])
        owners = [name for name, objective in sorted(OBJECTIVES.items()) if key in objective.parameters]
        if owners:
            return f" of the loss {loss} (an option of {', '.join(owners)})"
        return nearest(key, [*keys, *OBJECTIVES[loss].parameters])
    return nearest(key, _keys_at(parents))


def _keys_at(parents: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        if not parent.isdigit():  # an index of a list of sections
            section = _sections(section.model_fields[parent].annotation)[0]
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section classes of a field, which may be a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]
