"""Learning from a few images: a net whose layers are moved by gradient steps on one task, for many tasks at once.

A gradient step on N support samples adds to a layer N rows of its own kernel: ``A = -step_size δ``, ``B`` the layer's inputs,
δ the gradient of the support loss at its output. (Of a growing layer that is what training appends; of a linear layer it is
the same weight update, as its factors.) So an adapted net is the stored net plus a few rows a task; the stored rows are
read once for all tasks, and nothing of them changes. A task's support loss is the mean cross-entropy.

Source: Finn, Abbeel, Levine (2017) for MAML; Yang, Santacroce, Hu (ICLR 2022), section on Omniglot, for adapting the read-out
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from pizoo.functional import unit
from pizoo.nn import InfPiLinear

if TYPE_CHECKING:
    from pizoo.models.base import PiNet

Layers = Literal["readout", "all"]


class TaskRows(NamedTuple):
    """What inner steps add to one layer, for T tasks.

    Attributes:
        A: minus step size times gradients at the layer's output [T, k, n_out].
        B: inputs of the layer there [T, k, n_in].
        bias: step of the layer's bias [T, 1, n_out]; None if it has none.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None

    def output(self, layer: nn.Module, h: Tensor) -> Tensor:
        """What they add to the layer's output at inputs h: [T, n, n_in] -> [T, n, n_out]."""
        out = layer.kernel(h.to(self.A.dtype), self.B) @ self.A
        if self.bias is not None:
            out = out + layer.bias_alpha * self.bias
        return layer.alpha * out

    def extended(self, more: TaskRows) -> TaskRows:
        """These rows and those of one more step."""
        bias = None if self.bias is None else self.bias + more.bias
        return TaskRows(torch.cat([self.A, more.A], 1), torch.cat([self.B, more.B], 1), bias)


