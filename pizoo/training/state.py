"""What a training resumes from: net and optimizer, to tensors by name and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pizoo.checkpoint import CheckpointError, Epoch
from pizoo.memory import is_out_of_memory
from pizoo.optim import PiSGD
from pizoo.rows import GrowingWeight


def optimizer_tensors(model: nn.Module, optimizer: PiSGD) -> dict[str, Tensor]:
    """The optimizer's tensors (velocities), named after the parameters they belong to."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        f"{key}.{names[param]}": value
        for param, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def restore(model: nn.Module, optimizer: PiSGD, epoch: Epoch) -> None:
    """Put net and optimizer where they stood after ``epoch``, to the bit; rows go into the room reserved for them.

    Raises:
        CheckpointError: the checkpoint is of another net.
    """
    try:
        epoch.state.fill(model)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"the checkpoint does not fit the recipe's net: {error}") from None
    params = dict(model.named_parameters())
    for name, value in epoch.optimizer.items():
        key, _, param = name.partition(".")
        owner = params[param]
        device = owner.rows.device if isinstance(owner, GrowingWeight) else owner.device
        optimizer.state[owner][key] = value.to(device)
