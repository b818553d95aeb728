"""Reading recipes: one YAML file per zoo entry, merged into what it extends.

A file states only what differs from the part it ``extends``: a common part (``common/NAME.yaml``), an entry, or a file
beside it (``NAME.yaml``). Mappings are merged key by key, anything else replaces; a mapping that names another
``model.kind`` or ``train.schedule.name`` replaces too, since the keys of the old kind mean nothing to the new one. What
makes an entry that entry (its name, description and published number, why its own differs, what that number is over, how near
is near enough, how it was tuned) is not passed on to what extends it. Without a description of its own, a recipe that extends
an entry's is described as that.

An override, ``train.epochs=1``, is one more such mapping, merged last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

import pizoo
from pizoo.recipes.messages import RecipeError, is_nearest, nearest_entry, show
from pizoo.recipes.recipe import ENTRYS_OWN, Recipe, decisive

EXTENDS = "extends"


def list_recipes() -> list[str]:
    """Names of the zoo's entries that have a recipe, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load_recipe(entry_or_path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe of a zoo entry, or a file of one's own.

    Args:
        entry_or_path: an entry's name, or a path (anything with a separator or ending in ``.yaml`` or ``.yml``).
        overrides: ``"train.epochs=1"``: dotted key, ``=``, value in YAML; applied in order before validation. The published
            number is then no longer the recipe's, unless these leave it as it is but for seeds, or give a number themselves.

    Raises:
        FileNotFoundError: no file at that path.
        RecipeError: a folder; an unknown entry or key, a wrong type, an impossible value.
    """
    text = os.fspath(entry_or_path)
    if isinstance(entry_or_path, os.PathLike) or Path(text).suffix in (".yaml", ".yml") or Path(text).name != text:
        path = Path(text).expanduser()
        _check_file(path)
    else:
        path = _named(text, {entry: recipes_dir() / f"{entry}.yaml" for entry in list_recipes()}, "no recipe is called")
    raw = read = _read(path)
    source, given = str(path), set()
    for override in overrides:
        parsed = _parse_override(override)
        raw = _merge(raw, parsed)
        source, given = f"{source} with {override}", given | parsed.keys()
    if _made_by(raw) != _made_by(read):
        raw = {key: value for key, value in raw.items() if key not in {"published", "differs", "cost"} - given}
    return Recipe.from_dict(raw, source)


def _made_by(raw: dict[str, Any]) -> dict[str, Any]:
    """What decides which net a recipe makes, but for chance; not what it is called."""
    made = {**decisive(raw), "entry": None}
    if isinstance(made.get("train"), dict):
        made["train"] = {key: value for key, value in made["train"].items() if key != "seed"}
    return made


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise RecipeError(
            f"{path} is a folder; a recipe is an entry's name or a .yaml file. A training in a folder goes on with the command "
            f"that began it, --out {path}"
        )
    if not path.exists():
        raise FileNotFoundError(f"there is no recipe {path}; {nearest_entry(path.stem, list_recipes())}")


def recipes_dir() -> Path:
    """Folder of the zoo's recipes: at the top of a clone, inside an installed package."""
    package = Path(pizoo.__file__).parent
    clone = package.parent / "recipes"
    # Next to an installed package there may be a folder of that name that is another package's.
    return clone if (clone / "common").is_dir() else package / "_recipes"


class _Loader(yaml.SafeLoader):
    """``yaml.safe_load`` that refuses duplicate keys and reads ``1e-4`` as the number it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(stream: Any, source: str) -> Any:
    try:
        # _Loader is a SafeLoader: it makes plain values only.
        return yaml.load(stream, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, an impossible date
        raise RecipeError(f"{source} is not readable as YAML: {error}") from error


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: must be KEY=VALUE with a dotted key, as in train.epochs=1")
    value = _parse(text, f"override {override!r}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file merged into all that it extends."""
    path = path.resolve()
    if path in chain:
        raise RecipeError(f"{' extends '.join(map(str, (*chain, path)))}: a circle")
    with open(path, encoding="utf-8") as file:
        raw = _parse(file, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: found {show(raw)}; must be a mapping of a recipe's keys")
    for key in raw:  # of what it would have been extended from, all would be missing
        if EXTENDS not in raw and is_nearest(key, EXTENDS, Recipe.model_fields):
            raise RecipeError(f"{path}: {key}: unknown key; did you mean {EXTENDS!r}?")
    base = raw.pop(EXTENDS, None)
    if base is None:
        return raw
    common = {file.stem: file for file in (recipes_dir() / "common").glob("*.yaml")}
    if isinstance(base, str) and base.endswith(".yaml"):
        parent_path = path.parent / base
        if not parent_path.is_file():
            raise RecipeError(f"{path}: extends: found {base!r}; there is no file {parent_path}")
    else:
        entries = {entry: recipes_dir() / f"{entry}.yaml" for entry in list_recipes()}
        parent_path = _named(base, entries | common, f"{path}: extends: no recipe or common part is called")
    parent = _read(parent_path, (*chain, path))
    if parent_path not in common.values():
        described = {"description": f"After the recipe {base}"} if "description" in parent else {}
        parent = described | {key: value for key, value in parent.items() if key not in ENTRYS_OWN}
    return _merge(parent, raw)


def _named(name: Any, known: Mapping[str, Path], complaint: str) -> Path:
    if isinstance(name, str) and name in known:
        return known[name]
    raise RecipeError(f"{complaint} {show(name)}; {nearest_entry(name, known)}")


_KIND_KEYS = {("model",): "kind", ("train", "schedule"): "name"}


def _merge(base: Any, over: Any, where: tuple[str, ...] = ()) -> Any:
    """``over`` laid over ``base``; the module's docstring says how."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    kind = _KIND_KEYS.get(where)
    if kind in base and kind in over and base[kind] != over[kind]:
        return over
    merged = base | {key: _merge(base[key], value, (*where, key)) for key, value in over.items() if key in base}
    return merged | {key: value for key, value in over.items() if key not in base}
