"""SGD that appends: parameter groups with the paper's multipliers, the optimizer, clipping.

The loop is the one everybody knows, for infinite and finite nets alike::

    optimizer = PiSGD(param_groups(model, lr=1.0, last_layer_lr_mult=4.0), lr=1.0)
    for x, y in batches:
        loss_fn(model(x), y).backward()
        clip_grad_norm_(model, max_norm=0.4, per_param=True)
        optimizer.step()
        optimizer.zero_grad()

torch's learning-rate schedulers drive it. Source: Yang, Santacroce, Hu (ICLR 2022), section 3 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pizoo.rows import GrowingWeight, PendingRows, Rows

FOLD_DECAY_BELOW = 1e-4  # from here on the decay factor is multiplied into amult, long before float32 would suffer
SMALLEST_THRESHOLD = torch.finfo(torch.float32).tiny


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    first_layer_lr_mult: float = 1.0,
    last_layer_lr_mult: float = 1.0,
    bias_lr_mult: float = 1.0,
    apply_lr_mult_to_wd: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of a π- or μ-net for :class:`PiSGD`, one per learning-rate multiplier.

    First layer's weight, hidden weights (multiplier 1), read-out's weight, all biases. Layers are told apart by their
    ``role``; parameters of other modules count as hidden, or as biases if they are called ``bias``.

    Args:
        model: any module built from pizoo's layers.
        lr: learning rate, before multipliers.
        weight_decay: a step multiplies a parameter by ``1 - lr * weight_decay * m`` before its gradient is applied.
        first_layer_lr_mult, last_layer_lr_mult, bias_lr_mult: the multipliers, at least 0.
        apply_lr_mult_to_wd: m is the group's multiplier; if False, m is 1 for all.

    Raises:
        ValueError: a negative or non-finite value.
    """
    multipliers = {
        "input": ("first_layer_lr_mult", first_layer_lr_mult),
        "hidden": ("lr", 1.0),
        "readout": ("last_layer_lr_mult", last_layer_lr_mult),
        "bias": ("bias_lr_mult", bias_lr_mult),
    }
    for name, value in (("lr", lr), ("weight_decay", weight_decay), *multipliers.values()):
        _check_non_negative(name, value)
    groups = {
        role: {
            "params": [],
            "lr": lr,
            "lr_mult": lr_mult,
            "weight_decay": weight_decay,
            "weight_decay_mult": lr_mult if apply_lr_mult_to_wd else 1.0,
            "role": role,
        }
        for role, (_, lr_mult) in multipliers.items()
    }
    for _, role, param in named_roles(model):
        groups[role]["params"].append(param)
    return [group for group in groups.values() if group["params"]]


