"""The data sets that are known by name: where their files are, how they are read, and how they are made.

Sources: CIFAR-10, Krizhevsky (2009); digits, Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits (UCI
Machine Learning Repository, CC BY 4.0), the 1797 test images as scikit-learn bundles them; Omniglot, see
:mod:`pizoo.data.omniglot`; ImageNet and Tiny-ImageNet at 32x32, see :mod:`pizoo.data.imagenet32`.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pizoo.data import imagenet32, omniglot
from pizoo.data.dataset import Dataset, keep_classes, take_subset
from pizoo.data.files import channel_first, integer_labels, number_names, read_arrays, read_image_folder, read_npz
from pizoo.data.tasks import TaskPool
from pizoo.files import write_atomically

ASSETS = Path(__file__).parents[1] / "assets"
DIGITS_SPLITS = 10
IMAGENET32 = "imagenet32"


class DataNotFoundError(FileNotFoundError):
    """A data set is not where it was looked for; the message says where that was and how to get it there."""


def data_directory(data_dir: str | os.PathLike | None = None) -> Path:
    """``data_dir``, else ``$PIZOO_DATA``, else ``~/.cache/pizoo/data``."""
    return Path(data_dir or os.environ.get("PIZOO_DATA") or "~/.cache/pizoo/data").expanduser()


def dataset_path(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Where the file of a known data set (of ``imagenet32``: the folder of its official files) is, or would have to be.

    Raises:
        ValueError: no data set of that name.
    """
    if name == IMAGENET32:
        return data_directory(data_dir) / name
    return ASSETS / f"{name}.npz" if _known(name).download is None else data_directory(data_dir) / f"{name}.npz"


def list_datasets() -> list[str]:
    """Names of the data sets that are known: to :func:`load_dataset`, and to :func:`load_tasks`."""
    return sorted(_KNOWN | _TASKS)


def load_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    split: int = 0,
    subset: int | None = None,
    input_size: Iterable[int] | None = None,
    classes: int | None = None,
    keep: Sequence[int] | None = None,
) -> Dataset:
    """Load a known data set, or the user's own from ``path``.

    Args:
        name: ``"cifar10"``, ``"digits"``, ``"imagenet32"``, ``"tinyimagenet32"``; with ``path`` any name.
        data_dir: see :func:`data_directory`.
        path: the user's own ``.npz`` (see :func:`read_npz`) or folder of images (see :func:`read_image_folder`).
        split: which of the ten splits of the digits, 0 to 9.
        subset: keep this many training items (:func:`take_subset` with seed 0: the same whatever the training seed).
        input_size: the shape of one item, (C, H, W) or (d,); images of a folder are made so, all else must be so.
        classes: the number of classes there must be.
        keep: numbers of the classes to keep, the k-th of which becomes label k; None: all, of ``"imagenet32"`` the paper's
            250.

    Raises:
        DataNotFoundError: the file or folder is not there.
        ValueError: an unknown name, contents that are not as they should be.
    """
    size = None if input_size is None else tuple(input_size)
    if path is None:
        if name in _TASKS:
            raise ValueError(
                f"{name} holds classes to draw tasks from, no training and test images; load_tasks loads it"
            )
        read, file = _known(name).read, _existing(name, data_dir)
        if name == IMAGENET32:  # its files hold four times what is kept: what is not, is never in memory together
            dataset, keep = read(file, split, keep), None
        else:
            dataset = read(file, split)
    else:
        _check_split(name, split, 1)
        file = Path(path).expanduser()
        if not file.exists():
            raise DataNotFoundError(
                f"{file} is not there; data set {name!r} is to be read from it, an .npz or a folder"
            )
        dataset = read_image_folder(file, name, size) if file.is_dir() else read_npz(file, name)
    if keep is not None:
        dataset = keep_classes(dataset, keep)
    if size is not None or classes is not None:
        dataset.require(dataset.input_size if size is None else size, classes)
    return dataset if subset is None else take_subset(dataset, subset)


def load_tasks(name: str, data_dir: str | os.PathLike | None = None) -> dict[str, TaskPool]:
    """Load the classes of ``train``, ``validation`` and ``test`` to draw few-shot tasks from; see :mod:`pizoo.data.omniglot`.

    Raises:
        DataNotFoundError: the file is not there.
        ValueError: not a data set of tasks, contents that are not as they should be.
    """
    if name not in _TASKS:
        raise ValueError(f"no data set of tasks is called {name!r}; there is {', '.join(_TASKS)}")
    return _TASKS[name].read(_existing(name, data_dir))


