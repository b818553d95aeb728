"""Outer steps of few-shot training, compiled and replayed as those of :mod:`pizoo.training.engine`.

For what the Omniglot recipes do: adaptation of the read-out alone, at second order, around a stored read-out that is zero and
stays so. Support and query samples of all tasks go through the net together, the net's gradients are written out; the outer
loss, a function of the features, is differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo.data import FewShotBatch
from pizoo.models import InfPiMLP, PiNet
from pizoo.models.adapt import readout_rows, task_losses
from pizoo.ops.reference import accumulate_dtype
from pizoo.optim import PiSGD
from pizoo.recipes import Tasks, Train
from pizoo.training.engine import Engine, unsupported
from pizoo.training.gradients import Gradient


class TaskEngine(Engine):
    """Few-shot training on one device.

    Args:
        model: the net, trained in place. Growing layers below the read-out must have room reserved for every row to come.
        optimizer: its groups hold multipliers and weight decay.
        settings, tasks: the recipe's parts ``train`` and ``tasks``.
        lr_factors: what the learning rate is multiplied by at each step of the whole training, [steps].
        steps_per_epoch: within so many steps weight decay must leave something of a row.

    Raises:
        ValueError: a net or settings the engine cannot train (:func:`unsupported_tasks`).
    """

    def __init__(
        self, model: PiNet, optimizer: PiSGD, settings: Train, tasks: Tasks, lr_factors: Tensor, steps_per_epoch: int
    ):
        if reason := unsupported_tasks(model, settings, tasks, steps_per_epoch):
            raise ValueError(f"the engine cannot train this: {reason}")
        self.tasks, self.batch = tasks, None
        self._prepare(model, optimizer, settings, model.all_layers[:-1], lr_factors)

    @torch.no_grad()
    def run_tasks(self, batch: FewShotBatch, first_step: int) -> list[list[float]]:
        """Train on all tasks of ``batch``, beginning with step ``first_step`` of the whole training.

        Args:
            batch: tasks of as many steps as the first time, ``settings.batch_size`` each.

        Returns:
            means over the tasks of each step of inner loss, outer loss and accuracy in percent. From the first step that is
            not finite on, nothing was changed.
        """
        size = self.settings.batch_size
        steps, rest = divmod(len(batch.support_y), size)
        parts = [torch.cat([batch.support_x, batch.query_x], 1), batch.support_y, batch.query_y]
        if self.batch is None:
            self.batch = [part.clone() for part in parts]
            self.told = torch.zeros(steps, 3, dtype=accumulate_dtype(parts[0].dtype), device=parts[0].device)
        if rest or any(new.shape != old.shape for new, old in zip(parts, self.batch, strict=True)):
            shapes = [list(part.shape) for part in self.batch]
            raise ValueError(f"batch has parts {[list(part.shape) for part in parts]}; they must be {shapes}")
        step = self._step_of(size)
        for old, new in zip(self.batch, parts, strict=True):
            old.copy_(new)
        self.position.zero_()
        self.step.fill_(first_step)
        for _ in range(steps):
            step()
        for state in self.growing:
            state.sync()
        return self.told.tolist()

    def _gradients(self, size: int) -> tuple[Tensor, Tensor, list[Gradient]]:
        x, support_y, query_y = self.batch
        task = self.position + torch.arange(size, device=x.device)
        x, support_y, query_y = x[task], support_y[task], query_y[task]
        features, entered = self.passes.forward(x.flatten(0, 1))
        readout, sizes = self.model.readout, [support_y.shape[1], query_y.shape[1]]

        def outer_loss(features: Tensor) -> tuple[Tensor, Tensor]:
            support, query = features.unflatten(0, (size, -1)).split(sizes, 1)
            logits = support.new_zeros(*support_y.shape, self.model.num_classes)
            inner = task_losses(logits, support_y)
            rows = readout_rows(readout, support, logits, support_y, self.tasks.step_size, self.tasks.steps)
            logits = rows.output(readout, query)
            outer, right = task_losses(logits, query_y), logits.argmax(-1) == query_y
            told = torch.stack([inner.mean(), outer.mean(), 100 * right.to(inner.dtype).mean()])
            return outer.sum(), told

        exact = features.to(accumulate_dtype(features.dtype))
        delta, (loss, told) = torch.func.grad_and_value(outer_loss, has_aux=True)(exact)
        return loss, told, self.passes.backward(x.flatten(0, 1), delta.to(features.dtype), entered)


def unsupported_tasks(model: PiNet, settings: Train, tasks: Tasks, steps: int) -> str | None:
    """Why the engine cannot train on tasks with these settings, in words; None if it can."""
    if tasks.first_order or tasks.layers != "readout":
        return "it adapts the read-out alone, at second order"
    readout = model.readout
    weight = readout.A if isinstance(model, InfPiMLP) else readout.weight
    if settings.last_layer_lr_mult != 0 or readout.bias is not None or weight.count_nonzero():
        return "its read-out must be zero, without a bias, and stay so"
    return unsupported(settings, steps, isinstance(model, InfPiMLP), trains_readout=False)
