"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub``: what every user of the Hub knows, for the zoo's networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin

PROBE_SEED = 0


class Pretrained(PyTorchModelHubMixin):
    """huggingface_hub's mixin, on pizoo's own checkpoints: there is one format, whoever writes it.

    ``save_pretrained(folder)`` writes what :func:`pizoo.load` reads, ``push_to_hub(repo_id)`` the same in one commit; both
    are the mixin's.
    """

    # What reads and writes checkpoints stands above the networks, and is imported where it is needed.

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        epoch: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fetching: Any,
    ) -> Self:
        """Load a checkpoint: :func:`pizoo.load`, which see, for a net of this class.

        Args:
            pretrained_model_name_or_path: ``OWNER/NAME`` on the Hub, a folder, or an entry of the zoo.
            fetching: ``token``, ``cache_dir``, ``force_download``, ``local_files_only``, as the mixin has them.

        Raises:
            TypeError: a checkpoint of another class.
        """
        from pizoo import hub, zoo

        name = os.fspath(pretrained_model_name_or_path)
        if not (hub.is_address(name) or Path(name).is_dir() or name in zoo.list_entries(name)):
            name = hub.PREFIX + name
        model = zoo.load(name, device=device, dtype=dtype, revision=revision, epoch=epoch, **fetching)
        if not isinstance(model, cls):
            raise TypeError(
                f"{name} holds a {type(model).__name__}; {cls.__name__}.from_pretrained loads no other class"
            )
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        from pizoo import checkpoint

        config = getattr(self, "config", None) or {"architecture": None, "num_classes": self.num_classes}
        anchor = next(self.parameters())
        # Inputs of no data set: they check that the weights are these, which is what a probe is for.
        noise = torch.randn(checkpoint.PROBE_INPUTS, self.d_in, generator=torch.Generator().manual_seed(PROBE_SEED))
        probe = {"x": noise.to(anchor.device, anchor.dtype)}
        training = self.training
        try:
            logits = checkpoint.probe_logits(self.eval(), **probe)
        finally:
            self.train(training)
        checkpoint.save(save_directory, self, config, {**probe, "logits": logits})

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The mixin's card, with what loads the net."""
        from pizoo import hub

        kind, source = type(self).__name__, f"{hub.PREFIX}OWNER/NAME"
        return hub.plain_card(kind, f"A `{kind}` with {self.d_in} inputs and {self.num_classes} outputs", source)
