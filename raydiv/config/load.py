"""From YAML and dotted overrides to a checked recipe; every error at once, each with its path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raydiv.config.loss import TYPES
from raydiv.config.recipe import FRACTION_OR_SOURCES, Recipe
from raydiv.config.source import Source
from raydiv.losses import OBJECTIVES
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest

BUNDLED = Path(__file__).parents[1] / "data" / "bundled"
"""The folder of the recipes that ``extends: bundled:NAME`` names."""


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file (or mapping) after its ``extends`` and the ``section.key=value`` overrides.

    Raises UserError with every unknown key, wrong type and value out of range.
    """
    tree = merged(source, overrides)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            path, message = _explain(problem, tree)
            problems.setdefault(path, []).append(message)
        # a key that may be one of several types has one problem with each
        lines = [
            f"{path}: {' or '.join(messages)}" if path else "; ".join(messages) for path, messages in problems.items()
        ]
        raise UserError(where + "; ".join(lines)) from None


def merged(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe as it is written, with what it ``extends`` and the overrides, unchecked.

    Raises UserError where it cannot be read, or is no mapping.
    """
    tree = dict(source) if isinstance(source, Mapping) else _read(Path(source), seen=())
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = _merge(changes, _parse_override(override))
    return _merge(tree, changes)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with dotted keys at other values, checked as if it had been written so.

    What was never said stays at its default: another ``loss.type`` is not held to the former one's options. The sections
    ``sweep`` and ``study`` are left out. Raises UserError as ``load_recipe`` does.
    """
    tree = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"sweep", "study"})
    wanted: dict[str, Any] = {}
    for key, value in changes.items():
        wanted = _merge(wanted, _nested(key, value))
    return load_recipe(_merge(tree, wanted))


def source_of(words: str) -> Source:
    """A source as the command line has it: its place, or a section such as ``{path: ..., columns: {...}}``.

    Raises UserError where it is neither.
    """
    try:
        return Source.model_validate(yaml.safe_load(words) if words.lstrip().startswith("{") else words)
    except yaml.YAMLError:
        raise UserError(f"{words}: neither a place nor a section in YAML") from None
    except ValidationError as error:
        problems = ("".join(f"{key}: " for key in problem["loc"]) + problem["msg"] for problem in error.errors())
        raise UserError(f"{words}: {'; '.join(problems)}") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; ``load_recipe`` of the file gives it back exactly."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML mapping, merged over the recipe that it ``extends``."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself, through {' -> '.join(p.name for p in (*seen, path))}")
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _merge(_read(_extended(path, str(parent)), (*seen, path.resolve())), tree)


def _extended(path: Path, parent: str) -> Path:
    """The file that ``path`` extends: a path relative to its own, or ``bundled:NAME``. Raises UserError for an unknown name."""
    if not parent.startswith("bundled:"):
        return path.parent / parent
    known = {file.stem: file for file in BUNDLED.glob("*.yaml")}
    name = parent.removeprefix("bundled:")
    if name not in known:
        raise UserError(f"{path}: extends: no bundled recipe {name!r}{nearest(name, known)}")
    return known[name]


def _parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` as {"a": {"b": 1}}; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{text!r}: an override is section.key=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{key}: {value!r} is not a YAML value") from None
    return _nested(key, tree)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key as the tree that it stands in."""
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree  # type: ignore[no-any-return]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on ``base``, mappings merged key by key. Another ``loss.type`` drops the options of the former one."""
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
    """What of a loss section stays meaningful under another loss: ``mix`` and the options that both have."""
    known = OBJECTIVES[loss].parameters if isinstance(loss, str) and loss in OBJECTIVES else {}
    return {key: value for key, value in section.items() if key == "mix" or key in known}


def _explain(problem: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[str, str]:
    """Path and message of one pydantic error."""
    location = _location(problem)
    path = ".".join(location)  # empty where several sections disagree: the message names them
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return path, f"unknown key{_hint(location, tree)}"
    if kind == "missing":
        return path, "missing"
    if kind == "union_tag_not_found":
        return f"{path}.type", f"missing (one of {', '.join(TYPES)})"
    if kind == "union_tag_invalid":
        if context["tag"] in OBJECTIVES:
            return f"{path}.type", f"{context['tag']} is a penalty, which teaches nothing alone; name it under loss.mix"
        return f"{path}.type", f"no loss {context['tag']!r}{nearest(str(context['tag']), TYPES)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    found = "" if isinstance(problem["input"], dict | BaseModel) else f", found {problem['input']!r}"
    return path, message + found


def _location(problem: Mapping[str, Any]) -> list[str]:
    """The recipe's path of a problem, without what pydantic adds: a loss's name (loss.kldo.beta), a type of a union."""
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
        chosen, own = (tree["loss"]["type"], ["type", "mix"]) if len(parents) == 1 else (parents[2], ["weight"])
        owners = [name for name, objective in sorted(OBJECTIVES.items()) if key in objective.parameters]
        if owners:
            return f" of the loss {chosen} (an option of {', '.join(owners)})"
        return nearest(key, [*own, *OBJECTIVES[chosen].parameters])
    return nearest(key, _keys_at(parents))


def _keys_at(parents: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        if not parent.isdigit():  # a place in a list of sections
            section = _sections(section.model_fields[parent].annotation)[0]
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, one or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]
