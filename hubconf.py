"""torch.hub: one entry point per entry of the zoo, derived from it."""

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub", "opt_einsum"]

from pizoo import zoo as _zoo  # noqa: E402 (torch.hub reads `dependencies` before anything is imported)

globals().update({entry: _zoo.hub_entrypoint(entry) for entry in _zoo.list_entries()})
