"""From YAML and dotted overrides to a checked recipe; every error at once, each with its path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raydiv.config.recipe import Recipe
from raydiv.errors import UserError
from raydiv.losses import OBJECTIVES


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file (or mapping) after its ``extends`` and the ``section.key=value`` overrides.

    Raises UserError with every unknown key, wrong type and value out of range.
    """
    tree = dict(source) if isinstance(source, Mapping) else _read(Path(source), seen=())
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        problems = [_explain(problem, tree) for problem in error.errors()]
        raise UserError(where + "; ".join(problems)) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; ``load_recipe`` of the file gives it back exactly."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML mapping, merged over the file that it ``extends`` (relative to itself)."""
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
    return _merge(_read(path.parent / str(parent), (*seen, path.resolve())), tree)


def _parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` as {"a": {"b": 1}}; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{text!r}: an override is section.key=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{key}: {value!r} is not a YAML value") from None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree  # type: ignore[no-any-return]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on ``base``, mappings merged key by key. Another ``loss.type`` drops the options of the former one."""
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            if key == "loss" and value.get("type", before.get("type")) != before.get("type"):
                before = _options_of(value["type"], before)
            merged[key] = _merge(before, value)
        else:
            merged[key] = value
    return merged


def _options_of(loss: Any, section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a loss section stays meaningful under another loss: ``mix`` and the options that both have."""
    known = OBJECTIVES[loss].parameters if loss in OBJECTIVES else {}
    return {key: value for key, value in section.items() if key == "mix" or key in known}


def _explain(problem: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    # pydantic puts the chosen loss's name into the path: loss.kldo.beta
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["loss"] and len(location) > 1 and location[1] in OBJECTIVES:
        del location[1]
    path = ".".join(location) or "recipe"
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_hint(location, tree)}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "union_tag_not_found":
        return f"{path}.type: missing (one of {', '.join(sorted(OBJECTIVES))})"
    if kind == "union_tag_invalid":
        return f"{path}.type: no loss {context['tag']!r}{_nearest(str(context['tag']), OBJECTIVES)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path}: {message}" + (
        "" if isinstance(problem["input"], dict | BaseModel) else f", found {problem['input']!r}"
    )


def _hint(location: list[str], tree: Mapping[str, Any]) -> str:
    """The nearest known key, or the losses that have the option."""
    *parents, key = location
    if parents == ["loss"]:
        chosen = tree["loss"]["type"]
        owners = [name for name, objective in OBJECTIVES.items() if key in objective.parameters]
        if owners:
            return f" of loss.type {chosen} (an option of {', '.join(owners)})"
        return _nearest(key, ["type", "mix", *OBJECTIVES[chosen].parameters])
    if parents == ["loss", "mix"]:
        return _nearest(key, OBJECTIVES)
    if parents[:2] == ["loss", "mix"]:
        return _nearest(key, ["weight", *OBJECTIVES[parents[2]].parameters])
    return _nearest(key, _keys_at(parents))


def _keys_at(parents: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        candidates = getattr(annotation, "__args__", (annotation,))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def _nearest(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"
