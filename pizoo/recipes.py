"""Recipes: one YAML file per zoo entry, read into validated, frozen objects; the only place that knows their fields.

A file states only what differs from the part it ``extends``: a common part (``common/NAME.yaml``), an entry, or a file
beside it (``NAME.yaml``). Mappings are merged key by key, anything else replaces; a mapping that names another
``model.kind`` or ``train.schedule.name`` replaces too, since the keys of the old kind mean nothing to the new one. What
makes an entry that entry (its name, description and published number, why its own differs, what that number is over, how near
is near enough, how it was tuned) is not passed on to what extends it.

An override, ``train.epochs=1``, is one more such mapping, merged last.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_serializer, model_validator

import pizoo
from pizoo.data import (
    DIGITS_SPLITS,
    Dataset,
    Normalize,
    TaskPool,
    TransferData,
    list_datasets,
    load_dataset,
    load_tasks,
)
from pizoo.models import (
    FinPiMLP,
    InfPiMLP,
    KernelLearner,
    KernelRegressor,
    MuMLP,
    NNGPLearner,
    NNGPRegressor,
    NTKLearner,
    NTKRegressor,
    PiNet,
)

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
# YAML and JSON have lists only.
Counts = Annotated[tuple[Count, ...], Strict(False)]


ENTRYS_OWN = ("entry", "description", "published", "differs", "seeds", "tolerance", "tune", "compact")
NETWORKS = {"infpi": InfPiMLP, "finpi": FinPiMLP, "mu": MuMLP}
KERNELS = {"nngp": NNGPRegressor, "ntk": NTKRegressor}
KERNEL_LEARNERS = {"nngp": NNGPLearner, "ntk": NTKLearner}


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the file, the key, what was found and what is allowed."""


