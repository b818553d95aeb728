"""The feature kernel of a trained net. Source: Yang, Santacroce, Hu (ICLR 2022), section 6 (transfer)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pizoo import kernels
from pizoo.evaluation.accuracy import over_processes
from pizoo.files import write_atomically
from pizoo.models import PiNet
from pizoo.models.base import batched

FEATURE_BATCH = 1000


@torch.no_grad()
def feature_kernel(
    model: PiNet,
    x: Tensor,
    y: Tensor | None = None,
    batch_size: int = FEATURE_BATCH,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The kernel of a net's last hidden representation: what it has learned, for kernel methods elsewhere.

    Infinite net: ``F00(cos(g, g'))`` of last hidden pre-activations; finite net: ``cos(φ, φ') / 2`` of last hidden
    post-activations. It is computed block by block, in memory for little more than itself.

    Args:
        model: a network (not a kernel regressor, which has no features); evaluated in eval mode.
        x: inputs as the net takes them, normalised, [n, d] or [n, C, H, W].
        y: other inputs [m, ...]; None: x.
        batch_size: inputs at a time.
        dtype: of the kernel; None: of the features (float32 at least).

    Returns:
        [n, m] on the net's device.

    Raises:
        TypeError: a model without features.
        ValueError: inputs of another size than the net's.
        NotEnoughMemory: the kernel does not fit on the net's device; the message has its size.
    """
    found = [features(model, part, batch_size, dtype) for part in ((x,) if y is None else (x, y))]
    first, last = found[0], found[-1]
    remedy = "; save_feature_kernel writes it to a file instead"
    kernels.check_memory(len(first), len(last), first.element_size(), first.device, remedy=remedy)
    return kernels.matrix(model.feature_kernel, first, last)


@torch.no_grad()
def features(
    model: PiNet, x: Tensor, batch_size: int = FEATURE_BATCH, dtype: torch.dtype | None = None, normalize=None
) -> Tensor:
    """What the feature kernel is a kernel of, on the net's device: the net's ``features`` in eval mode, [n, num_features].

    In several processes, all of which must ask, each computes a part of them.

    Args:
        x: inputs as the net takes them, on any device.
        batch_size: inputs at a time.
        dtype: of the result; None: the net's (float32 at least).
        normalize: what makes inputs out of x (:class:`pizoo.data.Normalize`), batch by batch; None: x are.

    Raises:
        TypeError: a model without features.
        ValueError: inputs of another size than the net's.
    """
    if not isinstance(model, PiNet):
        raise TypeError(f"model is a {type(model).__name__}; the feature kernel is of an InfPiMLP, FinPiMLP or MuMLP")
    anchor, training = next(model.parameters()), model.training

    def of(part: Tensor) -> Tensor:
        part = part.to(anchor.device)
        return model.features(part if normalize is None else normalize(part, anchor.dtype))

    model.eval()
    try:
        found = over_processes(model, lambda part: batched(of, part, batch_size), x).to(anchor.device)
    finally:
        model.train(training)
    return found.to(dtype or torch.promote_types(found.dtype, torch.float32))


def save_feature_kernel(path: str | os.PathLike, model: PiNet, x: Tensor, y: Tensor | None = None) -> tuple[int, int]:
    """Write the kernel between features x [n, k] and y [m, k] (None: x) of a net to an ``.npy``, in their dtype.

    Some rows at a time: it need not fit in memory. The file appears complete or not at all. Returns its shape.

    Raises:
        CheckpointError: the disk is full.
    """
    y = x if y is None else y
    shape = (len(x), len(y))
    described = {"descr": np.dtype(str(x.dtype).removeprefix("torch.")).str, "fortran_order": False, "shape": shape}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, described)
            for part in x.split(kernels.BLOCK_ROWS):
                file.write(kernels.matrix(model.feature_kernel, part, y).cpu().numpy().data)

    write_atomically(Path(path), write)
    return shape
