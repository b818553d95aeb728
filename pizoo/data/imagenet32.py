"""ImageNet at 32x32, from its official files, and Tiny-ImageNet at 32x32, which stands in where these cannot be had.

Sources: Chrabaszcz, Loshchilov, Hutter (2017), A Downsampled Variant of ImageNet, whose files image-net.org gives to whoever
registers; the 250 classes are those of Yang, Santacroce, Hu (ICLR 2022). Tiny-ImageNet-200: Stanford CS231n.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pizoo.data.dataset import Dataset, check_classes
from pizoo.data.files import channel_first, integer_labels, read_arrays, text_names
from pizoo.data.pickles import read_pickle

CLASSES = 1000  # of ImageNet; its files count them from 1
SIZE = (3, 32, 32)
TRAIN_FILES, TEST_FILES = tuple(f"train_data_batch_{i}" for i in range(1, 11)), ("val_data",)
PAPERS_CLASSES = Path(__file__).parents[1] / "assets" / "imagenet250_classes.json"
CONTENTS = (
    "the eleven official files of the 32x32 ImageNet, train_data_batch_1 to train_data_batch_10 and val_data (register at "
    "https://image-net.org/download-images.php, Download downsampled image data, and unpack them there)"
)
TINY_CONTENTS = (
    "train_images uint8 [100000, 32, 32, 3], train_labels [100000], val_images [10000, 32, 32, 3], val_labels [10000], "
    "class_words [200]"
)
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def papers_classes() -> tuple[int, ...]:
    """The 250 classes of the paper: numbers from 0, in the order of the 32x32 release."""
    return tuple(json.loads(PAPERS_CLASSES.read_text()))


def read(folder: Path, classes: Sequence[int] | None = None) -> Dataset:
    """Some classes of the official files in ``folder``; the validation images are the test part.

    Args:
        classes: numbers 0 to 999 of the classes to keep; the k-th becomes label k. None: the paper's 250.

    Raises:
        ValueError: a class twice, a number that is none; files that are not as they should be, by their names.
    """
    classes = papers_classes() if classes is None else tuple(classes)
    check_classes(classes, CLASSES, "ImageNet")
    (train_x, train_y), (test_x, test_y) = (_read_part(folder, names, classes) for names in (TRAIN_FILES, TEST_FILES))
    names = tuple(str(number) for number in classes)
    return Dataset("imagenet32", train_x, train_y, test_x, test_y, names, source=str(folder))


def _read_part(folder: Path, names: Iterable[str], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and labels [N] of the files ``names``; one file is in memory at a time, and what is kept."""
    label_of = np.full(CLASSES, -1)
    label_of[list(classes)] = np.arange(len(classes))
    images, labels = [], []
    for name in names:
        x, y = _read_batch(folder / name)
        y = label_of[y]
        images.append(torch.from_numpy(x[y >= 0]).view(-1, *SIZE))
        labels.append(torch.from_numpy(y[y >= 0]))
    if not sum(map(len, labels)):
        raise ValueError(f"{folder}: {', '.join(names)} hold no image of the {len(classes)} classes asked for")
    return torch.cat(images), torch.cat(labels)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 3072], channel first, and class numbers from 0 [N], of one official file."""
    batch = read_pickle(path)
    if not isinstance(batch, dict) or not {"data", "labels"} <= set(batch):
        found = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"{path} holds {found}; it must be a dict with data and labels")
    pixels = batch["data"]
    try:
        numbers = np.array(batch["labels"])
    except (TypeError, ValueError):
        numbers = np.array([None])
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        shown = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: data is {shown}; it must be uint8 [N, 3072], images of 3 x 32 x 32 pixels")
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(pixels),):
        raise ValueError(
            f"{path}: labels are {numbers.dtype} {list(numbers.shape)}; they must be {len(pixels)} integers"
        )
    if len(numbers) and not (numbers.min() >= 1 and numbers.max() <= CLASSES):
        raise ValueError(f"{path}: labels are {numbers.min()} to {numbers.max()}; they must be 1 to {CLASSES}")
    return pixels, numbers.astype(np.int64) - 1


def read_tiny(path: Path) -> Dataset:
    """Tiny-ImageNet-200 at 32x32 from its ``.npz``; the validation images, which have labels, are the test part.

    Raises:
        ValueError: naming the file, the key, what was found and what is wanted.
    """
    arrays = read_arrays(path, ("train_images", "train_labels", "val_images", "val_labels", "class_words"))
    parts = []
    for part in ("train", "val"):
        parts.append(channel_first(arrays[f"{part}_images"], f"{path}: {part}_images"))
        parts.append(integer_labels(arrays[f"{part}_labels"], f"{path}: {part}_labels"))
    names = text_names(arrays["class_words"], path, "class_words")
    dataset = Dataset("tinyimagenet32", *parts, class_names=names, source=str(path))
    dataset.require(SIZE, 200)
    return dataset


def download_tiny(scratch: Path) -> dict[str, np.ndarray]:
    """The arrays of the ``.npz``, from the official archive."""
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(TINY_URL, str(scratch))
    return shrink_tiny(scratch / "tiny-imagenet-200")


def shrink_tiny(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the ``.npz``, from the unpacked archive: every image halved by averaging 2 x 2 pixels."""
    wnids = (folder / "wnids.txt").read_text().split()
    words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines())
    wnids = sorted(wnids)
    label_of = {wnid: k for k, wnid in enumerate(wnids)}
    train = [(file, label_of[wnid]) for wnid in wnids for file in sorted((folder / "train" / wnid).rglob("*.JPEG"))]
    lines = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    val = [(folder / "val" / "images" / name, label_of[wnid]) for name, wnid, *_ in lines]
    arrays = {"wnids": np.array(wnids), "class_words": np.array([words[wnid] for wnid in wnids])}
    for part, samples in (("train", train), ("val", val)):
        arrays[f"{part}_images"] = np.stack([_halved(file) for file, _ in samples])
        arrays[f"{part}_labels"] = np.array([label for _, label in samples], dtype=np.uint8)
    return arrays


def _halved(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").reduce(2))
