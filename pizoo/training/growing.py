"""Growing layers while the engine trains them: what they keep in Python lies on the device, where a step can change it."""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo.nn import InfPiLinear
from pizoo.optim import FOLD_DECAY_BELOW


class GrowingState:
    """A growing layer as the engine sees it: whole storages, and on the device what the layer keeps in Python.

    Attributes:
        count: of all its rows, int64 [1].
        held: of those in these storages, int64 [1]; fewer where processes share the rows.
    """

    def __init__(self, layer: InfPiLinear):
        self.layer, self.share = layer, layer.share
        self.storages = layer.storages
        self.rows, (self.bmult,) = self.storages[:3], self.storages[3:] or (None,)
        self.dtype, device = layer.A.dtype, layer.device
        self.count = torch.tensor([layer.count], device=device)
        self.held = self.share.count(self.count)
        self.decay = torch.tensor([layer.decay], dtype=torch.float64, device=device)

    @property
    def options(self) -> tuple:
        """What the ops take beside rows and inputs."""
        return self.held, self.bmult, self.layer.shared

    def grow(self, appended: Tensor) -> None:
        """Count rows that were dealt."""
        self.count.add_(appended)
        if self.layer.shared:
            self.held.copy_(self.share.count(self.count))

    def dealt(self, new: int) -> slice | Tensor:
        """Which of ``new`` rows to write here. In every step as many: one too many lies behind those counted."""
        if not self.layer.shared:
            return slice(None)
        turns = torch.arange(0, new, self.share.of, device=self.count.device)
        return (self.share.first(self.count) + turns).clamp(max=new - 1)

    def sync(self) -> None:
        """Tell the layer how far it has grown."""
        self.layer.grown(self.count.item(), self.decay.item())
        if self.layer.decay < FOLD_DECAY_BELOW:
            self.layer.fold_decay()
            self.decay.fill_(1)
