"""Kernels of networks that do not learn features, NNGP and NTK: regressors, kept as dual coefficients; few-shot learners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pizoo import functional, kernels
from pizoo.data import fingerprint
from pizoo.models.adapt import Adaptable, check_layout
from pizoo.nn import check_finite, check_positive


def _check_kernel(d_in: int, d_out: int, kernel: dict[str, Any]) -> None:
    """Raise ValueError for the first of a kernel's hyper-parameters that is none."""
    check_positive(d_in=d_in, d_out=d_out, depth=kernel["depth"])
    check_finite(**{name: value for name, value in kernel.items() if name not in ("depth", "form")})


class KernelRegressor(nn.Module):
    """Kernel ridge regression on one-hot labels minus 0.5; ``forward`` gives one score per class, argmax predicts.

    It holds dual coefficients ``dual`` [n, classes] in float64 and needs its n training inputs to predict: :meth:`fit` keeps
    them, a loaded regressor gets them by :meth:`attach`, which recognises them by their fingerprint.

    Args:
        d_in: input dimension.
        d_out: number of classes.
        ridge: added to the diagonal of the kernel, positive.
        train_fingerprint: of the training inputs (set by :meth:`fit`).
        kernel: hyper-parameters of the kernel function, see the subclasses.
    """

    kernel_function = None
    input_size: tuple[int, ...] | None = None  # as of a net: pizoo.models.adapt.Adaptable

    def __init__(self, d_in: int, d_out: int, ridge: float = 1e-4, train_fingerprint: str | None = None, **kernel: Any):
        super().__init__()
        _check_kernel(d_in, d_out, kernel)
        check_finite(ridge=ridge)
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge}; it must be positive")
        self.d_in, self.num_classes, self.ridge, self.kernel = d_in, d_out, ridge, kernel
        self.train_fingerprint = train_fingerprint
        self.register_buffer("dual", torch.zeros(0, d_out, dtype=torch.float64))
        self.register_buffer("train_x", None, persistent=False)

    @property
    def hparams(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        return {
            "d_in": self.d_in,
            "d_out": self.num_classes,
            "ridge": self.ridge,
            "train_fingerprint": self.train_fingerprint,
            **self.kernel,
        }

    def kernel_matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """The kernel between inputs [n, d] and [m, d] in x's dtype: [n, m], and memory for little more than that."""
        return kernels.matrix(self._function, x, y)

    def scores(self, x: Tensor, train_x: Tensor) -> Tensor:
        """What the first training inputs ``train_x`` [m, d] contribute to the scores of inputs x [n, d]: [n, classes].

        All of them: the scores. The kernel between x and train_x is never held as a whole.
        """
        return kernels.product(self._function, x, train_x, self.dual)

    def _function(self, x: Tensor, y: Tensor) -> Tensor:
        return getattr(functional, self.kernel_function)(x, y, **self.kernel)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> KernelRegressor:
        """Solve for the dual coefficients on inputs x [n, d] or [n, C, H, W] and labels y int64 [n]; float64 throughout.

        Raises:
            ValueError: shapes that do not fit, labels out of range, a kernel that needs a larger ridge.
        """
        x = self._flatten(x).double()
        if y.shape != (len(x),) or y.dtype != torch.int64:
            raise ValueError(f"y has shape {list(y.shape)} and dtype {y.dtype}; it must be [{len(x)}] of torch.int64")
        if y.min() < 0 or y.max() >= self.num_classes:
            raise ValueError(f"y has labels from {y.min()} to {y.max()}; they must lie in 0 to {self.num_classes - 1}")
        targets = functional.centred_one_hot(y.to(x.device), self.num_classes)
        self.dual = functional.solve_ridge(self.kernel_matrix(x, x), targets, self.ridge)
        self.train_x, self.train_fingerprint = x, fingerprint(x)
        return self

    def attach(self, train_x: Tensor) -> KernelRegressor:
        """Give a loaded regressor its training inputs, normalised as its recipe says, in the order it was fitted on.

        Raises:
            ValueError: other inputs than those it was fitted on.
        """
        train_x = self._flatten(train_x).double()
        found = fingerprint(train_x)
        if found != self.train_fingerprint:
            raise ValueError(
                f"train_x {list(train_x.shape)} has fingerprint {found[:12]}; this regressor was fitted on "
                f"{len(self.dual)} inputs with fingerprint {str(self.train_fingerprint)[:12]}"
            )
        self.train_x = train_x.to(self.dual.device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[B, d] or [B, C, H, W] -> scores [B, classes], float64.

        Raises:
            RuntimeError: no training inputs yet.
        """
        if self.train_x is None:
            raise RuntimeError(
                f"this {type(self).__name__} predicts from its training inputs: call attach(train_x) first, or fit(x, y)"
            )
        return self.scores(self._flatten(x).to(self.dual), self.train_x)

    def _flatten(self, x: Tensor) -> Tensor:
        if self.input_size is not None:
            check_layout(x.shape[1:], self.input_size)
        x = x.flatten(1) if x.ndim > 1 else x
        if x.ndim != 2 or x.shape[1] != self.d_in or len(x) == 0:
            raise ValueError(
                f"x has shape {list(x.shape)} when flattened; it must be [n, {self.d_in}] with n of at least 1"
            )
        return x

    def _load_from_state_dict(self, state_dict, prefix, *args):
        dual = state_dict.get(prefix + "dual")
        if dual is not None and dual.ndim == 2 and dual.shape[1] == self.num_classes:
            self.dual = self.dual.new_empty(dual.shape)  # any number of training inputs
            self.train_x = None  # those of another fit would give wrong predictions without a word
        super()._load_from_state_dict(state_dict, prefix, *args)


class NNGPRegressor(KernelRegressor):
    """Regression with :func:`pizoo.functional.nngp`, whose parameters these are."""

    kernel_function = "nngp"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        depth: int = 2,
        var_w: float = 1.0,
        var_b: float = 0.0,
        ridge: float = 1e-4,
        train_fingerprint: str | None = None,
    ):
        super().__init__(d_in, d_out, ridge, train_fingerprint, depth=depth, var_w=var_w, var_b=var_b)


class NTKRegressor(KernelRegressor):
    """Regression with :func:`pizoo.functional.ntk`, whose parameters these are."""

    kernel_function = "ntk"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        depth: int = 2,
        var_w: float = 1.0,
        var_b: float = 0.0,
        first_layer_lr_mult: float = 1.0,
        last_layer_lr_mult: float = 1.0,
        bias_lr_mult: float = 1.0,
        form: str = "reference",
        ridge: float = 1e-4,
        train_fingerprint: str | None = None,
    ):
        super().__init__(
            d_in,
            d_out,
            ridge,
            train_fingerprint,
            depth=depth,
            var_w=var_w,
            var_b=var_b,
            first_layer_lr_mult=first_layer_lr_mult,
            last_layer_lr_mult=last_layer_lr_mult,
            bias_lr_mult=bias_lr_mult,
            form=form,
        )


class KernelLearner(Adaptable):
    """A predictor of zeros that adapts to a task by gradient steps in the space of functions of a kernel.

    After one step its logits are ``step_size K(query, support) (onehot - softmax(0)) / N``. It has nothing to train.

    Args:
        d_in: input dimension.
        d_out: number of classes of a task.
        kernel: hyper-parameters of the kernel function, see the subclasses.
    """

    kernel_function = None

    def __init__(self, d_in: int, d_out: int, **kernel: Any):
        super().__init__()
        _check_kernel(d_in, d_out, kernel)
        self.hparams = {"d_in": d_in, "d_out": d_out, **kernel}
        self.d_in, self.num_classes = d_in, d_out
        self._readout = _KernelReadout(getattr(functional, self.kernel_function), kernel, d_out)

    @property
    def all_layers(self) -> list[nn.Module]:
        return [self._readout]

    def features(self, x: Tensor) -> Tensor:
        """The inputs themselves, [B, d_in]."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, d_in] or [B, C, H, W] -> zeros [B, d_out]: what it predicts before it has seen a task."""
        return self.readout(self.features(x.flatten(1)))


class _KernelReadout(nn.Module):
    """Zeros, with a kernel that says where gradient steps lead."""

    alpha, bias, bias_alpha = 1.0, None, 0.0

    def __init__(self, function, kernel: dict[str, Any], d_out: int):
        super().__init__()
        self.function, self.hparams, self.d_out = function, kernel, d_out

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y, **self.hparams)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.d_out)


class NNGPLearner(KernelLearner):
    """Few-shot learning with :func:`pizoo.functional.nngp`, whose parameters these are."""

    kernel_function = "nngp"

    def __init__(self, d_in: int, d_out: int, depth: int = 2, var_w: float = 1.0, var_b: float = 0.0):
        super().__init__(d_in, d_out, depth=depth, var_w=var_w, var_b=var_b)


class NTKLearner(KernelLearner):
    """Few-shot learning with :func:`pizoo.functional.ntk`, whose parameters these are."""

    kernel_function = "ntk"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        depth: int = 2,
        var_w: float = 1.0,
        var_b: float = 0.0,
        first_layer_lr_mult: float = 1.0,
        last_layer_lr_mult: float = 1.0,
        bias_lr_mult: float = 1.0,
        form: str = "reference",
    ):
        super().__init__(
            d_in,
            d_out,
            depth=depth,
            var_w=var_w,
            var_b=var_b,
            first_layer_lr_mult=first_layer_lr_mult,
            last_layer_lr_mult=last_layer_lr_mult,
            bias_lr_mult=bias_lr_mult,
            form=form,
        )
