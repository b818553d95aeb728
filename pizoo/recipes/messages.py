"""What a recipe that cannot be read is refused with: the key, what was found, and what is allowed."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the file, the key, what was found and what is allowed."""


def explain(problem: Mapping[str, Any], model: type[BaseModel], given: Iterable[str] = ()) -> str:
    """One of pydantic's errors about a ``model`` as ``dotted.key: what was found; what is allowed``.

    ``given``: the parts that there are, where a key that stands in the wrong place may belong.
    """
    key, owner = _locate(problem["loc"], model)
    found, context = show(problem["input"]), problem.get("ctx", {})
    kind_key = f"{key}.{context.get('discriminator', '')}".replace("'", "")
    match problem["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"{key}: unknown key; {_place_of(key.rpartition('.')[2], owner, model, set(given))}"
        case "missing":
            return f"{key}: missing; must be given"
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            return f"{key}.{message}" if key else message
        case "union_tag_invalid":
            return f"{kind_key}: found {context['tag']!r}; must be one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{kind_key}: missing; must be given"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key or 'recipe'}: found {found}; must be a mapping"
    must = re.sub(r"^\w+ should", "must", problem["msg"]).replace("valid tuple", "list")
    return f"{key}: found {found}; {must}"


def _locate(loc: tuple[int | str, ...], model: type[BaseModel] | None) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of a pydantic location in a model, and the model that its last part was looked up in."""
    keys: list[str] = []
    owner: type[BaseModel] | None = None
    kinds: dict[str, type[BaseModel]] = {}
    for part in loc:
        if part in kinds:  # pydantic names the chosen kind of a union as if it were a key
            model, kinds = kinds[str(part)], {}
            continue
        keys.append(str(part))
        owner, field = model, model.model_fields.get(str(part)) if model else None
        models = _models(field.annotation) if field else []
        model = models[0] if len(models) == 1 else None
        kinds = {_kind(choice): choice for choice in models} if len(models) > 1 else {}
    return ".".join(keys), owner


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _kind(model: type[BaseModel]) -> str:
    field = model.model_fields.get("kind") or model.model_fields["name"]
    return typing.get_args(field.annotation)[0]


def _place_of(name: str, owner: type[BaseModel] | None, model: type[BaseModel], given: set[str]) -> str:
    """What to write for a key that ``owner``, a part of ``model``, has not: one of its own, or the same in another part."""
    own = owner.model_fields if owner else ()
    elsewhere = [path for path in _paths(model) if path.rpartition(".")[2] == name and path.partition(".")[0] in given]
    if elsewhere and not _near(name, own):
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return nearest(name, own)


def _paths(model: type[BaseModel]) -> list[str]:
    """Dotted keys of everything in a model, the shallow ones first."""
    paths: dict[str, None] = dict.fromkeys(model.model_fields)
    for name, field in model.model_fields.items():
        paths |= {f"{name}.{path}": None for part in _models(field.annotation) for path in _paths(part)}
    return list(paths)


def nearest(name: Any, allowed: Iterable[str]) -> str:
    near = _near(name, allowed)
    return (f"did you mean {near[0]!r}? " if near else "") + f"allowed: {', '.join(sorted(allowed))}"


def is_nearest(name: Any, wanted: str, others: Iterable[str]) -> bool:
    """Whether a name that is none of ``others`` is ``wanted`` misspelt, rather than one of them."""
    return name not in others and _near(name, [wanted, *others]) == [wanted]


def nearest_entry(name: Any, entries: Iterable[str]) -> str:
    """Of names too many to list: the nearest, or what lists them."""
    near = _near(name, entries)
    return f"did you mean {near[0]!r}?" if near else "`pizoo list` shows the entries"


def _near(name: Any, allowed: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(allowed), n=1) if isinstance(name, str) else []


def show(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
