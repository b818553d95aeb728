"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each, as classes to draw few-shot tasks from.

The split into training, validation and test classes (1028 / 172 / 423) is that of Vinyals et al. (2016) and ships with the
package as names. Source: Lake, Salakhutdinov, Tenenbaum (2015), MIT licence.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pizoo.data.files import integer_labels, read_arrays, text_names
from pizoo.data.tasks import TaskPool

SPLIT_NAMES = Path(__file__).parents[1] / "assets" / "omniglot_split.json"
CONTENTS = (
    "images uint8 [32460, 105, 105] (255 = ink, 0 = paper), label [32460], class_names [1623] "
    "('background/ALPHABET/characterNN' or 'evaluation/...')"
)
DRAWN_SIZE, SIZE = 105, 28  # pixels a side, as drawn and as the nets see them
DRAWINGS = 20


def split_names() -> dict[str, list[str]]:
    """Names of the classes of ``train``, ``validation`` and ``test``."""
    return json.loads(SPLIT_NAMES.read_text())


def read(path: Path) -> dict[str, TaskPool]:
    """The three splits of the file at ``path``: images resized to [1, 28, 28] uint8, ink 255; not rotated.

    Raises:
        ValueError: naming the file, the key, what was found and what is wanted.
    """
    arrays = read_arrays(path, required=("images", "label", "class_names"))
    names = text_names(arrays["class_names"], path)
    labels = integer_labels(arrays["label"], f"{path}: label")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.shape != (len(labels), DRAWN_SIZE, DRAWN_SIZE):
        raise ValueError(
            f"{path}: images are {images.dtype} {list(images.shape)}; they must be uint8 [{len(labels)}, {DRAWN_SIZE}, "
            f"{DRAWN_SIZE}], one for every label"
        )
    numbers = {name: i for i, name in enumerate(names)}
    if missing := [name for part in split_names().values() for name in part if name not in numbers]:
        raise ValueError(f"{path}: class_names lacks {missing[0]!r} and {len(missing) - 1} more of the split's classes")
    counts = torch.bincount(labels, minlength=len(names))
    if len(counts) != len(names) or not (counts == DRAWINGS).all():
        raise ValueError(
            f"{path}: label has classes 0 to {len(counts) - 1} with {counts.min()} to {counts.max()} images; it must be 0 to "
            f"{len(names) - 1} with {DRAWINGS} each"
        )
    small = shrink(images)
    by_class = small[labels.argsort(stable=True)].unflatten(0, (len(names), DRAWINGS))
    return {
        part: TaskPool(part, by_class[torch.tensor([numbers[name] for name in members])])
        for part, members in split_names().items()
    }


def shrink(images: np.ndarray) -> Tensor:
    """Resize to 28 x 28, bilinear with antialiasing, by PIL (torch's rounds otherwise here and there, and by machine).

    uint8 [n, h, w] -> [n, 1, 28, 28].
    """
    from PIL import Image

    small = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    return torch.from_numpy(np.stack(small))[:, None]


def download(scratch: Path) -> dict[str, np.ndarray]:
    """The arrays of the file, from what torchvision downloads into a scratch folder."""
    from PIL import Image
    from torchvision.datasets import Omniglot

    images, labels, drawings, names = [], [], [], []
    for part in ("background", "evaluation"):
        Omniglot(str(scratch), background=part == "background", download=True)
        folder = scratch / "omniglot-py" / f"images_{part}"
        for character in sorted(folder.glob("*/character*")):
            names.append(f"{part}/{character.parent.name}/{character.name}")
            for file in sorted(character.glob("*.png")):
                with Image.open(file) as image:
                    images.append(255 - np.asarray(image.convert("L")))  # drawn in black on white
                labels.append(len(names) - 1)
                drawings.append(int(file.stem.rpartition("_")[2]))
    if not images:
        raise RuntimeError(f"no images_*/ALPHABET/characterNN/*.png in what was downloaded to {scratch}")
    return {
        "images": np.stack(images),
        "label": np.array(labels, dtype=np.int16),
        "class_names": np.array(names),
        "drawing": np.array(drawings, dtype=np.uint8),
        **{
            f"split_{'val' if part == 'validation' else part}": np.array(
                [names.index(name) for name in members if name in names], dtype=np.int16
            )
            for part, members in split_names().items()
        },
    }
