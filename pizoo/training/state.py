"""What a training resumes from: net and optimizer, to tensors by name and back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pizoo.files import CheckpointError
from pizoo.memory import is_out_of_memory
from pizoo.models.base import persistent_tensors
from pizoo.optim import PiSGD
from pizoo.rows import GrowingWeight, growing_layers
from pizoo.segments import Epoch


def optimizer_tensors(model: nn.Module, optimizer: PiSGD) -> dict[str, Tensor]:
    """The optimizer's tensors (velocities), named after the parameters they belong to; of rows, those of all rows."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        f"{key}.{names[param]}": param.rows.gathered(value) if isinstance(param, GrowingWeight) else value
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
        if isinstance(owner, GrowingWeight):
            optimizer.state[owner][key] = owner.rows.dealt(value).to(owner.rows.device)
        else:
            optimizer.state[owner][key] = value.to(owner.device)


class Behind:
    """Work that goes on behind its caller, one piece at a time, in the order given; what it raises comes out in ``wait``."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._work: Future | None = None

    def submit(self, work: Callable[[], None]) -> None:
        self.wait()
        self._work = self._thread.submit(work)

    def wait(self) -> None:
        """Until the work given is done; interrupted, the next call goes on waiting."""
        if self._work is not None:
            try:
                self._work.result()
            finally:
                if self._work.done():
                    self._work = None


class Snapshot:
    """A net as it stands, to return to while it trains on. Of rows only ``amult`` is copied: stored rows never change."""

    def __init__(self, model: nn.Module):
        self.rows = {
            name: (layer.count, layer.stored_amult.clone(), layer.decay)
            for name, layer in growing_layers(model).items()
        }
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._dense(model)}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the net back; rows appended since are forgotten."""
        for name, tensor in self._dense(model):
            tensor.copy_(self.tensors[name])
        for name, layer in growing_layers(model).items():
            count, amult, decay = self.rows[name]
            layer.grown(count, decay)
            layer.stored_amult.copy_(amult)

    def _dense(self, model: nn.Module):
        """Names and tensors of all but rows."""
        rows = {f"{name}.{part}" for name in growing_layers(model) for part in ("A", "B", "amult")}
        return [(name, tensor) for name, tensor in persistent_tensors(model) if name not in rows]