def training_images(name: str) -> int | None:
    """About how many training images a known data set has, of ``imagenet32`` in the paper's 250 classes; None: not known."""
    return _KNOWN[name].training_images if name in _KNOWN else None


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Make the file of a known data set unless it is there, by downloading it; returns its path.

    The file appears complete or not at all: it is written under a temporary name, then renamed.

    Raises:
        ValueError: an unknown name.
        DataNotFoundError: ``imagenet32`` is not there, which can be downloaded by its registered users alone.
        RuntimeError: the download failed; the message says what was tried and where a file can be put instead.
    """
    source, path = _known(name), dataset_path(name, data_dir)
    if name == IMAGENET32:  # nobody may hand it on
        return _existing(name, data_dir)
    if source.download is None or path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as scratch:
        try:
            arrays = source.download(Path(scratch))
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{name} could not be downloaded through torchvision: {error}. An existing file can be put at {path}: "
                f"an .npz with {source.contents}"
            ) from error
        write_atomically(path, lambda temporary: _write_arrays(temporary, arrays))
    return path


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # to a name, numpy would add .npz
        np.savez(file, **arrays)


@dataclass(frozen=True)
class _Known:
    """A data set known by name: what its file holds, how to read it (split k of it), how to make it.

    ``download`` fills a scratch folder and returns the arrays of the file; ``None``: the file is in the package.
    ``training_images`` says about how many there are, for plans made without the data.
    """

    contents: str
    read: Callable[..., Dataset | dict[str, TaskPool]]
    download: Callable[[Path], dict[str, np.ndarray]] | None
    training_images: int | None = None


def _read_cifar10(path: Path, split: int) -> Dataset:
    _check_split("cifar10", split, 1)
    dataset = read_npz(path, "cifar10")
    if dataset.test_x is None:
        raise ValueError(f"{path}: no key 'test_images'; the file must hold {_KNOWN['cifar10'].contents}")
    dataset.require((3, 32, 32), 10)
    return dataset


def _download_cifar10(scratch: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    parts = {part: CIFAR10(str(scratch), train=part == "train", download=True) for part in ("train", "test")}
    arrays = {"class_names": np.array(parts["train"].classes)}
    for part, images in parts.items():
        arrays[f"{part}_images"] = images.data
        arrays[f"{part}_labels"] = np.array(images.targets, dtype=np.uint8)
    return arrays


def _read_digits(path: Path, split: int) -> Dataset:
    """Split k: the last quarter (449) of ``RandomState(k).permutation(1797)`` is the test part. Pixels are 0 to 16."""
    _check_split("digits", split, DIGITS_SPLITS)
    arrays = read_arrays(path, required=("images", "labels"))
    x, y = channel_first(arrays["images"], f"{path}: images"), integer_labels(arrays["labels"], f"{path}: labels")
    order = torch.from_numpy(np.random.RandomState(split).permutation(len(x)))
    train, test = order[: len(x) - len(x) // 4], order[len(x) - len(x) // 4 :]
    return Dataset("digits", x[train], y[train], x[test], y[test], number_names(y, f"{path}: labels"), source=str(path))


def _read_tinyimagenet32(path: Path, split: int) -> Dataset:
    _check_split("tinyimagenet32", split, 1)
    return imagenet32.read_tiny(path)


def _read_imagenet32(folder: Path, split: int, keep: Sequence[int] | None = None) -> Dataset:
    _check_split(IMAGENET32, split, 1)
    return imagenet32.read(folder, keep)


_KNOWN = {
    "cifar10": _Known(
        "train_images uint8 [50000, 32, 32, 3], train_labels [50000], test_images [10000, 32, 32, 3], "
        "test_labels [10000], class_names [10]",
        _read_cifar10,
        _download_cifar10,
        50_000,
    ),
    "digits": _Known("images uint8 [1797, 8, 8], labels [1797]", _read_digits, None),
    IMAGENET32: _Known(imagenet32.CONTENTS, _read_imagenet32, None, 320_000),
    "tinyimagenet32": _Known(imagenet32.TINY_CONTENTS, _read_tinyimagenet32, imagenet32.download_tiny, 100_000),
}
_TASKS = {"omniglot": _Known(omniglot.CONTENTS, omniglot.read, omniglot.download)}


def _existing(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The file of a known data set; raises DataNotFoundError if it is not there."""
    file = dataset_path(name, data_dir)
    parts = (
        [file / part for part in (*imagenet32.TRAIN_FILES, *imagenet32.TEST_FILES)] if name == IMAGENET32 else [file]
    )
    if not all(part.is_file() for part in parts):
        raise DataNotFoundError(_where_to_get(name, file, data_dir))
    return file


def _known(name: str) -> _Known:
    if name in _TASKS:
        return _TASKS[name]
    if name not in _KNOWN:
        near = difflib.get_close_matches(name, list_datasets(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no data set is called {name!r}; {hint}Known: {', '.join(list_datasets())}. Your own is read from a path: "
            "an .npz or a folder of images"
        )
    return _KNOWN[name]


def _check_split(name: str, split: int, splits: int) -> None:
    if not 0 <= split < splits:
        allowed = f"0 to {splits - 1}" if splits > 1 else "0"
        raise ValueError(f"split is {split}; {name} has the split {allowed}")


def _where_to_get(name: str, path: Path, data_dir: str | os.PathLike | None) -> str:
    environment = os.environ.get("PIZOO_DATA")
    remedy = f"Make the file with `pizoo data prepare {name}`, or put an .npz there with"
    if name == IMAGENET32:
        remedy = "It cannot be had without registration; tinyimagenet32 stands in for it. What has to be there are"
    return (
        f"{name} is not at {path}. The data directory is the one given ({data_dir or 'none'}), else $PIZOO_DATA "
        f"({environment or 'not set'}), else {data_directory('~/.cache/pizoo/data')}. {remedy} {_known(name).contents}"
    )
