"""The training step without autograd, on data that stays on the device; on a GPU compiled, and replayed as a CUDA graph.

This is the plain loop of :mod:`pizoo.training.supervised`, written out: the same trajectory within rounding. What the plain
loop keeps in Python (learning rate, row counts, decay factors, where in the epoch it is) lies in device memory here, so that
nothing in an epoch waits for the host. A step whose loss or gradient is not finite changes nothing, nor does any step after
it; the host learns of it at the end of the epoch.

Forward and backward pass are written out (:mod:`pizoo.training.passes`), the gradient of a weight is never formed
(:mod:`pizoo.training.gradients`), and its update is one pass over the weight (:mod:`pizoo.ops.dense`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pizoo import ops, processes
from pizoo.models import InfPiMLP, PiNet
from pizoo.nn import InfPiLinear
from pizoo.ops import dense
from pizoo.ops.append import append_fused, append_reference
from pizoo.ops.reference import accumulate_dtype
from pizoo.optim import PiSGD
from pizoo.recipes import Train
from pizoo.rows import directed, scaled
from pizoo.training.gradients import Gradient, grad_norms
from pizoo.training.growing import GrowingState
from pizoo.training.passes import FinitePasses, InfinitePasses

WARM_UP_STEPS = 3
# A finite net trains for as long as the compiler thinks. Small kernels of a step gain nothing from what these look for.
COMPILE_OPTIONS = {"pattern_matcher": False, "triton.autotune_pointwise": False}
SMALLEST_DECAY = 1e-25  # within an epoch: beyond it amult / decay would leave float32


class Engine:
    """Epochs of training on one device.

    Args:
        model: the net, trained in place. Growing layers must have room reserved for every row to come.
        optimizer: its groups hold multipliers and weight decay.
        settings: the recipe's ``train`` part.
        x: all training inputs, normalised, in the dtype of the net's inputs [n, ...]; stays on the device.
        y: labels int64 [n].
        lr_factors: what the learning rate is multiplied by at each step of the whole training, [steps].

    Raises:
        ValueError: a net or settings the engine cannot train (:func:`unsupported`).
    """

    def __init__(self, model: PiNet, optimizer: PiSGD, settings: Train, x: Tensor, y: Tensor, lr_factors: Tensor):
        steps = math.ceil(len(x) / settings.batch_size)
        if reason := unsupported(settings, steps, grows=isinstance(model, InfPiMLP)):
            raise ValueError(f"the engine cannot train this: {reason}")
        self.x, self.y = x.flatten(1), y
        self.order = torch.arange(len(x), device=x.device)
        self.told = torch.zeros(steps, 1, dtype=accumulate_dtype(x.dtype), device=x.device)
        self._prepare(model, optimizer, settings, model.all_layers, lr_factors.to(x.device))

    def _prepare(
        self, model: PiNet, optimizer: PiSGD, settings: Train, layers: list[nn.Module], lr_factors: Tensor
    ) -> None:
        """What every engine has, beside ``told`` [steps, k], what the host learns of each step.

        Args:
            layers: those it passes through, from the input on; frozen ones stay as they are.
        """
        self.model, self.settings = model, settings
        self.groups = {group["role"]: group for group in optimizer.param_groups}
        self.lr_factors, device = lr_factors.to(torch.float64), lr_factors.device
        # One-element vectors: compiling for a CPU, torch may take 0-d tensors for numbers and lose what is written to them.
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # in the epoch, in samples
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # of the whole training
        self.finite = torch.ones(1, dtype=torch.bool, device=device)
        self.growing = [GrowingState(layer) for layer in layers if isinstance(layer, InfPiLinear)]
        trained = [any(param.requires_grad for param in layer.parameters()) for layer in layers]
        self.appending = [state for state, trains in zip(self.growing, trained[1:], strict=False) if trains]
        self._infinite = isinstance(model, InfPiMLP)  # on tasks, one with a single hidden layer has none that grows
        dense_weights = [layers[0].A] if self._infinite else [layer.weight for layer in layers]
        self.weights = [weight.data for weight, trains in zip(dense_weights, trained, strict=False) if trains]
        self._on_gpu = device.type == "cuda"
        self._compute = compiled(self._compute_step) if self._on_gpu else self._compute_step
        self._append = append_fused if self._on_gpu else append_reference
        if self._infinite:
            one_pass = layers[-1].role == "readout" and (not self._on_gpu or self._readout_in_one_pass())
            self.passes = InfinitePasses(model, self.growing, trained, one_pass)
        else:
            self.passes = FinitePasses(model, layers, trained)
        self._side = torch.cuda.Stream(device) if self._on_gpu else None
        self._steps: dict[int, Callable[[], None]] = {}

    def _readout_in_one_pass(self) -> bool:
        """Whether the read-out's Jacobian comes with its output, so that the backward pass reads no row of it again.

        On the GPUs of all processes, or of none: they sum what each of them computes.
        """
        A, B, *_ = self.growing[-1].storages
        own = ops.fused(self.settings.batch_size, A, B, "growing_forward_jacobian")
        return all(processes.gathered(own))

    # ------------------------------------------------------------------ epochs

    @torch.no_grad()
    def run_epoch(self, order: Tensor, first_step: int) -> list[float]:
        """Train on all samples in ``order`` int64 [n], beginning with step ``first_step`` of the whole training.

        Returns:
            the loss of every step. From the first that is not finite on, nothing was changed.
        """
        size, n = self.settings.batch_size, len(order)
        full, rest = self._step_of(min(size, n)), n % size if n > size else 0
        self.order.copy_(order)
        self.position.zero_()
        self.step.fill_(first_step)
        for _ in range(max(1, n // size)):
            full()
        if rest:  # once an epoch: compiling for it would take longer than all of these do
            self._take_step(rest, self._compute_step)
        for state in self.growing:
            state.sync()
        return self.told[:, 0].tolist()

    @torch.no_grad()
    def _step_of(self, size: int) -> Callable[[], None]:
        """A step with batches of ``size``: on a GPU the replay of its graph, captured when first asked for."""
        if size not in self._steps and self._on_gpu:
            with torch.cuda.device(self.step.device):
                self._steps[size] = self._capture(size)
        return self._steps.setdefault(size, lambda: self._take_step(size, self._compute))

    def _capture(self, size: int) -> Callable[[], None]:
        # Steps taken to compile, tune and warm up must leave no trace. Rows beyond the count are none.
        state = list(self._mutable())
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._take_step(size, self._compute)
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        if not all(ops.fused(1, A, B) for A, B, *_ in (state.rows for state in self.growing)):
            # A kernel failed just now. Plain torch, which runs instead, asks for the number of rows: that is no graph.
            return lambda: self._take_step(size, self._compute)
        graph = torch.cuda.CUDAGraph()
        # Threads that watch over collectives, or write a checkpoint, may ask about other work meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._take_step(size, self._compute)
        return graph.replay

    def _mutable(self) -> Iterator[Tensor]:
        """Everything a step changes, but rows."""
        yield from (self.position, self.step, self.finite, self.told)
        for state in self.growing:
            yield from (state.count, state.held, state.decay)
        rows = {id(p) for state in self.growing for p in (state.layer.A, state.layer.B)}
        yield from (p.data for p in self.model.parameters() if id(p) not in rows)

    # ------------------------------------------------------------------ one step

    def _take_step(self, size: int, compute: Callable) -> None:
        new_rows, steps = compute(size)
        with self._beside():
            for state, (first, *rows) in zip(self.appending, new_rows, strict=True):
                self._append(rows, state.storages, first)
        for weight, step in zip(self.weights, steps, strict=True):
            dense.step(weight, *step, self.finite)
        self._join()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU, what is launched within this context may run beside what follows it, until :meth:`_join`."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _compute_step(self, size: int) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """All of a step but writing rows and weights.

        Returns:
            what to append, one (first row, A, B, amult) a growing layer, and how to step each of ``self.weights``: (left,
            right, kept, factor), as :func:`pizoo.ops.dense.step` takes them.
        """
        lr_factor = self.lr_factors[self.step].squeeze(0)
        loss, told, gradients = self._gradients(size)
        factors, norms = self._clip(gradients, lr_factor)
        self.finite.logical_and_(functools.reduce(torch.logical_and, [t.isfinite() for t in (loss, *norms)]))
        lr = self.settings.lr * lr_factor
        updates = self._update(gradients, factors, lr)
        # A gradient that is not finite shows as a loss that is not, so that the host knows the step.
        told = torch.where(self.finite | ~loss.isfinite(), told, math.nan)
        self.told.index_copy_(0, self.position // self.settings.batch_size, told[None].to(self.told.dtype))
        self.position.add_(size)
        self.step.add_(1)
        return updates

    def _gradients(self, size: int) -> tuple[Tensor, Tensor, list[Gradient]]:
        """Loss of the next ``size`` samples (0-d), what the host is told of it [k], gradients of the layers in their order."""
        batch = self.order[self.position + torch.arange(size, device=self.order.device)]
        x, y = self.x[batch], self.y[batch]
        logits, entered = self.passes.forward(x)
        loss, delta = self._loss(logits, y)
        return loss, loss[None], self.passes.backward(x, delta, entered)

    def _loss(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (0-d) and its gradient at the logits [b, classes], in at least float32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = nn.functional.one_hot(y, logits.shape[1]).to(logits.dtype)
        if self.settings.loss == "mse":
            return nn.functional.mse_loss(logits, target), 2 * (logits - target) / logits.numel()
        log_p = logits.log_softmax(1)
        return -(log_p * target).sum() / len(y), (log_p.exp() - target) / len(y)

    def _clip(self, gradients: list[Gradient], lr_factor: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
        """What each gradient (weight, bias) is multiplied by, and all norms, flat."""
        norms = grad_norms(gradients)
        flat = [norm for pair in norms for norm in pair]
        clip = self.settings.clip
        if clip.max_norm is None:
            return [[torch.ones_like(norm) for norm in pair] for pair in norms], flat
        max_norm = clip.max_norm * (lr_factor if clip.follows_schedule else 1)
        if clip.per_param:
            return [[(max_norm / norm).clamp(max=1) for norm in pair] for pair in norms], flat
        factor = (max_norm / torch.linalg.vector_norm(torch.stack(flat))).clamp(max=1)
        return [[factor for _ in pair] for pair in norms], flat

    def _update(
        self, gradients: list[Gradient], factors: list[list[Tensor]], lr: Tensor
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """Move biases and decay growing layers; make the rows to append and the steps of weights.

        Rows of a step that is not finite are written too, but not counted: nothing reads them.
        """
        new_rows, steps = [], []
        growing = iter(self.appending)
        for gradient, (factor, *bias_factor) in zip(gradients, factors, strict=True):
            module = gradient.module
            group = self.groups[module.role]
            step, kept = lr * group["lr_mult"], 1 - lr * group["weight_decay"] * group["weight_decay_mult"]
            if gradient.scale is not None:
                state = next(growing)
                decay = state.decay * torch.where(self.finite, kept, 1.0)
                state.decay.copy_(decay)
                own = state.dealt(len(gradient.delta))
                A, scale = scaled(gradient.delta[own] * gradient.scale[own] * factor, state.dtype)
                B, *bmult = directed(gradient.inputs[own], state.dtype)
                amult = scale * (-step / decay).to(scale.dtype)
                new_rows.append((state.held.clone(), A, B, amult, *bmult))
                state.grow(self.finite * len(gradient.delta))
            else:
                pair = (gradient.inputs, gradient.delta)
                exact = accumulate_dtype(gradient.delta.dtype)
                steps.append((*(pair if self._infinite else reversed(pair)), kept.to(exact), (step * factor).to(exact)))
            if bias_factor:
                group = self.groups["bias"]
                kept = 1 - lr * group["weight_decay"] * group["weight_decay_mult"]
                change = gradient.bias() * (lr * group["lr_mult"] * bias_factor[0])
                module.bias.copy_(torch.where(self.finite, module.bias * kept - change, module.bias))
        return new_rows, steps


def compiled(step: Callable) -> Callable:
    """``step`` compiled as one graph, whatever was compiled before.

    torch counts compilations per line of code and gives up after a few; an engine per seed would get there. Steps captured
    earlier keep their kernels.
    """
    torch.compiler.reset()
    return torch.compile(step, fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)


def unsupported(settings: Train, steps_per_epoch: int, grows: bool, trains_readout: bool = True) -> str | None:
    """Why the engine cannot train with these settings, in words; None if it can. ``grows``: an infinite net."""
    if settings.momentum:
        return "momentum moves every row at every step"
    if not grows:
        return None
    if trains_readout and settings.last_layer_lr_mult == 0:
        return "a read-out with learning-rate multiplier 0 does not grow"
    largest = max(1.0, settings.last_layer_lr_mult) if settings.apply_lr_mult_to_wd else 1.0
    kept = 1 - settings.lr * settings.weight_decay * largest
    if kept <= 0 or steps_per_epoch * math.log(kept) < math.log(SMALLEST_DECAY):
        return "weight decay leaves nothing of a row within an epoch"
    return None