class _Part(BaseModel):
    """A mapping of a recipe. Checks across fields raise ``ValueError("field: found ...; must ...")``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    only_if_given: ClassVar[tuple[str, ...]] = ()  # what most recipes lack: left out of a description that lacks it

    @model_serializer(mode="wrap")
    def _describe(self, handler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if v is not None or k not in self.only_if_given}


class _Net(_Part):
    """What the three kinds of nets share; see :class:`pizoo.models.InfPiMLP`."""

    hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 2
    bias_alpha: NonNegative = 1.0
    last_bias_alpha: NonNegative | None = None  # None: as bias_alpha
    first_layer_alpha: Positive = 1.0
    last_layer_alpha: Positive = 1.0
    readout_zero_init: bool = False


class InfPi(_Net):
    """Infinite π-net with r-dimensional probability space."""

    kind: Literal["infpi"]
    r: Count
    layernorm: bool = False


class FinPi(_Net):
    """Finite π-net: ``width`` units sampled from an infinite one, trained with projected gradients."""

    kind: Literal["finpi"]
    width: Count
    r: Count

    @model_validator(mode="after")
    def _check(self) -> FinPi:
        if self.width < self.r:
            raise ValueError(f"width: found {self.width}; must be at least r, {self.r}, for gradients to be projected")
        return self


class Mu(_Net):
    """Finite net in μ-parametrisation, the baseline."""

    kind: Literal["mu"]
    width: Count
    # What the initial weights of the first layers are multiplied by, from the input on.
    initial_scales: Annotated[tuple[Positive, ...], Strict(False)] | None = None
    only_if_given: ClassVar[tuple[str, ...]] = ("initial_scales",)

    @model_validator(mode="after")
    def _check(self) -> Mu:
        if self.initial_scales is not None and len(self.initial_scales) > self.hidden_layers + 1:
            raise ValueError(
                f"initial_scales: found {list(self.initial_scales)}; must be at most one for each of {self.hidden_layers + 1} "
                "layers"
            )
        return self


class NNGP(_Part):
    """The NNGP kernel, for ridge regression or few-shot learning; see :func:`pizoo.functional.nngp`."""

    kind: Literal["nngp"]
    depth: Annotated[int, Field(ge=1, le=1000)]
    var_w: Positive = 1.0
    var_b: NonNegative = 0.0
    ridge: Positive | None = None  # None: few-shot learning has none
    only_if_given: ClassVar[tuple[str, ...]] = ("ridge",)


class NTK(_Part):
    """The neural tangent kernel, for ridge regression or few-shot learning; see :func:`pizoo.functional.ntk`."""

    kind: Literal["ntk"]
    depth: Annotated[int, Field(ge=1, le=1000)]
    var_w: Positive = 1.0
    var_b: NonNegative = 0.0
    first_layer_lr_mult: NonNegative = 1.0
    last_layer_lr_mult: NonNegative = 1.0
    bias_lr_mult: NonNegative = 1.0
    ridge: Positive | None = None
    only_if_given: ClassVar[tuple[str, ...]] = ("ridge",)


class Data(_Part):
    """The data set and what is done to its pixels: ``(x / scale - mean) / std`` per channel."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    path: Annotated[str, Field(min_length=1)] | None = None  # the user's own .npz or image folder
    classes: Annotated[int, Field(ge=2, le=65536)]  # of a few-shot task: its ways
    input_size: Annotated[Counts, Field(min_length=1, max_length=3)]  # [C, H, W] or [d]
    scale: Positive = 255.0
    mean: Annotated[tuple[float, ...], Strict(False)] | None = None
    std: Annotated[tuple[Positive, ...], Strict(False)] | None = None
    subset: Count | None = None
    split: Annotated[int, Field(ge=0, lt=DIGITS_SPLITS)] = 0
    # Numbers of the classes to keep, which become 0, 1, ...; None: all, of imagenet32 the paper's 250.
    keep: Annotated[tuple[int, ...], Strict(False)] | None = None
    only_if_given: ClassVar[tuple[str, ...]] = ("keep",)

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.path is None and self.name not in list_datasets():
            raise ValueError(
                f"name: found {self.name!r} without a path; {_nearest(self.name, list_datasets())}, or any name "
                "with a path"
            )
        if self.split and (self.name != "digits" or self.path is not None):
            raise ValueError(f"split: found {self.split}; must be 0, only the digits have other splits")
        if len(self.input_size) == 2:
            raise ValueError(f"input_size: found {list(self.input_size)}; must be [C, H, W] or [d]")
        for key, values, other in (("mean", self.mean, self.std), ("std", self.std, self.mean)):
            if values is None and other is not None:
                raise ValueError(f"{key}: found null; must be given, as mean and std go together")
            if values is not None and len(values) != self.input_size[0]:
                raise ValueError(f"{key}: found {list(values)}; must have one value per channel, {self.input_size[0]}")
        if self.keep is not None and len(self.keep) != self.classes:
            raise ValueError(f"keep: found {len(self.keep)} numbers; must be as many as classes, {self.classes}")
        return self

    @property
    def d(self) -> int:
        """Numbers in one input."""
        return math.prod(self.input_size)

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.scale, self.mean, self.std)

    def load_tasks(self, data_dir: str | os.PathLike | None = None) -> dict[str, TaskPool]:
        """Load the classes of each split to draw tasks from; see :func:`pizoo.data.load_tasks`.

        Raises:
            ValueError: images of another size than ``input_size``.
        """
        pools = load_tasks(self.name, data_dir)
        for pool in pools.values():
            if pool.input_size != self.input_size:
                raise ValueError(
                    f"data.input_size is {list(self.input_size)}; {self.name} has images of {list(pool.input_size)}"
                )
        return pools

    def load(self, data_dir: str | os.PathLike | None = None) -> Dataset:
        """Load the data set this names; see :func:`pizoo.data.load_dataset`."""
        return load_dataset(
            self.name,
            data_dir=data_dir,
            path=self.path,
            split=self.split,
            subset=self.subset,
            input_size=self.input_size,
            classes=self.classes,
            keep=self.keep,
        )


