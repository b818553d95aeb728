"""The parts of a recipe: model, data, training and the rest, each a validated, frozen object with its defaults."""

from __future__ import annotations

import itertools
import math
import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_serializer, model_validator

from pizoo.data import DIGITS_SPLITS, Dataset, Normalize, TaskPool, list_datasets, load_dataset, load_tasks
from pizoo.recipes.messages import nearest

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
# YAML and JSON have lists only.
Counts = Annotated[tuple[Count, ...], Strict(False)]


class Part(BaseModel):
    """A mapping of a recipe. Checks across fields raise ``ValueError("field: found ...; must ...")``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    only_if_given: ClassVar[tuple[str, ...]] = ()  # what most recipes lack: left out of a description that lacks it

    @model_serializer(mode="wrap")
    def _describe(self, handler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if v is not None or k not in self.only_if_given}


class _Net(Part):
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


class NNGP(Part):
    """The NNGP kernel, for ridge regression or few-shot learning; see :func:`pizoo.functional.nngp`."""

    kind: Literal["nngp"]
    depth: Annotated[int, Field(ge=1, le=1000)]
    var_w: Positive = 1.0
    var_b: NonNegative = 0.0
    ridge: Positive | None = None  # None: few-shot learning has none
    only_if_given: ClassVar[tuple[str, ...]] = ("ridge",)


class NTK(Part):
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


class Data(Part):
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
                f"name: found {self.name!r} without a path; {nearest(self.name, list_datasets())}, or any name "
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


class Clip(Part):
    """Gradient clipping; with ``follows_schedule`` the threshold drops together with the learning rate."""

    max_norm: Positive | None = None  # None: off
    per_param: bool = False
    follows_schedule: bool = False


class Constant(Part):
    name: Literal["constant"] = "constant"


class Multistep(Part):
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


class Cosine(Part):
    """Learning rate times ``(1 + cos(π t / T)) / 2`` at step t of T."""

    name: Literal["cosine"]


class Train(Part):
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


class Tasks(Part):
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


class Transfer(Part):
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


class Tune(Part):
    """Which settings of a kernel recipe's model to try on held-out training images; see :mod:`pizoo.training.tune`."""

    validation: Annotated[float, Field(gt=0, lt=1)]  # fraction of the training images to hold out
    grid: Annotated[
        dict[str, Annotated[tuple[float | int, ...], Field(min_length=1), Strict(False)]], Field(min_length=1)
    ]

    @property
    def settings(self) -> list[dict[str, float | int]]:
        """Every combination of the grid's values; the last key's values follow one another."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Compact(Part):
    """How the net that is shipped is made of the one that was trained; see :func:`pizoo.compact`."""

    megabytes: Positive = 25.0  # of 10⁶ bytes: the file's size, at most
    rows: Count | None = None  # of each hidden layer, half as many for the read-out; None: as many as fit
    dtype: Literal["int8", "float16"] = "int8"
    views: Annotated[int, Field(ge=1, le=1000)] = 6  # of each training image


class Published(Part):
    """A number in print, and how it was measured."""

    accuracy: Annotated[float, Field(ge=0, le=100)]  # percent
    # One run of the paper's own code with this recipe, after the last epoch, in percent; None: not measured.
    rerun: Annotated[float, Field(ge=0, le=100)] | None = None
    source: Annotated[str, Field(min_length=1)]
    protocol: Annotated[str, Field(min_length=1)]


class Tolerance(Part):
    """Points of accuracy within which a checkpoint is what it claims and a training reproduces the published number."""

    verify: Annotated[float, Field(ge=0, le=100)] = 0.05
    reproduce: Annotated[float, Field(ge=0, le=100)] = 1.0
    reason: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Tolerance:
        if self.reason is None and (self.verify, self.reproduce) != (0.05, 1.0):
            raise ValueError("reason: missing; must be given for tolerances other than verify 0.05, reproduce 1.0")
        return self
