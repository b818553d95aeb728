"""The feature kernel of a trained net. Source: Yang, Santacroce, Hu (ICLR 2022), section 6 (transfer)."""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo.models import PiNet
from pizoo.models.base import batched

FEATURE_BATCH = 1000


@torch.no_grad()
def feature_kernel(model: PiNet, x: Tensor, y: Tensor | None = None, batch_size: int = FEATURE_BATCH) -> Tensor:
    """The kernel of a net's last hidden representation: what it has learned, for kernel methods elsewhere.

    Infinite net: ``F00(cos(g, g'))`` of last hidden pre-activations; finite net: ``cos(φ, φ') / 2`` of last hidden
    post-activations.

    Args:
        model: a network (not a kernel regressor, which has no features); evaluated in eval mode.
        x: inputs as the net takes them, normalised, [n, d] or [n, C, H, W].
        y: other inputs [m, ...]; None: x.
        batch_size: inputs at a time.

    Returns:
        [n, m] on the net's device, in the dtype of its features (float32 at least).

    Raises:
        TypeError: a model without features.
    """
    if not isinstance(model, PiNet):
        raise TypeError(f"model is a {type(model).__name__}; the feature kernel is of an InfPiMLP, FinPiMLP or MuMLP")
    training = model.training
    model.eval()
    try:
        features = [_features(model, part, batch_size) for part in ((x,) if y is None else (x, y))]
    finally:
        model.train(training)
    return model.feature_kernel(features[0], features[-1])


def _features(model: PiNet, x: Tensor, batch_size: int) -> Tensor:
    features = batched(model.features, x.to(next(model.parameters()).device), batch_size)
    return features.to(torch.promote_types(features.dtype, torch.float32))
