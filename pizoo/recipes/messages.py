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


def explain(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One of pydantic's errors about a ``model`` as ``dotted.key: what was found; what is allowed``."""
    key, owner = _locate(problem["loc"], model)
    found, context = show(problem["input"]), problem.get("ctx", {})
    kind_key = f"{key}.{context.get('discriminator', '')}".replace("'", "")
    match problem["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"{key}: unknown key; {nearest(key.rpartition('.')[2], owner.model_fields if owner else ())}"
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


def nearest(name: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(allowed), n=1) if isinstance(name, str) else []
    return (f"did you mean {near[0]!r}? " if near else "") + f"allowed: {', '.join(sorted(allowed))}"


def show(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
