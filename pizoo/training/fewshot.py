"""Few-shot training (MAML): outer steps over a batch of tasks, all of which go through the net together.

The outer loss is the sum over tasks of the mean query loss after adaptation. With the read-out adapted alone
it is, at second order too, an ordinary function of the last hidden features and of the stored read-out's logits, whose
gradient is written out: one pass of autograd through the trunk gives the outer gradient.

Source: Finn, Abbeel, Levine (2017); Yang, Santacroce, Hu (ICLR 2022), section on Omniglot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pizoo.data import FewShotBatch
from pizoo.models import PiNet
from pizoo.models.adapt import (
    Layers,
    adapted_forward,
    check_labels,
    check_steps,
    inner_steps,
    per_task,
    readout_rows,
    task_losses,
)
from pizoo.optim import clip_grad_norm_, named_roles


class TaskResults(NamedTuple):
    """What an outer step saw, per task.

    Attributes:
        inner_losses: support loss before adaptation [T].
        outer_losses: query loss after it [T].
        accuracies: percent of queries classified right after it [T].
    """

    inner_losses: Tensor
    outer_losses: Tensor
    accuracies: Tensor


def meta_loss(
    model: PiNet,
    batch: FewShotBatch,
    step_size: float,
    first_order: bool = False,
    steps: int = 1,
    layers: Layers = "readout",
) -> Tensor:
    """The outer loss, 0-d: call ``backward`` on it, as on any loss.

    Args:
        model: an infinite or finite π-net or a μ-net, in training mode.
        batch: the tasks.
        step_size: of an inner step.
        first_order: take what the inner steps add as a constant; growing layers then get no rows of support samples.
        steps: number of inner steps.
        layers: what adapts, ``"readout"`` or ``"all"``.

    Raises:
        TypeError: a model without read-out adaptation.
        ValueError: a batch that does not fit the model; ``layers="all"`` at second order: the outer gradient would need
            derivatives of growing layers that are no rows of theirs.
    """
    return task_results(model, batch, step_size, first_order, steps, layers).outer_losses.sum()


def meta_step(
    model: PiNet,
    optimizer: torch.optim.Optimizer,
    batch: FewShotBatch,
    step_size: float,
    max_norm: float | None = None,
    per_param: bool = False,
    first_order: bool = False,
    steps: int = 1,
    layers: Layers = "readout",
) -> TaskResults:
    """One outer step: gradients cleared, :func:`meta_loss`, ``backward``, clipping, ``optimizer.step``; no schedule's step.

    The read-out's weight is left out of clipping when its learning-rate multiplier is 0. Nothing here waits for the device.

    Args:
        max_norm, per_param: as for :func:`pizoo.optim.clip_grad_norm_`.
        the rest: as for :func:`meta_loss`.

    Returns:
        losses and accuracies per task, detached, on the device.
    """
    optimizer.zero_grad()
    results = task_results(model, batch, step_size, first_order, steps, layers)
    results.outer_losses.sum().backward()
    clip_outer_gradient(model, optimizer, max_norm, per_param)
    optimizer.step()
    return TaskResults(*(part.detach() for part in results))


def task_results(
    model: PiNet, batch: FewShotBatch, step_size: float, first_order: bool, steps: int, layers: Layers
) -> TaskResults:
    """Losses and accuracies per task; ``outer_losses`` with the graph of the outer gradient."""
    _check(model, batch, step_size, first_order, steps, layers)
    if first_order:
        rows, inner_losses = inner_steps(model, batch.support_x, batch.support_y, step_size, steps, layers)
        logits = adapted_forward(model, rows, batch.query_x)
    else:
        inner_losses, logits = _second_order(model, batch, step_size, steps)
    right = logits.argmax(-1) == batch.query_y
    return TaskResults(inner_losses, task_losses(logits, batch.query_y), 100 * right.double().mean(1))


def _second_order(model: PiNet, batch: FewShotBatch, step_size: float, steps: int) -> tuple[Tensor, Tensor]:
    """Inner losses [T] and query logits [T, Q, ways]; support and query of all tasks pass the trunk together."""
    sizes = [batch.support_x.shape[1], batch.query_x.shape[1]]
    features = per_task(model.features, torch.cat([batch.support_x, batch.query_x], 1))
    support, query = per_task(model.readout, features).split(sizes, 1)
    support_features, query_features = features.split(sizes, 1)
    rows = readout_rows(model.readout, support_features, support, batch.support_y, step_size, steps)
    inner_losses = task_losses(support.detach(), batch.support_y)
    return inner_losses, query + rows.output(model.readout, query_features)


def clip_outer_gradient(
    model: PiNet, optimizer: torch.optim.Optimizer, max_norm: float | None, per_param: bool = False
) -> Tensor | dict[str, Tensor]:
    """:func:`pizoo.optim.clip_grad_norm_`, without the read-out's weight if that is not to move."""
    return clip_grad_norm_(model, max_norm, per_param, exclude_readout=readout_is_fixed(model, optimizer))


def readout_is_fixed(model: PiNet, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's learning-rate multiplier of the read-out's weight is 0."""
    weights = {id(param) for _, role, param in named_roles(model) if role == "readout"}
    fixed = {id(p) for group in optimizer.param_groups if group.get("lr_mult", 1.0) == 0 for p in group["params"]}
    return weights <= fixed


def _check(model: PiNet, batch: FewShotBatch, step_size: float, first_order: bool, steps: int, layers: Layers) -> None:
    if not isinstance(model, PiNet):
        raise TypeError(
            f"model is a {type(model).__name__}, whose read-out cannot be adapted; it must be an InfPiMLP, FinPiMLP or MuMLP"
        )
    check_steps(step_size, steps, layers)
    if layers == "all" and not first_order:
        raise ValueError(
            "layers is 'all' and first_order False; all layers adapt at first order only (first_order=True): at second "
            "order the outer gradient needs derivatives of growing layers that are no rows of theirs"
        )
    if batch.support_x.shape[2] != model.d_in:
        raise ValueError(f"support_x has shape {list(batch.support_x.shape)}; it must be [T, N, {model.d_in}]")
    if batch.support_y.device.type == "cpu":
        check_labels("support", batch.support_x, batch.support_y, model.num_classes)
        check_labels("query", batch.query_x, batch.query_y, model.num_classes)
