"""The entries of the zoo: list, load, and the names timm and torch.hub know them by.

Everything is read from the cards' ``config.json``, plain JSON: listing and loading need neither the recipes nor what reads
them. A card stands in ``model_cards/<entry>/`` of the clone, or inside the installed package. Weights are looked for at an
explicit path, then beside the card, then, where a namespace of the Hub is set (``$PIZOO_HUB``), on the Hub.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from pizoo import checkpoint, hub
from pizoo.config import CONFIG, build, read_config
from pizoo.data import ASSETS, IMAGENET32, Normalize, dataset_path, load_dataset
from pizoo.files import CheckpointError
from pizoo.memory import choose_device
from pizoo.models import InfPiMLP, KernelLearner, KernelRegressor, PiNet
from pizoo.rows import check_place

log = logging.getLogger("pizoo")

PACKAGE = Path(__file__).parent
TUNED = "tuned"  # in a kernel entry's card, the one with settings chosen on held-out training images


class UnknownEntryError(ValueError):
    """No entry of that name; the message offers the nearest."""


class WeightsNotFoundError(CheckpointError):
    """An entry whose weights are not here; the message says where they were looked for and how to get them."""


@cache
def cards_dir() -> Path:
    """Folder of the model cards: at the top of a clone, inside an installed package."""
    clone = PACKAGE.parent / "model_cards"
    return clone if (PACKAGE.parent / "recipes" / "common").is_dir() else PACKAGE / "_model_cards"


def list_entries(pattern: str = "*") -> list[str]:
    """Names of the zoo's entries that match a glob pattern, sorted; with a slash in it, of their tuned ones: ``*/tuned``."""
    folders = (config.parent for config in cards_dir().glob(f"*/{TUNED if '/' in pattern else ''}/{CONFIG}"))
    names = sorted(folder.relative_to(cards_dir()).as_posix() for folder in folders)
    return [name for name in names if fnmatchcase(name, pattern)]


def card(entry: str) -> Path:
    """The folder of an entry's card.

    Raises:
        UnknownEntryError: no such entry; offers the nearest.
    """
    if entry not in list_entries(entry):
        raise unknown(entry)
    return cards_dir() / entry