def readout_rows(
    readout: nn.Module, features: Tensor, logits: Tensor, labels: Tensor, step_size: float, steps: int = 1
) -> TaskRows:
    """What ``steps`` inner steps on T tasks add to a read-out; differentiable once with respect to features and logits.

    The bias step of an infinite net is a constant to the outer gradient (the paper's code; finite nets differentiate it).

    Args:
        readout: the layer, or anything with ``kernel``, ``alpha``, ``bias`` and ``bias_alpha`` of its own.
        features: its inputs at the support samples [T, N, n_in].
        logits: its outputs there, before adaptation [T, N, ways].
        labels: int64 [T, N].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    features, logits = features.to(dtype), logits.to(dtype)
    # As one_hot, which looks at the values of labels: a compiled or captured step cannot.
    targets = (labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)).to(dtype)
    rows = TaskRows(torch.zeros_like(logits), features, None if readout.bias is None else logits.new_zeros(1))
    adapted = logits
    for done in range(steps):
        if done:
            adapted = logits + rows.output(readout, features)
        # The gradient is written out, so that differentiating it differentiates the growing layer once only.
        delta = readout.alpha * (adapted.softmax(-1) - targets) / labels.shape[1]
        bias = rows.bias
        if bias is not None:
            step = readout.bias_alpha * delta.sum(1, keepdim=True)
            bias = bias - step_size * (step.detach() if isinstance(readout, InfPiLinear) else step)
        rows = TaskRows(rows.A - step_size * delta, features, bias)
    return rows


@torch.no_grad()
def inner_steps(
    model: Adaptable, x: Tensor, labels: Tensor, step_size: float, steps: int = 1, layers: Layers = "readout"
) -> tuple[dict[int, TaskRows], Tensor]:
    """Take ``steps`` inner steps on T tasks, as constants.

    Args:
        x: support inputs [T, N, d]; labels: int64 [T, N].
        layers: which adapt.

    Returns:
        what they add to each layer that adapts, by its number, and the support losses before the first step [T].
    """
    check_steps(step_size, steps, layers)
    if layers == "readout":
        features = per_task(model.features, x)
        logits = per_task(model.readout, features)
        rows = readout_rows(model.readout, features, logits, labels, step_size, steps)
        return {len(model.all_layers) - 1: rows}, task_losses(logits, labels)
    rows, first = {}, None
    for _ in range(steps):
        step, losses = _step_of_all_layers(model, x, labels, step_size, rows)
        rows = {l: rows[l].extended(more) if rows else more for l, more in step.items()}
        first = losses if first is None else first
    return rows, first


def _step_of_all_layers(
    model: Adaptable, x: Tensor, labels: Tensor, step_size: float, rows: dict[int, TaskRows]
) -> tuple[dict[int, TaskRows], Tensor]:
    """One inner step of the net with ``rows``: what it adds to each layer, and the support losses [T]."""
    inputs, outputs = [], []

    def watch(l: int, h: Tensor, out: Tensor) -> Tensor:
        # From the first layer's output on there is a graph, whether or not the net's parameters want gradients.
        out = out.detach().requires_grad_() if l == 0 else out
        inputs.append(h.detach())
        outputs.append(out)
        return out

    with torch.enable_grad():
        losses = task_losses(adapted_forward(model, rows, x, watch), labels)
        deltas = torch.autograd.grad(losses.sum(), outputs)
    found = {}
    for l, (layer, h, delta) in enumerate(zip(model.all_layers, inputs, deltas, strict=True)):
        dtype = torch.promote_types(delta.dtype, torch.float32)
        delta, basis = layer.alpha * delta.to(dtype), model.basis(l)
        if basis is not None:
            delta = (delta @ basis.to(dtype)) @ basis.to(dtype).T
        bias = None if layer.bias is None else -step_size * layer.bias_alpha * delta.sum(1, keepdim=True)
        found[l] = TaskRows(-step_size * delta, h.to(dtype), bias)
    return found, losses.detach()


def adapted_forward(model: Adaptable, rows: dict[int, TaskRows], x: Tensor, watch=None) -> Tensor:
    """Logits of T adapted nets: x [T, n, d] -> [T, n, ways].

    Args:
        rows: what adaptation added to each layer, by its number.
        watch: called with number, input and output of each layer; what it returns goes on as the output.
    """
    h = x
    for l, layer in enumerate(model.all_layers):
        out = per_task(lambda flat, l=l: model.call_layer(l, flat), h)
        if l in rows:
            out = out + rows[l].output(layer, h).to(out.dtype)
        out = watch(l, h, out) if watch else out
        h = model.activation(out) if l < len(model.all_layers) - 1 else out
    return h


class AdaptedPredictor:
    """A net adapted to one task, or to T: callable on queries. The net itself is shared, and is not changed.

    Attributes:
        model: the net; what is trained in it later is seen here.
        rows: what adaptation added to each layer, by its number.
        losses: support loss before adaptation, 0-d or [T].
    """

    def __init__(self, model: Adaptable, rows: dict[int, TaskRows], losses: Tensor, single: bool):
        self.model, self.rows, self._single = model, rows, single
        self.losses = losses[0] if single else losses

    def __call__(self, x: Tensor) -> Tensor:
        """Queries [B, d] or [B, C, H, W] (of T tasks: [T, B, ...]) -> logits [B, ways] ([T, B, ways])."""
        x = task_inputs(self.model, x, self._single, "x")
        if not self._single and len(x) != len(self.losses):
            raise ValueError(f"x has {len(x)} tasks; the predictor is adapted to {len(self.losses)}")
        logits = adapted_forward(self.model, self.rows, x)
        return logits[0] if self._single else logits


class NearestNeighbour:
    """Predicts the label of the support image nearest to a query, by the cosine of last hidden pre-activations.

    Attributes:
        model: the net; its features are taken anew for every query.
        support: unit pre-activations of the support images [T, N, k].
        labels: int64 [T, N].
    """

    def __init__(self, model: PiNet, support_x: Tensor, labels: Tensor, single: bool):
        self.model, self.labels, self._single = model, labels, single
        self.support = unit(per_task(model.preactivation, support_x))[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Queries as :class:`AdaptedPredictor` takes them -> each class's largest cosine [B, ways] ([T, B, ways])."""
        x = task_inputs(self.model, x, self._single, "x")
        cosine = unit(per_task(self.model.preactivation, x))[0] @ self.support.mT
        classes = one_hot(self.labels, self.model.num_classes).bool()[:, None]
        scores = torch.where(classes, cosine[..., None], -torch.inf).amax(2)
        return scores[0] if self._single else scores