def named_roles(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, role ("input", "hidden", "readout" or "bias") and parameter of everything trained in ``model``."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param in seen or (isinstance(module, Rows) and name == "B"):
                continue
            seen.add(param)
            role = "bias" if name == "bias" else getattr(module, "role", "hidden")
            yield (f"{prefix}.{name}" if prefix else name), role, param


class PiSGD(torch.optim.Optimizer):
    """SGD for π-nets: dense parameters move, growing layers append.

    Without momentum a growing layer's decay factor is multiplied by ``1 - lr * weight_decay * weight_decay_mult`` and its
    pending rows are appended with ``amult = -lr * lr_mult``. With momentum there is one velocity per row,
    ``v ← momentum * v + (1 - dampening) * weight_decay * amult``, ``amult ← amult - lr * lr_mult * v``, and new rows start
    with ``v = 1 - dampening``; weight decay then acts through the velocity, for dense parameters too.
    Parameters without a gradient are left alone, as everywhere in torch.

    Args:
        params: parameters or groups (:func:`param_groups`); a group may override every value below, and hold ``lr_mult``
            and ``weight_decay_mult``.
        lr: learning rate.
        momentum, dampening: as in ``torch.optim.SGD``, except that the first step is dampened like any other.
        weight_decay: see above.

    Raises:
        ValueError: a negative or non-finite value; ``lr * weight_decay`` of 1 or more (at construction, and at a step when a
            schedule has raised lr); multipliers kept from weight decay together with momentum, where they cannot be.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "lr_mult": 1.0,
            "weight_decay_mult": None,  # None: as lr_mult
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["weight_decay_mult"] is None:
            group["weight_decay_mult"] = group["lr_mult"]
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "dampening", "weight_decay", "lr_mult", "weight_decay_mult"):
            _check_non_negative(name, group[name])
        if group["momentum"] and group["weight_decay"] and group["weight_decay_mult"] != group["lr_mult"]:
            raise ValueError(
                "momentum applies weight decay through the velocity: apply_lr_mult_to_wd=False cannot be kept"
            )
        _decay_factor(group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _decay_factor(group)  # refuses before anything has moved
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if isinstance(param, GrowingWeight):
                    self._step_rows(param, group)
                else:
                    self._step_dense(param, group)
        return loss

    def _step_dense(self, param: nn.Parameter, group: dict[str, Any]) -> None:
        step = group["lr"] * group["lr_mult"]
        if group["momentum"]:
            gradient = param.grad + group["weight_decay"] * param
            velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
            velocity.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
            param.sub_(velocity, alpha=step)
        else:
            if group["weight_decay"]:
                param.mul_(_decay_factor(group))
            param.sub_(param.grad, alpha=step)

    def _step_rows(self, weight: GrowingWeight, group: dict[str, Any]) -> None:
        rows, pending = weight.rows, weight.grad
        step = group["lr"] * group["lr_mult"]
        if not group["momentum"]:
            rows.decay *= _decay_factor(group)
            if rows.decay < FOLD_DECAY_BELOW:
                rows.fold_decay()
            if step:
                rows.append(pending.A, pending.B, -step)
            return
        rows.fold_decay()
        old, new = rows.stored_amult, 1 - group["dampening"]
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.full_like(old, group["weight_decay"])
        elif len(state["velocity"]) != len(old):
            raise ValueError(
                f"the layer has {len(old)} rows, its velocity {len(state['velocity'])}; "
                "load the optimizer's state together with the model's"
            )
        velocity = state["velocity"].mul_(group["momentum"]).add_(old, alpha=group["weight_decay"] * new)
        old.sub_(velocity, alpha=step)
        if group["lr_mult"]:  # also at lr = 0 (a warm-up's first step): the new rows' velocity moves them later
            scale = rows.append(pending.A, pending.B, -step * new)
            state["velocity"] = torch.cat([velocity, new * scale.to(velocity.dtype)])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; velocities of rows stay as precise as amult.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(saved, params, strict=True):
            if isinstance(param, GrowingWeight) and i in state_dict["state"]:
                amult = param.rows.stored_amult
                self.state[param]["velocity"] = state_dict["state"][i]["velocity"].to(
                    amult.device, amult.dtype, copy=True
                )


def clip_grad_norm_(
    model: nn.Module, max_norm: float | None, per_param: bool = False, exclude_readout: bool = False
) -> Tensor | dict[str, Tensor]:
    """Clip the gradients of a π- or μ-net; a growing layer's gradient is measured in function space.

    Norms are of the raw gradients, before learning rates and multipliers. A zero norm leaves its tensor alone; there is no
    epsilon.

    Args:
        model: any module built from pizoo's layers, after ``backward``.
        max_norm: the largest norm allowed. None, 0 (the paper's convention) or infinity: measure only.
        per_param: each tensor is scaled by ``min(1, max_norm / norm)``; else all by one factor from the root of the sum of
            squares.
        exclude_readout: leave the read-out's weight out, of the norm and of the scaling (what few-shot training does, where
            the read-out's learning-rate multiplier is 0).

    Returns:
        before clipping: the global norm, 0-d; with ``per_param`` a dict from parameter name to norm.

    Raises:
        ValueError: a negative or NaN ``max_norm``; no gradient at all.
    """
    if max_norm is None or max_norm == 0:
        max_norm = math.inf
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive, or None for no clipping")
    weights = {
        name: param
        for name, role, param in named_roles(model)
        if param.grad is not None and not (exclude_readout and role == "readout")
    }
    if not weights:
        raise ValueError("model has no gradients to clip; call clip_grad_norm_ after backward")
    norms = {name: grad_norm(param.grad) for name, param in weights.items()}
    if per_param:
        for name, param in weights.items():
            _scale(param, norms[name], max_norm)
        return norms
    total = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms.values()]))
    for param in weights.values():
        _scale(param, total, max_norm)
    return total


def grad_norm(grad: Tensor) -> Tensor:
    """Norm of a gradient, 0-d: of pending rows in function space, else Frobenius, summed in at least float32."""
    if isinstance(grad, PendingRows):
        return grad.norm()
    return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))


def clip_threshold(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """``max_norm`` scaled by how far the schedule has moved the learning rate: the threshold drops together with the lr.

    It stays above 0, which :func:`clip_grad_norm_` takes for no clipping: at a learning rate of 0 nothing passes, so that
    no unclipped gradient enters a velocity.
    """
    group = optimizer.param_groups[0]
    initial = group.get("initial_lr", group["lr"])
    if not (max_norm and initial):
        return max_norm
    return max(max_norm * (group["lr"] / initial), SMALLEST_THRESHOLD)


def _scale(param: nn.Parameter, norm: Tensor, max_norm: float) -> None:
    if math.isfinite(max_norm):
        # A zero norm divides to infinity, which the clamp turns into 1: no host synchronisation, no epsilon.
        factor = (max_norm / norm).clamp(max=1)
        param.grad.mul_(factor.to(param.grad.device))


def _decay_factor(group: dict[str, Any]) -> float:
    decay = group["lr"] * group["weight_decay"] * group["weight_decay_mult"]
    if decay >= 1:
        raise ValueError(
            f"lr * weight_decay * multiplier is {group['lr']} * {group['weight_decay']} * {group['weight_decay_mult']} "
            f"= {decay:g}; it must be below 1"
        )
    return 1 - decay


def _check_non_negative(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
