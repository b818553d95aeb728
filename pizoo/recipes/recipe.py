"""A recipe whole: what its parts allow each other, and the net, the data and the ``config.json`` that they make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, ValidationError, model_validator

from pizoo.data import Dataset, TaskPool, TransferData
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
from pizoo.recipes.messages import RecipeError, explain, nearest, show
from pizoo.recipes.parts import (
    NNGP,
    NTK,
    Compact,
    Data,
    FinPi,
    InfPi,
    Mu,
    Part,
    Published,
    Tasks,
    Tolerance,
    Train,
    Transfer,
    Tune,
)

ENTRYS_OWN = ("entry", "description", "published", "differs", "cost", "seeds", "tolerance", "tune", "compact")
NETWORKS = {"infpi": InfPiMLP, "finpi": FinPiMLP, "mu": MuMLP}
KERNELS = {"nngp": NNGPRegressor, "ntk": NTKRegressor}
KERNEL_LEARNERS = {"nngp": NNGPLearner, "ntk": NTKLearner}


class Recipe(Part):
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
    cost: Annotated[str, Field(min_length=1)] | None = (
        None  # the time of a training that has not been run, and its grounds
    )
    tolerance: Tolerance = Tolerance()
    tune: Tune | None = None
    compact: Compact | None = None  # None: what was trained is shipped
    only_if_given: ClassVar[tuple[str, ...]] = ("tasks", "transfer", "cost", "compact")

    @model_validator(mode="before")
    @classmethod
    def _check_train(cls, raw: Any) -> Any:
        model = raw.get("model") if isinstance(raw, Mapping) else None
        kind = model.get("kind") if isinstance(model, Mapping) else None
        if kind in ("nngp", "ntk") and raw.get("train") is not None:
            raise ValueError(
                f"train: found {show(raw['train'])}; must be left out, kernel regressors (model.kind {kind}) "
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
                    f"{key}: found {show(value)}; must be left out {'without' if supervised else 'with'} tasks"
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
                    f"data.{key}: found {show(found)}; must be left out with tasks, whose pixels lie in [0, 1]"
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
                raise ValueError(f"tune.grid.{key}: unknown key; {nearest(key, allowed)}")
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
        lines = [explain(problem, cls, raw) for problem in problems if problem["loc"] not in inner]
        raise RecipeError("\n  ".join([f"{source}:", *lines]) if len(lines) > 1 else f"{source}: {lines[0]}")


def decisive(raw: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a recipe as plain values, what decides its training; texts, seeds to come and numbers to compare with do not."""
    return raw and {key: value for key, value in raw.items() if key == "entry" or key not in ENTRYS_OWN}
