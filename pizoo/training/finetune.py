"""Going on from a trained net on other data: its trunk, under a fresh read-out, with layers that stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pizoo import zoo
from pizoo.models import PiNet
from pizoo.optim import named_roles
from pizoo.recipes import Recipe, RecipeError
from pizoo.rows import growing_layers

NOT_THE_TRUNKS = ("d_out", "last_bias_alpha", "last_layer_alpha", "readout_zero_init", "initial_scales")


def source_net(recipe: Recipe) -> PiNet | None:
    """The net that ``train.init_from`` names, on the CPU, rows as stored; None if it names none.

    Raises:
        RecipeError: a net whose trunk is of another kind or size than the recipe's.
        UnknownEntryError, CheckpointError: it cannot be loaded.
    """
    name = recipe.train.init_from
    if name is None:
        return None
    source = zoo.load(name, rows_on="device")
    if type(source) is not recipe.network:
        raise RecipeError(
            f"train.init_from: {name} is of class {type(source).__name__}; model.kind {recipe.model.kind} is of class "
            f"{recipe.network.__name__}"
        )
    differing = [
        f"{key} is {source.hparams[key]!r} there and {value!r} here"
        for key, value in recipe.hparams.items()
        if key not in NOT_THE_TRUNKS and source.hparams[key] != value
    ]
    if differing:
        raise RecipeError(
            f"train.init_from: {name} has another trunk than {recipe.entry}: {'; '.join(differing)}. Set model (and "
            "data.input_size) to what it has"
        )
    return source


def initial_rows(source: PiNet | None) -> dict[str, int]:
    """How many rows the layers of :func:`take_trunk`'s net start with, by name, where not with as many as a fresh one."""
    layers = {} if source is None else growing_layers(source)
    return {name: layer.count for name, layer in layers.items() if layer.role == "hidden"}


def take_trunk(model: PiNet, source: PiNet) -> None:
    """Give ``model`` all of ``source`` but its read-out; infinite layers get its rows, to grow on from.

    ``model``'s own read-out stays as it is initialised.
    """
    readout = next(name for name, module in source.named_modules() if module is source.readout)
    trunk = {name: value for name, value in source.state_dict().items() if not name.startswith(f"{readout}.")}
    model.load_state_dict(trunk, strict=False)


def freeze(model: nn.Module, roles: Iterable[str]) -> None:
    """Have the layers with these roles ("input", "hidden", "readout") stay as they are, biases too.

    Raises:
        RecipeError: nothing would be left to train.
    """
    for module in model.modules():
        if getattr(module, "role", None) in roles:
            module.requires_grad_(False)
    if not any(param.requires_grad for _, _, param in named_roles(model)):
        raise RecipeError(
            f"train.freeze: found {list(roles)}; this net has no other layers, so nothing would be trained"
        )