class Adaptable(nn.Module):
    """What can learn a task from a few support samples: :meth:`adapt`.

    A subclass has ``d_in``, ``num_classes``, ``all_layers`` and ``features``; its layers have ``kernel``, ``alpha``, ``bias``
    and ``bias_alpha``.

    Attributes:
        input_size: [C, H, W], of a net that was loaded and takes images: others are refused; None: not known.
    """

    input_size: tuple[int, ...] | None = None

    @property
    def all_layers(self) -> list[nn.Module]:
        """Input layer, hidden layers and read-out, in order."""
        raise NotImplementedError

    @property
    def readout(self) -> nn.Module:
        return self.all_layers[-1]

    def basis(self, l: int) -> Tensor | None:
        """What gradients of layer l are projected onto: orthonormal columns [width, r], or None."""
        return None

    def call_layer(self, l: int, h: Tensor) -> Tensor:
        """Layer l alone: [B, n_in] -> pre-activation [B, n_out]."""
        return self.all_layers[l](h)

    def activation(self, h: Tensor) -> Tensor:
        """What stands between the layers: nothing where they hold their ReLU themselves."""
        return h

    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        step_size: float,
        steps: int = 1,
        layers: Layers = "readout",
    ) -> AdaptedPredictor:
        """Adapt to a task by ``steps`` gradient steps on its support set; this net stays as it is.

        Args:
            support_x: inputs [N, d] or [N, C, H, W]; of T tasks at once [T, N, ...].
            support_y: labels int64 [N] ([T, N]), 0 to ways - 1, every class at least once; as many ways as the net has
                outputs (``reset_classifier`` gives it others).
            step_size: of an inner step.
            steps: how many.
            layers: ``"readout"``, or ``"all"``: every weight and bias.

        Returns:
            a predictor of the task's (the T tasks') queries.

        Raises:
            ValueError: shapes, labels or values that are not as they should be, a step size or number of steps not positive.
        """
        x, y = self.support_sets(support_x, support_y)
        rows, losses = inner_steps(self, x, y, step_size, steps, layers)
        return AdaptedPredictor(self, rows, losses, single=support_y.ndim == 1)

    def support_sets(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Support sets checked, on the net's device, of T tasks (or one): [T, N, d], [T, N]; raises as :meth:`adapt`."""
        if y.ndim not in (1, 2):
            raise ValueError(f"support_y has shape {list(y.shape)}; it must be [N], or [T, N] for T tasks")
        x = task_inputs(self, x, y.ndim == 1, "support_x")
        y = (y[None] if y.ndim == 1 else y).to(x.device)
        check_labels("support", x, y, self.num_classes)
        present = one_hot(y, self.num_classes).any(1)
        if not present.all():
            task, missing = (~present).nonzero()[0].tolist()
            where = f" of task {task}" if len(y) > 1 else ""
            raise ValueError(
                f"support_y{where} has no sample of class {missing}; every class 0 to {self.num_classes - 1} needs one"
            )
        return x, y


def task_inputs(model: Adaptable, x: Tensor, single: bool, name: str) -> Tensor:
    """Inputs of a task, or of T, checked and flattened to [T, n, d], on the net's device and in its dtype.

    Raises:
        ValueError: another shape; for a net trained on pixels of [0, 1], values outside.
    """
    x = x[None] if single else x
    if x.ndim < 3 or x.shape[2:].numel() != model.d_in or x.numel() == 0:
        shape = list(x.shape[1:] if single else x.shape)
        wanted = f"[N, {model.d_in}] or [N, C, H, W] with C*H*W = {model.d_in}"
        raise ValueError(f"{name} has shape {shape}; it must be {wanted}, and of several tasks [T, N, ...]")
    if model.input_size is not None:
        check_layout(x.shape[2:], model.input_size, name)
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; it must be floating point")
    check_pixels(model, x, name)
    anchor = next((t for t in (*model.parameters(), *model.buffers())), x)
    return x.flatten(2).to(anchor.device, anchor.dtype)


def check_layout(shape: Sequence[int], input_size: Sequence[int], name: str = "x") -> None:
    """Raise ValueError unless inputs of ``shape`` each, flattened, are what a net of that ``input_size`` [C, H, W] takes.

    Vectors are taken to be; sizes of 1 change nothing.
    """
    if len(shape) > 1 and [n for n in shape if n != 1] != [n for n in input_size if n != 1]:
        raise ValueError(
            f"{name} holds items of shape {list(shape)}; this net takes images [C, H, W] of {list(input_size)}, channels "
            f"first, or vectors of {math.prod(input_size)}"
        )


def check_pixels(model: nn.Module, x: Tensor, name: str) -> None:
    """Raise ValueError for values outside [0, 1], if ``model`` was loaded and trained on tasks of such pixels."""
    config = getattr(model, "config", None) or {}
    if config.get("recipe", {}).get("tasks") and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"{name} has values from {x.min():g} to {x.max():g}; this net takes pixels in [0, 1], ink 1 and paper 0"
        )


def check_labels(part: str, x: Tensor, y: Tensor, ways: int) -> None:
    """Raise ValueError unless ``y`` int64 [T, N] are labels below ``ways`` of the inputs ``x`` [T, N, ...]."""
    if y.dtype != torch.int64 or y.shape != x.shape[:2]:
        raise ValueError(
            f"{part}_y has shape {list(y.shape)} and dtype {y.dtype}; it must be {list(x.shape[:2])} of torch.int64, a label "
            f"for every sample of {part}_x"
        )
    if y.min() < 0 or y.max() >= ways:
        raise ValueError(
            f"{part}_y has labels from {y.min()} to {y.max()}; they must lie in 0 to {ways - 1}, for the net's {ways} outputs"
        )


def check_steps(step_size: float, steps: int, layers: str) -> None:
    """Raise ValueError unless these are a positive step size, a positive number of steps, and ``readout`` or ``all``."""
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size is {step_size}; it must be positive and finite")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; it must be an integer of at least 1")
    if layers not in ("readout", "all"):
        raise ValueError(f"layers is {layers!r}; it must be 'readout' or 'all'")


def task_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each task, in at least float32: [T, n, ways], int64 [T, n] -> [T]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.mT, labels, reduction="none").mean(1)


def per_task(function, x: Tensor) -> Tensor:
    """``function`` on the samples of all tasks in one batch: [T, n, a] -> [T, n, b]."""
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])