def unknown(entry: str | os.PathLike) -> UnknownEntryError:
    """The error for what is no entry's name (or pattern) and no folder; it offers the nearest name, or what patterns match."""
    name = os.fspath(entry)
    if "/" not in name and set(name) & set("*?["):
        families = list(dict.fromkeys(f"{known.partition('_')[0]}_*" for known in list_entries()))
        near = difflib.get_close_matches(name, families, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return UnknownEntryError(f"no entry matches {name!r}; {hint}there are {', '.join(families)}")
    near = difflib.get_close_matches(name, list_entries(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`pizoo list`, or pizoo.list_entries(), gives their names"
    if name in _entries_by_timm_name:
        hint = f"timm calls {_entries_by_timm_name[name]!r} so"
    if not isinstance(entry, str) or Path(name).name != name:
        return UnknownEntryError(f"{name!r} is neither an entry nor a folder; {hint}")
    return UnknownEntryError(f"no entry is called {name!r}; {hint}")


def folder_of(entry: str | os.PathLike) -> Path:
    """Where an entry's card, or the checkpoint at a path, is. Names are plain words; any other folder is a path.

    Raises:
        UnknownEntryError: neither an entry nor a folder.
    """
    if isinstance(entry, str) and entry in list_entries(entry):
        return card(entry)
    if not Path(entry).is_dir():
        raise unknown(entry)
    return Path(entry)


def locate(
    entry: str | os.PathLike,
    revision: str | None = None,
    weights: bool = True,
    epoch: int | None = None,
    records: bool = False,
    **fetching: Any,
) -> Path:
    """The folder of an entry or checkpoint, fetched from the Hub if that is where it is; the log says which it was.

    Args:
        entry: what :func:`load` takes.
        revision: on the Hub.
        weights: False: its ``config.json`` is enough.
        epoch, records: of what is on the Hub, what to fetch (:func:`pizoo.hub.fetch`).
        fetching: and how: :data:`pizoo.hub.OPTIONS`.

    Raises:
        UnknownEntryError: neither an entry nor a folder.
        HubError: the Hub does not give it.
        ValueError: a revision of what is not on the Hub.
        TypeError: other options.
    """
    hub.check_options(fetching)
    if hub.is_address(entry):
        address = hub.Address.parse(entry, revision)
    else:
        folder = folder_of(entry)
        card_of = _entry_of(folder)
        address = hub.default_address(card_of) if card_of else None
        if revision is not None and address is None:
            raise ValueError(f"revision is {revision!r}; {entry} is a folder on this machine, which has no revisions")
        if revision is None and (address is None or not weights or (folder / checkpoint.MODEL).is_file()):
            log.info("%s: %s", entry, f"its card, {folder}" if card_of else f"the folder {folder}")
            return folder
        address = address._replace(revision=revision)
    folder = hub.fetch(address, weights, epoch, records, **fetching)
    log.info("%s: the Hub, %s (commit and files in %s)", entry, address, folder)
    return folder


def _entry_of(folder: Path) -> str:
    """The entry that a folder is the card of; empty for other folders."""
    return folder.relative_to(cards_dir()).as_posix() if cards_dir() in folder.parents else ""


def config(entry: str) -> dict[str, Any]:
    """The ``config.json`` of an entry's card: what builds the net, its preprocessing, its recipe."""
    return read_config(card(entry))


def has_weights(entry: str) -> bool:
    """Whether an entry's weights are here."""
    return (card(entry) / checkpoint.MODEL).is_file()


def check_weights(folder: Path) -> None:
    """Raise WeightsNotFoundError for the folder of a card without weights."""
    if folder.parent == cards_dir() and not (folder / checkpoint.MODEL).is_file():
        if read_config(folder)["recipe"]["data"]["name"] == IMAGENET32:
            raise WeightsNotFoundError(_none_exist(folder.name))
        raise WeightsNotFoundError(
            f"the weights of {folder.name!r} are not in {folder}; train them with `pizoo train {folder.name}`, then load "
            f"(or verify) the folder that it writes, or load the net untrained with pretrained=False; where somebody has "
            f"published it, set {hub.NAMESPACE} to whose it is on the Hub"
        )


def counted(rows: Mapping[str, int]) -> str:
    """Rows of growing layers as a reader counts them: ``22,292 + 11,146``."""
    return " + ".join(f"{count:,}" for count in rows.values())


def _compact_of(config: dict[str, Any]) -> str:
    """What the log says of a compact net: that it is one, and of what; nothing of other nets."""
    if (compacted := config["pizoo"].get("compacted")) is None:
        return ""
    rows, full = (counted(compacted[key]) for key in ("rows", "full_rows"))
    scores = [compacted.get(key) for key in ("accuracy", "full_accuracy")]
    tasks = config.get("recipe", {}).get("tasks")
    part = f"tasks of {tasks['headline']} classes" if tasks else "the test set"
    scored = "" if None in scores else f", {scores[0]:.2f} % on {part}, the full net {scores[1]:.2f} %"
    return f": a compact net, {rows} rows for the full net's {full}{scored}"


def load(
    entry: str | os.PathLike,
    pretrained: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    epoch: int | None = None,
    rows_on: str = "auto",
    **fetching: Any,
) -> PiNet | KernelRegressor | KernelLearner:
    """Load an entry of the zoo, or a checkpoint from a folder or from the Hub.

    Args:
        entry: a name (:func:`list_entries`), the path of a folder that holds a checkpoint, finished or in training, or where
            one is on the Hub: ``hf-hub:OWNER/NAME``, ``hf-hub:OWNER/NAME/FOLDER``, ``hf-hub:OWNER/NAME@REVISION``.
        pretrained: with its weights; False: freshly initialised.
        device: where to, cpu or cuda; None: the CPU.
        dtype: of parameters and rows; None: float32, rows as stored.
        revision: branch, tag or commit on the Hub; cards and folders on this machine have one state: None.
        epoch: of a training checkpoint, the epoch to load; None: the one its training chose, else the last.
        rows_on: where the rows of an infinite net are kept, now and when it is moved: "device", "host" (they stream to the
            device in every pass), or "auto": on the host, with a warning, if they do not fit a GPU.
        fetching: of what is fetched from the Hub: ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Returns:
        the net in eval mode. ``config`` is its ``config.json``. A kernel regressor needs its training images before it
        predicts (``attach``); where those ship with the package, it has them.

    Raises:
        ValueError: a device that is neither the CPU nor a CUDA device; without a GPU, the CPU is taken with a warning.
        UnknownEntryError: neither an entry nor a folder.
        WeightsNotFoundError: its weights are not here.
        HubError: the Hub does not have it, or cannot be reached.
        CheckpointError: a checkpoint that is damaged or not what it claims.
        NotEnoughMemory: rows that fit neither the device nor the host.
    """
    device = None if device is None else choose_device(device)
    folder = locate(entry, revision, pretrained, epoch, **fetching)
    if not pretrained:
        found = read_config(folder)
        model = build(found["pizoo"], device, dtype).eval()
        check_place(rows_on, "auto")
        if isinstance(model, InfPiMLP) and rows_on != "auto":
            model.keep_rows_on(rows_on)
    else:
        check_weights(folder)
        model, found = checkpoint.load(folder, epoch, device, dtype, rows_on)
        log.info("loaded %s from %s%s", entry, folder, _compact_of(found))
        if isinstance(model, KernelRegressor):
            _attach_shipped(model, found)
    model.config = found
    model.pretrained_cfg = found.get("pretrained_cfg")
    model.input_size = _input_size(found, model.d_in)
    return model


def _input_size(config: Mapping[str, Any], d_in: int) -> tuple[int, ...] | None:
    """The size [C, H, W] of the images that a net with ``d_in`` inputs takes; None: it takes vectors, or nothing says."""
    recipe = config.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    size = data.get("input_size") if isinstance(data, dict) else None
    fits = isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size) and math.prod(size) == d_in
    return tuple(size) if fits else None


def stand_in(entry: str) -> str:
    """Of an entry whose data may not be handed on: the one that its recipe trains on data that may."""
    return f"tiny{entry}"


def stood_in_for(entry: str) -> str:
    """Of such a stand-in the entry it stands in for, of all others themselves."""
    return entry.removeprefix("tiny")


def _none_exist(entry: str) -> str:
    return (
        f"no weights of {entry!r} exist: its data set may not be handed on. Train them from its official files with `pizoo "
        f"train {entry}`, convert a checkpoint of the paper's own code, take {stand_in(entry)!r}, which is trained on free "
        "data by the same recipe, or load the net untrained with pretrained=False"
    )


def recipe_of(config: dict[str, Any], entry: Any = None) -> dict[str, Any]:
    """The recipe in a net's ``config.json``.

    Args:
        entry: whose it is, for the message.

    Raises:
        CheckpointError: there is none.
    """
    if "recipe" not in config:
        named = "this checkpoint" if entry is None or isinstance(entry, nn.Module) else entry
        raise CheckpointError(
            f"{named} records no data and no preprocessing: save_pretrained or push_to_hub wrote it, of a net without a "
            "recipe. The net itself loads with pizoo.load, and takes inputs as they are"
        )
    return config["recipe"]


def preprocessing(config: dict[str, Any]) -> Normalize:
    """What turns raw inputs into the net's, as its ``config.json`` says; CheckpointError if it does not."""
    data = recipe_of(config)["data"]
    as_tuple = {key: None if data[key] is None else tuple(data[key]) for key in ("mean", "std")}
    return Normalize(data["scale"], **as_tuple)


def dataset(config: dict[str, Any], data_dir: str | os.PathLike | None = None):
    """The :class:`pizoo.data.Dataset` that a net's ``config.json`` says it was trained on; CheckpointError if it does not."""
    data = recipe_of(config)["data"]
    return load_dataset(
        data["name"],
        data_dir=data_dir,
        path=data.get("path"),
        split=data["split"],
        subset=data["subset"],
        input_size=tuple(data["input_size"]),
        classes=data["classes"],
        keep=data.get("keep"),
    )


def _attach_shipped(model: KernelRegressor, config: dict[str, Any]) -> None:
    """Give a regressor its training images if they ship with the package."""
    data = config["recipe"]["data"]
    if data.get("path") is None and dataset_path(data["name"]).is_relative_to(ASSETS):
        try:
            model.attach(preprocessing(config)(dataset(config).train_x, torch.float64))
        except ValueError as error:
            raise CheckpointError(
                f"the net was fitted to other training images than {data['name']!r} has: {error}"
            ) from None


# ---------------------------------------------------------------------------------------------------- timm, torch.hub

default_cfgs: dict[str, Any] = {}  # timm looks here, in the module of the functions it registers
_entries_by_timm_name: dict[str, str] = {}


def _register_with_timm() -> None:
    """Register every network as ``ARCHITECTURE.TAG``, the tag being the data set: ``infpi_mlp_r400.cifar10``."""
    tags: dict[str, dict[str, str]] = {}
    cfgs = {}
    for entry in list_entries():
        try:
            found = config(entry)
        except CheckpointError as error:  # one damaged card must not take the package down with it
            log.warning("%s is not registered with timm: %s", entry, error)
            continue
        architecture = found.get("architecture")
        if architecture is None:  # kernel regressors are no timm models
            continue
        cfg = dict(found["pretrained_cfg"])
        if has_weights(entry):
            cfg["file"] = str(card(entry) / checkpoint.MODEL)
        tags.setdefault(architecture, {})[cfg["tag"]] = entry
        _entries_by_timm_name[f"{architecture}.{cfg['tag']}"] = entry
        cfgs[f"{architecture}.{cfg['tag']}"] = {key: value for key, value in cfg.items() if key != "tag"}
    default_cfgs.update(generate_default_cfgs(cfgs))
    for architecture, entries in tags.items():
        register_model(_timm_entrypoint(architecture, entries))


def _timm_entrypoint(architecture: str, entries: dict[str, str]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, pretrained_cfg=None, num_classes: int | None = None, **kwargs) -> nn.Module:
        given = {key for key, value in kwargs.items() if value is not None} - {"pretrained_cfg_overlay", "cache_dir"}
        if given:
            raise TypeError(f"{architecture} takes pretrained and num_classes; got {', '.join(sorted(given))}")
        model = load(_timm_entry(architecture, entries, pretrained_cfg), pretrained, cache_dir=kwargs.get("cache_dir"))
        if num_classes is not None and num_classes != model.num_classes:
            model.reset_classifier(num_classes)
        return model

    create.__name__ = create.__qualname__ = architecture
    create.__doc__ = f"{architecture}: {', '.join(entries.values())}."
    return create


def _timm_entry(architecture: str, entries: dict[str, str], pretrained_cfg: Any) -> str:
    """What to load where timm was given a tag, ``hf-hub:OWNER/NAME`` or ``local-dir:PATH``."""
    if isinstance(pretrained_cfg, Mapping) and "source" in pretrained_cfg:
        if pretrained_cfg["source"] == "hf-hub":
            return hub.PREFIX + pretrained_cfg["hf_hub_id"]
        return pretrained_cfg["file"]
    tag = getattr(pretrained_cfg, "tag", pretrained_cfg) or next(iter(entries))
    if tag not in entries:
        raise UnknownEntryError(f"{architecture} has the tags {', '.join(entries)}; got {tag!r}")
    return entries[tag]


def hub_entrypoint(entry: str) -> Callable[..., nn.Module]:
    """A torch.hub entry point that loads ``entry``."""

    def load_entry(pretrained: bool = True, device=None, dtype=None, revision: str | None = None) -> nn.Module:
        return load(entry, pretrained, device, dtype, revision)

    recipe = config(entry)["recipe"]
    data, published = recipe["data"], recipe["published"]
    told = [
        f"{recipe['description']}: inputs [B, {', '.join(map(str, data['input_size']))}], {data['classes']} classes.",
        *([f"Published accuracy: {published['accuracy']:.2f} % ({published['source']})."] if published else []),
        "With weights in this clone."
        if has_weights(entry)
        else f"No weights in this clone: see `pizoo train {entry}`.",
        "",
        "pretrained: with trained weights, else freshly initialised: that needs no files and no network",
        "device, dtype: as for pizoo.load",
        f"revision: of its repository on the Hub, where ${hub.NAMESPACE} says whose that is",
    ]
    load_entry.__name__ = load_entry.__qualname__ = entry
    load_entry.__doc__ = "\n    ".join(told) + "\n"
    return load_entry


_register_with_timm()