class Clip(_Part):
    """Gradient clipping; with ``follows_schedule`` the threshold drops together with the learning rate."""

    max_norm: Positive | None = None  # None: off
    per_param: bool = False
    follows_schedule: bool = False


class Constant(_Part):
    name: Literal["constant"] = "constant"


class Multistep(_Part):
    """Learning rate times ``gamma`` once each of ``milestones`` (numbers of finished epochs) is reached.

    A milestone the training never reaches is no error, so that a recipe can be run for fewer epochs than it states.
    """

    name: Literal["multistep"]
    milestones: Annotated[Counts, Field(min_length=1)]
    gamma: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _check(self) -> Multistep:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: found {list(self.milestones)}; must be increasing")
        return self


class Cosine(_Part):
    """Learning rate times ``(1 + cos(π t / T)) / 2`` at step t of T."""

    name: Literal["cosine"]


class Train(_Part):
    """Training; defaults are those of :mod:`pizoo.optim`."""

    only_if_given: ClassVar[tuple[str, ...]] = ("steps_per_epoch", "init_from", "freeze")
    epochs: Count
    steps_per_epoch: Count | None = None  # of few-shot training; None: as many as pass over the training images once
    batch_size: Count  # images; in few-shot training tasks
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: NonNegative = 0.0
    first_layer_lr_mult: NonNegative = 1.0
    last_layer_lr_mult: NonNegative = 1.0
    bias_lr_mult: NonNegative = 1.0
    apply_lr_mult_to_wd: bool = True
    clip: Clip = Clip()
    schedule: Annotated[Constant | Multistep | Cosine, Field(discriminator="name")] = Constant()
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    # Of growing rows and finite weights; int8, with a scale per row, is for growing rows alone.
    dtype: Literal["int8", "float16", "bfloat16", "float32", "float64"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # An entry or a checkpoint's folder whose net to go on from, with a fresh read-out; None: from random initial values.
    init_from: Annotated[str, Field(min_length=1)] | None = None
    # Layers that stay as they are, from the input on; None: all are trained.
    freeze: Annotated[tuple[Literal["input", "hidden", "readout"], ...], Field(min_length=1), Strict(False)] | None = (
        None
    )

    @model_validator(mode="after")
    def _check(self) -> Train:
        mults = (self.first_layer_lr_mult, self.last_layer_lr_mult, self.bias_lr_mult)
        mult = max(1.0, *mults) if self.apply_lr_mult_to_wd else 1.0
        if self.lr * self.weight_decay * mult >= 1:
            raise ValueError(
                f"weight_decay: found {self.weight_decay}; lr * weight_decay * multiplier = {self.lr} * "
                f"{self.weight_decay} * {mult} must be below 1, or a step turns the sign of what it decays"
            )
        if self.momentum and self.weight_decay and not self.apply_lr_mult_to_wd and any(m != 1 for m in mults):
            raise ValueError(
                f"apply_lr_mult_to_wd: found false; must be true with momentum {self.momentum}, which applies weight decay "
                "through the velocity, multipliers included"
            )
        if self.freeze is not None and (len(set(self.freeze)) < len(self.freeze) or len(self.freeze) == 3):
            raise ValueError(
                f"freeze: found {list(self.freeze)}; must name one or two of input, hidden, readout, once each"
            )
        return self


class Tasks(_Part):
    """Few-shot learning: what a task is, how a net adapts to it, and on how many tasks its numbers are measured.

    Training and validation classes are rotated, each by 90, 180 and 270 degrees, into four.
    """

    shots: Count = 1  # support images a class
    queries: Count = 1  # query images a class
    step_size: Positive
    steps: Count = 1  # inner steps
    layers: Literal["readout", "all"] = "readout"  # which adapt
    first_order: bool = False
    validation_tasks: Count = 2000  # after every epoch; the epoch that does best is kept
    test_tasks: Annotated[int, Field(ge=2, le=1_000_000)] = (
        8000  # of every split, in the end; two have a standard error
    )
    headline: Literal["validation", "validation_rotated", "test", "test_rotated"] = (
        "test"  # what the entry's number is on
    )

    @model_validator(mode="after")
    def _check(self) -> Tasks:
        if self.layers == "all" and not self.first_order:
            raise ValueError(
                "first_order: found false; must be true with layers all, whose second order no rows can hold"
            )
        return self


class Transfer(_Part):
    """Ridge regression on the kernel of a net's features on another data set; see :mod:`pizoo.evaluation.transfer`.

    Epoch and ridge are chosen on a part of that data set's training images, held out; the published ones stand beside them.
    """

    data: Data
    epoch: Count  # the published number is of, with
    ridge: Positive
    ridges: Annotated[tuple[Positive, ...], Field(min_length=1), Strict(False)]  # to choose from
    epochs: Counts  # to choose from, beside the last
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2  # fraction of the training images to hold out

    def measured_after(self, epoch: int, last: int) -> bool:
        """Whether the choice is also from epoch ``epoch`` of a training of ``last``."""
        return epoch in (*self.epochs, self.epoch, last)


class Tune(_Part):
    """Which settings of a kernel recipe's model to try on held-out training images; see :mod:`pizoo.training.tune`."""

    validation: Annotated[float, Field(gt=0, lt=1)]  # fraction of the training images to hold out
    grid: Annotated[
        dict[str, Annotated[tuple[float | int, ...], Field(min_length=1), Strict(False)]], Field(min_length=1)
    ]

    @property
    def settings(self) -> list[dict[str, float | int]]:
        """Every combination of the grid's values; the last key's values follow one another."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Compact(_Part):
    """How the net that is shipped is made of the one that was trained; see :func:`pizoo.compact`."""

    megabytes: Positive = 25.0  # of 10⁶ bytes: the file's size, at most
    rows: Count | None = None  # of each hidden layer, half as many for the read-out; None: as many as fit
    dtype: Literal["int8", "float16"] = "int8"
    views: Annotated[int, Field(ge=1, le=1000)] = 6  # of each training image


class Published(_Part):
    """A number in print, and how it was measured."""

    accuracy: Annotated[float, Field(ge=0, le=100)]  # percent
    # One run of the paper's own code with this recipe, after the last epoch, in percent; None: not measured.
    rerun: Annotated[float, Field(ge=0, le=100)] | None = None
    source: Annotated[str, Field(min_length=1)]
    protocol: Annotated[str, Field(min_length=1)]


class Tolerance(_Part):
    """Points of accuracy within which a checkpoint is what it claims and a training reproduces the published number."""

    verify: Annotated[float, Field(ge=0, le=100)] = 0.05
    reproduce: Annotated[float, Field(ge=0, le=100)] = 1.0
    reason: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Tolerance:
        if self.reason is None and (self.verify, self.reproduce) != (0.05, 1.0):
            raise ValueError("reason: missing; must be given for tolerances other than verify 0.05, reproduce 1.0")
        return self


class Recipe(_Part):
    """All it takes to make a zoo entry: model, data, training, and the number to compare with."""

    entry: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    description: Annotated[str, Field(min_length=1)]
    model: Annotated[InfPi | FinPi | Mu | NNGP | NTK, Field(discriminator="kind")]
    data: Data
    tasks: Tasks | None = None  # few-shot learning; None: supervised
    train: Train | None = None  # None for the kernels
    transfer: Transfer | None = None  # what its features are measured on
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1  # how many the entry's recorded mean is over: 0, 1, ...
    published: Published | None = None
    differs: Annotated[str, Field(min_length=1)] | None = None  # in what the numbers differ from the published, and why
    tolerance: Tolerance = Tolerance()
    tune: Tune | None = None
    compact: Compact | None = None  # None: what was trained is shipped
    only_if_given: ClassVar[tuple[str, ...]] = ("tasks", "transfer", "compact")

    @model_validator(mode="before")
    @classmethod
    def _check_train(cls, raw: Any) -> Any:
        model = raw.get("model") if isinstance(raw, Mapping) else None
        kind = model.get("kind") if isinstance(model, Mapping) else None
        if kind in ("nngp", "ntk") and raw.get("train") is not None:
            raise ValueError(
                f"train: found {_show(raw['train'])}; must be left out, kernel regressors (model.kind {kind}) "
                "are not trained"
            )
        if kind in ("infpi", "finpi", "mu") and raw.get("train") is None:
            raise ValueError(f"train: missing; must be given for a net (model.kind {kind})")
        return raw

    @model_validator(mode="after")
    def _check_dtype(self) -> Recipe:
        if self.train and self.train.dtype == "int8" and not isinstance(self.model, InfPi):
            raise ValueError(
                f"train.dtype: found 'int8', which is for rows of growing layers; a {self.model.kind} has none"
            )
        return self

    @model_validator(mode="after")
    def _check_compact(self) -> Recipe:
        if self.compact and not isinstance(self.model, InfPi):
            raise ValueError("compact: must be left out, it is for nets of model.kind infpi, whose rows grow")
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> Recipe:
        kernel, supervised = isinstance(self.model, NNGP | NTK), self.tasks is None
        given = {"model.ridge": self.model.ridge if kernel else None}
        given["train.steps_per_epoch"] = self.train.steps_per_epoch if self.train else None
        wanted = {"model.ridge": kernel and supervised, "train.steps_per_epoch": not kernel and not supervised}
        for key, value in given.items():
            if wanted[key] and value is None:
                raise ValueError(f"{key}: missing; must be given {'without' if supervised else 'with'} tasks")
            if not wanted[key] and value is not None:
                raise ValueError(
                    f"{key}: found {_show(value)}; must be left out {'without' if supervised else 'with'} tasks"
                )
        omniglot = self.data.name == "omniglot" and self.data.path is None
        if supervised and omniglot:
            raise ValueError("tasks: missing; must be given for omniglot, which has tasks and no training images")
        if not supervised and not omniglot:
            where = "" if self.data.path is None else " with a path"
            raise ValueError(
                f"data.name: found {self.data.name!r}{where}; must be 'omniglot' without a path, for tasks"
            )
        for key, plain in (("scale", 255.0), ("mean", None), ("subset", None)):
            if not supervised and (found := getattr(self.data, key)) != plain:
                raise ValueError(
                    f"data.{key}: found {_show(found)}; must be left out with tasks, whose pixels lie in [0, 1]"
                )
        if self.train and not supervised and self.train.loss != "cross_entropy":
            raise ValueError(f"train.loss: found {self.train.loss!r}; must be 'cross_entropy' with tasks")
        return self

    @model_validator(mode="after")
    def _check_transfer(self) -> Recipe:
        if self.tasks is not None and self.train and (self.train.init_from or self.train.freeze):
            raise ValueError("train.init_from, train.freeze: must be left out with tasks")
        if self.transfer is None:
            return self
        if self.train is None or self.tasks is not None:
            raise ValueError("transfer: must be left out; it is of a net trained on images")
        if self.transfer.data.input_size != self.data.input_size:
            raise ValueError(
                f"transfer.data.input_size: found {list(self.transfer.data.input_size)}; must be that of the net, "
                f"{list(self.data.input_size)}"
            )
        return self

    @model_validator(mode="after")
    def _check_tune(self) -> Recipe:
        if self.tune is None:
            return self
        model, allowed = self.model.model_dump(), type(self.model).model_fields
        if self.train is not None:
            raise ValueError(f"tune: must be left out, a net (model.kind {self.model.kind}) is trained, not solved")
        if self.tasks is not None:
            raise ValueError("tune: must be left out with tasks, which have no training images to hold out")
        for key, values in self.tune.grid.items():
            if key not in allowed:
                raise ValueError(f"tune.grid.{key}: unknown key; {_nearest(key, allowed)}")
            for value in values:
                try:
                    type(self.model)(**{**model, key: value})
                except ValidationError:
                    raise ValueError(f"tune.grid.{key}: found {value}; model.{key} does not take it") from None
        return self

    @property
    def architecture(self) -> str | None:
        """The timm name, without the tag, of what ``model`` describes; ``None`` for kernel regressors."""
        model = self.model
        match model:
            case InfPi():
                name = f"infpi_mlp_r{model.r}"
            case FinPi():
                name = f"finpi_mlp_w{model.width}_r{model.r}"
            case Mu():
                name = f"mu_mlp_w{model.width}"
            case _:
                return None
        return name if model.hidden_layers == 2 else f"{name}_l{model.hidden_layers}"

    @property
    def hparams(self) -> dict[str, Any]:
        """The arguments that ``model`` and ``data`` give to the model's class."""
        return {**self.model.model_dump(exclude={"kind"}), "d_in": self.data.d, "d_out": self.data.classes}

    @property
    def network(self) -> type[PiNet]:
        """The class of a recipe's net."""
        return NETWORKS[self.model.kind]

    def load_data(self, data_dir: str | os.PathLike | None = None) -> Dataset | TransferData | dict[str, TaskPool]:
        """What it trains on and is measured on: a data set; with ``transfer`` two, with ``tasks`` the classes of each split."""
        if self.tasks is not None:
            return self.data.load_tasks(data_dir)
        source = self.data.load(data_dir)
        return source if self.transfer is None else TransferData(source, self.transfer.data.load(data_dir))

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe run again: another ``train.seed``, and on the digits another split as well."""
        raw = self.to_dict()
        if raw["train"] is not None:
            raw["train"]["seed"] = seed
        if self.data.name == "digits" and self.data.path is None:
            raw["data"]["split"] = seed
        return Recipe.from_dict(raw, f"recipe {self.entry} with seed {seed}")

    def with_model(self, **settings: float | int) -> Recipe:
        """The same recipe with other values in its model part, without what is said of the old ones; nothing left to tune."""
        raw = self.to_dict() | {"differs": None, "tune": None}
        raw["model"] |= settings
        if raw["published"] is not None:
            raw["published"]["rerun"] = None
        return Recipe.from_dict(raw, f"recipe {self.entry} with {settings}")

    def build_model(self, device: torch.device | str | None = None) -> PiNet | KernelRegressor | KernelLearner:
        """The recipe's net with initial values drawn from its seed, the same on every device.

        ``train.dtype`` is of growing rows and finite weights; inputs, biases and ``amult`` of infinite nets are at least
        float32. CPUs compute in float16 and bfloat16 slowly or not at all: finite nets are float32 there.
        """
        hparams = self.hparams
        if self.train is None:
            kernels = KERNELS if self.tasks is None else KERNEL_LEARNERS
            return kernels[self.model.kind](**hparams).to(device)
        dtype = getattr(torch, self.train.dtype)
        full = torch.promote_types(dtype, torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            if isinstance(self.model, InfPi):
                return InfPiMLP(**hparams, dtype=full, rows_dtype=dtype).to(device)
            net = self.network(**hparams, dtype=full)
        return net.to(device, full if torch.device(device or "cpu").type == "cpu" else dtype)

    def config(self, class_names: Sequence[str]) -> dict[str, Any]:
        """What a checkpoint's ``config.json`` says of the recipe, in the form timm and the Hub read."""
        common = {
            "architecture": self.architecture,
            "num_classes": self.data.classes,
            "class_names": list(class_names),
            "recipe": self.to_dict(),
        }
        if self.architecture is None:
            return common
        channels = self.data.input_size[0]
        pretrained_cfg = {
            "tag": self.data.name,
            "input_size": list(self.data.input_size),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "mean": list(self.data.mean or (0.0,) * channels),
            "std": list(self.data.std or (1.0,) * channels),
            "num_classes": self.data.classes,
            "classifier": "output" if isinstance(self.model, InfPi) else f"layers.{self.model.hidden_layers}",
            "license": "mit",
        }
        return {
            **common,
            "num_features": getattr(self.model, "width", None) or self.model.r,
            "pretrained_cfg": pretrained_cfg,
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field, defaults filled in, as plain JSON-able values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """The inverse of :meth:`to_dict`; ``source`` is what messages call it.

        Raises:
            RecipeError: listing every key that is unknown, missing or impossible.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        # A list with a wrong item is also reported as a whole, as if it were shorter: the item says more.
        inner = {problem["loc"][:-1] for problem in problems if len(problem["loc"]) > 1}
        lines = [_explain(problem) for problem in problems if problem["loc"] not in inner]
        raise RecipeError("\n  ".join([f"{source}:", *lines]) if len(lines) > 1 else f"{source}: {lines[0]}")


def decisive(raw: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a recipe as plain values, what decides its training; texts, seeds to come and numbers to compare with do not."""
    return raw and {key: value for key, value in raw.items() if key == "entry" or key not in ENTRYS_OWN}


def list_recipes() -> list[str]:
    """Names of the zoo's entries that have a recipe, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load_recipe(entry_or_path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe of a zoo entry, or a file of one's own.

    Args:
        entry_or_path: an entry's name, or a path (anything with a separator or ending in ``.yaml`` or ``.yml``).
        overrides: ``"train.epochs=1"``: dotted key, ``=``, value in YAML; applied in order before validation.

    Raises:
        FileNotFoundError: no file at that path.
        RecipeError: an unknown entry or key, a wrong type, an impossible value.
    """
    text = os.fspath(entry_or_path)
    if isinstance(entry_or_path, os.PathLike) or Path(text).suffix in (".yaml", ".yml") or Path(text).name != text:
        path = Path(text).expanduser()
    else:
        path = _named(text, {entry: recipes_dir() / f"{entry}.yaml" for entry in list_recipes()}, "no recipe is called")
    raw = _read(path)
    source = str(path)
    for override in overrides:
        raw = _merge(raw, _parse_override(override))
        source += f" with {override}"
    return Recipe.from_dict(raw, source)


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
        raise RecipeError(f"{path}: found {_show(raw)}; must be a mapping of a recipe's keys")
    base = raw.pop("extends", None)
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
        parent = {key: value for key, value in parent.items() if key not in ENTRYS_OWN}
    return _merge(parent, raw)


def _named(name: Any, known: Mapping[str, Path], complaint: str) -> Path:
    if isinstance(name, str) and name in known:
        return known[name]
    raise RecipeError(f"{complaint} {_show(name)}; {_nearest(name, known)}")


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


def _explain(problem: Mapping[str, Any]) -> str:
    """One of pydantic's errors as ``dotted.key: what was found; what is allowed``."""
    key, owner = _locate(problem["loc"])
    found, context = _show(problem["input"]), problem.get("ctx", {})
    kind_key = f"{key}.{context.get('discriminator', '')}".replace("'", "")
    match problem["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"{key}: unknown key; {_nearest(key.rpartition('.')[2], owner.model_fields if owner else ())}"
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


def _locate(loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of a pydantic location, and the model that its last part was looked up in."""
    keys: list[str] = []
    owner: type[BaseModel] | None = None
    model: type[BaseModel] | None = Recipe
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


def _nearest(name: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(allowed), n=1) if isinstance(name, str) else []
    return (f"did you mean {near[0]!r}? " if near else "") + f"allowed: {', '.join(sorted(allowed))}"


def _show(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
