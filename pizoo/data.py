"""Data sets as plain arrays: whole tensors in memory, no per-image work.

A data set is one ``.npz`` of plain arrays with the keys ``train_images``, ``train_labels``, ``test_images``,
``test_labels``, ``class_names``; a user's own file has the same keys (``test_*`` and ``class_names`` optional), or is a
folder of images. Files are found in ``data_dir``, else in ``$PIZOO_DATA``, else in ``~/.cache/pizoo/data``; the digits
are inside the package.

Everything drawn at random here (splits, subsets, batch order) comes from numpy's legacy ``RandomState``, whose streams
are frozen: the same seed gives the same numbers whatever the numpy version and the device.

Sources: CIFAR-10, Krizhevsky (2009); digits, Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits (UCI
Machine Learning Repository, CC BY 4.0), the 1797 test images as scikit-learn bundles them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
# What a file calls the fields of a Dataset.
FILE_KEYS = {"train_x": "train_images", "train_y": "train_labels", "test_x": "test_images", "test_y": "test_labels"}
DIGITS_SPLITS = 10
_MOST_CLASSES = 65536
_SEED_LIMIT = 2**32  # RandomState takes 32-bit seeds
_ORDER, _SUBSET, _VALIDATION = 1, 2, 3  # keep the streams of one seed apart


class DataNotFoundError(FileNotFoundError):
    """A data set is not where it was looked for; the message says where that was and how to get it there."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images (or vectors) and labels in memory, checked on construction.

    Args:
        name: what the data set is called.
        train_x: images [N, C, H, W] channel first, or vectors [N, d]; uint8 or floating point.
        train_y: labels int64 [N], 0 to ``classes - 1``.
        test_x, test_y: the same for the test images, item shape and dtype as in ``train_x``; both ``None`` where there
            are none.
        class_names: one name per class.
        source: file or folder the arrays were read from, for messages; empty when they were made in memory.

    Raises:
        ValueError: wrong shape or dtype, no images, numbers of images and labels that differ, a label out of range, a
            value that is not finite.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor | None
    test_y: Tensor | None
    class_names: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.class_names:
            raise ValueError(f"{self._where}: class_names is empty; there must be a name per class")
        self._check_part("train_x", self.train_x, "train_y", self.train_y)
        if (self.test_x is None) != (self.test_y is None):
            there, lacking = ("test_y", "test_x") if self.test_x is None else ("test_x", "test_y")
            raise ValueError(f"{self._where}: {self._key(there)} without {self._key(lacking)}; give both or neither")
        if self.test_x is not None and self.test_y is not None:
            self._check_part("test_x", self.test_x, "test_y", self.test_y)
            for what, found, wanted in (
                ("items of shape", tuple(self.test_x.shape[1:]), self.input_size),
                ("dtype", self.test_x.dtype, self.train_x.dtype),
            ):
                if found != wanted:
                    raise ValueError(
                        f"{self._where}: {self._key('test_x')} has {what} {found}; it must be {wanted} as in "
                        f"{self._key('train_x')} (shapes here are channel first)"
                    )

    @property
    def input_size(self) -> tuple[int, ...]:
        """Shape of one item: (C, H, W) or (d,)."""
        return tuple(self.train_x.shape[1:])

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def require(self, input_size: Iterable[int], classes: int | None = None) -> None:
        """Raise ValueError unless items have the shape ``input_size`` and there are ``classes`` classes."""
        if self.input_size != tuple(input_size):
            raise ValueError(
                f"{self._where}: {self._key('train_x')} has items of shape {self.input_size}; they must be of shape "
                f"{tuple(input_size)} (shapes here are channel first)"
            )
        if classes is not None and self.classes != classes:
            raise ValueError(f"{self._where}: {self.classes} classes; there must be {classes}")

    @property
    def _where(self) -> str:
        return self.source or f"data set {self.name!r}"

    def _key(self, field: str) -> str:
        return FILE_KEYS[field] if self.source else field

    def _check_part(self, x_field: str, x: Tensor, y_field: str, y: Tensor) -> None:
        x_key, y_key = self._key(x_field), self._key(y_field)
        if x.ndim not in (2, 4) or x.numel() == 0:
            raise ValueError(
                f"{self._where}: {x_key} has shape {list(x.shape)}; it must be [N, C, H, W] (channel first) or [N, d], "
                "with no dimension 0"
            )
        if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
            raise ValueError(f"{self._where}: {x_key} has dtype {x.dtype}; it must be uint8 or floating point")
        if y.dtype != torch.int64 or y.ndim != 1:
            raise ValueError(f"{self._where}: {y_key} is {y.dtype} {list(y.shape)}; it must be int64 [N]")
        if len(x) != len(y):
            raise ValueError(
                f"{self._where}: {x_key} has {len(x)} items and {y_key} has {len(y)}; they must be as many"
            )
        for label in (int(y.min()), int(y.max())):
            if not 0 <= label < self.classes:
                raise ValueError(
                    f"{self._where}: {y_key} holds the label {label}; labels must be 0 to {self.classes - 1}, for "
                    f"{self.classes} classes"
                )
        if x.dtype.is_floating_point and not torch.isfinite(x).all():
            raise ValueError(f"{self._where}: {x_key} holds a value that is not finite (NaN or infinity)")


@dataclass(frozen=True)
class Normalize:
    """``(x / scale - mean) / std`` per channel, for whole tensors on the device they are on.

    Args:
        scale: the value that becomes 1: 255 for 8-bit images.
        mean, std: one value per channel (dimension 1), in units after scaling; both ``None``: scaling only.
    """

    scale: float = 255.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}; it must be positive")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean is {self.mean} and std is {self.std}; give both or neither")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; they must be as many")
            if not all(math.isfinite(s) and s > 0 for s in self.std):
                raise ValueError(f"std is {self.std}; every value must be positive")

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalise ``x`` [N, C, ...] (uint8 or floating point) into a new tensor of the same shape.

        The arithmetic is done in float32 (float64 for ``dtype`` float64), one correctly rounded operation after
        another, so that every device gives the same bits; ``dtype`` is rounded to at the end.

        Raises:
            ValueError: ``dtype`` is not floating point, or ``mean`` has not one value per channel.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; it must be a floating point type")
        exact = torch.promote_types(dtype, torch.float32)
        # Dividing by a Python number multiplies by its reciprocal on CUDA; dividing by a tensor there divides.
        out = x.to(exact, copy=True).div_(torch.tensor(self.scale, dtype=exact, device=x.device))
        if self.mean is not None and self.std is not None:
            if x.ndim < 2 or x.shape[1] != len(self.mean):
                raise ValueError(
                    f"x has shape {tuple(x.shape)}; dimension 1 must have the {len(self.mean)} of mean and std"
                )
            per_channel = (-1, *(1,) * (x.ndim - 2))
            mean, std = (torch.tensor(v, dtype=exact, device=x.device).view(per_channel) for v in (self.mean, self.std))
            out.sub_(mean).div_(std)
        return out.to(dtype)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` (0-based) visits ``n`` training items: a permutation, int64 [n], on the CPU.

    A function of its arguments alone, so training resumes at any epoch with the batches it would have seen. Batches are
    ``epoch_order(...).split(batch_size)``: a short last batch is kept, an epoch has ``ceil(n / batch_size)`` steps.

    Raises:
        ValueError: ``n`` below 1, ``seed`` or ``epoch`` not in 0 to 2³² - 1.
    """
    return _permutation(n, _ORDER, seed=seed, epoch=epoch)


def take_subset(dataset: Dataset, n: int, seed: int = 0) -> Dataset:
    """Keep the first ``n`` training items of a seeded permutation, classes unbalanced; the test part stays as it is.

    Raises:
        ValueError: ``n`` not in 1 to the number of training items.
    """
    total = len(dataset.train_x)
    if not 1 <= n <= total:
        raise ValueError(f"subset is {n}; it must be 1 to {total}, the training items of {dataset.name}")
    keep = _permutation(total, _SUBSET, seed=seed)[:n]
    return replace(dataset, train_x=dataset.train_x[keep], train_y=dataset.train_y[keep])


def split_validation(dataset: Dataset, size: int | float, seed: int = 0) -> Dataset:
    """Hold out part of the training items: the result has them as its test part.

    The data set's own test part is dropped, so what is tuned on the result cannot have seen it.

    Args:
        size: how many items to hold out, or (a float below 1) which fraction.

    Raises:
        ValueError: nothing left to train on or to validate with.
    """
    total = len(dataset.train_x)
    held_out = round(size * total) if isinstance(size, float) else size
    if not 1 <= held_out < total:
        raise ValueError(
            f"size is {size}: {held_out} of {total} training items of {dataset.name}; 1 to {total - 1} can go"
        )
    order = _permutation(total, _VALIDATION, seed=seed)
    train, test = order[held_out:], order[:held_out]
    x, y = dataset.train_x, dataset.train_y
    return replace(dataset, train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test])


def fingerprint(x: Tensor) -> str:
    """SHA-256 (hex) of a tensor's dtype, shape and values, whatever its device and strides."""
    x = x.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{x.dtype} {list(x.shape)} ".encode())
    digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_directory(data_dir: str | os.PathLike | None = None) -> Path:
    """``data_dir``, else ``$PIZOO_DATA``, else ``~/.cache/pizoo/data``."""
    return Path(data_dir or os.environ.get("PIZOO_DATA") or "~/.cache/pizoo/data").expanduser()


def dataset_path(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Where the file of a known data set is, or would have to be.

    Raises:
        ValueError: no data set of that name.
    """
    return ASSETS / f"{name}.npz" if _known(name).download is None else data_directory(data_dir) / f"{name}.npz"


def list_datasets() -> list[str]:
    """Names of the data sets that :func:`load_dataset` knows."""
    return sorted(_KNOWN)


def load_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    split: int = 0,
    subset: int | None = None,
    input_size: Iterable[int] | None = None,
    classes: int | None = None,
) -> Dataset:
    """Load a known data set, or the user's own from ``path``.

    Args:
        name: ``"cifar10"``, ``"digits"``; with ``path`` any name.
        data_dir: see :func:`data_directory`.
        path: the user's own ``.npz`` (see :func:`read_npz`) or folder of images (see :func:`read_image_folder`).
        split: which of the ten splits of the digits, 0 to 9.
        subset: keep this many training items (:func:`take_subset` with seed 0: the same whatever the training seed).
        input_size: the shape of one item, (C, H, W) or (d,); images of a folder are made so, all else must be so.
        classes: the number of classes there must be.

    Raises:
        DataNotFoundError: the file or folder is not there.
        ValueError: an unknown name, contents that are not as they should be.
    """
    size = None if input_size is None else tuple(input_size)
    if path is None:
        source, file = _known(name), dataset_path(name, data_dir)
        if not file.is_file():
            raise DataNotFoundError(_where_to_get(name, file, data_dir))
        dataset = source.read(file, split)
    else:
        _check_split(name, split, 1)
        file = Path(path).expanduser()
        if not file.exists():
            raise DataNotFoundError(
                f"{file} is not there; data set {name!r} is to be read from it, an .npz or a folder"
            )
        dataset = read_image_folder(file, name, size) if file.is_dir() else read_npz(file, name)
    if size is not None or classes is not None:
        dataset.require(dataset.input_size if size is None else size, classes)
    return dataset if subset is None else take_subset(dataset, subset)


def read_npz(path: str | os.PathLike, name: str) -> Dataset:
    """Read a data set from an ``.npz`` of plain arrays; nothing in it is executed.

    Keys: ``train_images`` uint8 or floating point, as images [N, H, W, C] (channels last, C of 1, 3 or 4), grey images
    [N, H, W] or vectors [N, d]; ``train_labels`` integers [N]; optionally ``test_images``, ``test_labels`` the same,
    and ``class_names`` strings, without which the classes are 0 to the largest training label.

    Raises:
        ValueError: naming the file, the key, what was found and what is wanted.
    """
    arrays = _arrays(
        path, required=("train_images", "train_labels"), optional=("test_images", "test_labels", "class_names")
    )
    tensors: dict[str, Tensor | None] = dict.fromkeys(FILE_KEYS)
    for field, key in FILE_KEYS.items():
        if key in arrays:
            convert = _channel_first if field.endswith("_x") else _labels
            tensors[field] = convert(arrays[key], f"{path}: {key}")
    if "class_names" in arrays:
        names = _class_names(arrays["class_names"], path)
    else:
        names = _numbers(tensors["train_y"], f"{path}: train_labels")
    return Dataset(name, **tensors, class_names=names, source=str(path))


def read_image_folder(path: str | os.PathLike, name: str, input_size: tuple[int, ...] | None = None) -> Dataset:
    """Decode a folder of images once: ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*`` without a test part.

    Args:
        input_size: (C, H, W) with C 1 (grey) or 3 (RGB): every image is cropped to that aspect at its centre and
            resized (bilinear with antialiasing). ``None``: images stay as they are and must be of one size; grey if all
            are.

    Raises:
        ValueError: no class folder, a class without images, a test class that training lacks, a file that is not an
            8-bit image, sizes that differ; the message names the folder or file.
    """
    if input_size is not None and (len(input_size) != 3 or input_size[0] not in (1, 3)):
        raise ValueError(f"input_size is {input_size}; for a folder of images it must be (1, H, W) or (3, H, W)")
    folder = Path(path)
    has_split = (folder / "train").is_dir()
    train = folder / "train" if has_split else folder
    class_names = _class_folders(train)
    parts = {"train": _image_files(train, class_names)}
    if has_split and (folder / "test").is_dir():
        if unknown := set(_class_folders(folder / "test")) - set(class_names):
            raise ValueError(f"{folder / 'test'}: class {min(unknown)!r} is not among the classes of {train}")
        parts["test"] = _image_files(folder / "test", class_names, allow_empty=True)
    # Grey or colour is decided for the whole data set: one test image in colour makes all of them so.
    files = [file for samples in parts.values() for file, _ in samples]
    images = read_images(files, input_size)
    labels = torch.tensor([label for samples in parts.values() for _, label in samples])
    n = len(parts["train"])
    test = (images[n:], labels[n:]) if "test" in parts else (None, None)
    return Dataset(name, images[:n], labels[:n], *test, class_names=tuple(class_names), source=str(folder))


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Make the file of a known data set unless it is there, by downloading it; returns its path.

    The file appears complete or not at all: it is written under a temporary name, then renamed.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the download failed; the message says what was tried and where a file can be put instead.
    """
    source, path = _known(name), dataset_path(name, data_dir)
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
        temporary = Path(scratch) / path.name
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return path


@dataclass(frozen=True)
class _Known:
    """A data set known by name: what its file holds, how to read split k of it, how to make it.

    ``download`` fills a scratch folder and returns the arrays of the file; ``None``: the file is in the package.
    """

    contents: str
    read: Callable[[Path, int], Dataset]
    download: Callable[[Path], dict[str, np.ndarray]] | None


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
    arrays = _arrays(path, required=("images", "labels"))
    x, y = _channel_first(arrays["images"], f"{path}: images"), _labels(arrays["labels"], f"{path}: labels")
    order = torch.from_numpy(np.random.RandomState(split).permutation(len(x)))
    train, test = order[: len(x) - len(x) // 4], order[len(x) - len(x) // 4 :]
    return Dataset("digits", x[train], y[train], x[test], y[test], _numbers(y, f"{path}: labels"), source=str(path))


_KNOWN = {
    "cifar10": _Known(
        "train_images uint8 [50000, 32, 32, 3], train_labels [50000], test_images [10000, 32, 32, 3], "
        "test_labels [10000], class_names [10]",
        _read_cifar10,
        _download_cifar10,
    ),
    "digits": _Known("images uint8 [1797, 8, 8], labels [1797]", _read_digits, None),
}


def _known(name: str) -> _Known:
    if name not in _KNOWN:
        near = difflib.get_close_matches(name, _KNOWN, n=1)
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
    return (
        f"{name} is not at {path}. The data directory is the one given ({data_dir or 'none'}), else $PIZOO_DATA "
        f"({environment or 'not set'}), else {data_directory('~/.cache/pizoo/data')}. Make the file with "
        f"`pizoo data prepare {name}`, or put an .npz there with {_KNOWN[name].contents}"
    )


def _permutation(n: int, stream: int, **seeds: int) -> Tensor:
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    for key, value in seeds.items():
        if not 0 <= value < _SEED_LIMIT:
            raise ValueError(f"{key} is {value}; it must be 0 to 2**32 - 1")
    order = np.random.RandomState([stream, *seeds.values()]).permutation(n)
    return torch.from_numpy(order.astype(np.int64, copy=False))


def _arrays(
    path: str | os.PathLike, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The named arrays of an .npz, without ever unpickling."""
    broken = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        archive = np.load(path, allow_pickle=False)
    except broken as error:
        raise ValueError(f"{path} is not an .npz of plain arrays{_why(error)}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} holds one array; it must be an .npz with the keys {', '.join(required)}")
    with archive:
        if missing := [key for key in required if key not in archive.files]:
            raise ValueError(
                f"{path}: no key {missing[0]!r}; found {', '.join(archive.files) or 'none'}; wanted "
                f"{', '.join(required)}"
            )
        arrays = {}
        for key in (*required, *optional):
            try:
                if key in archive.files:
                    arrays[key] = archive[key]
            except broken as error:
                raise ValueError(f"{path}: {key} cannot be read as a plain array{_why(error)}") from error
    return arrays


def _why(error: Exception) -> str:
    """What numpy says of a file, without its advice to unpickle it."""
    return "; it may hold Python objects, which are never loaded" if "pickle" in str(error) else f": {error}"


def _channel_first(array: np.ndarray, where: str) -> Tensor:
    """Images as files hold them, [N, H, W, C], [N, H, W] or [N, d], to [N, C, H, W] or [N, d]."""
    if array.dtype != np.uint8 and not (array.dtype.kind == "f" and array.dtype.itemsize <= 8):
        raise ValueError(f"{where} has dtype {array.dtype}; it must be uint8, float16, float32 or float64")
    if array.ndim not in (2, 3, 4) or array.size == 0 or (array.ndim == 4 and array.shape[3] not in (1, 3, 4)):
        raise ValueError(
            f"{where} has shape {list(array.shape)}; it must be [N, H, W, C] (channels last, C of 1, 3 or 4), "
            "[N, H, W] or [N, d], with no dimension 0"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _labels(array: np.ndarray, where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where} is {array.dtype} {list(array.shape)}; it must be integers [N]")
    return torch.from_numpy(array.astype(np.int64))


def _class_names(array: np.ndarray, path: str | os.PathLike) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1:
        raise ValueError(f"{path}: class_names is {array.dtype} {list(array.shape)}; it must be strings [classes]")
    return tuple(array.tolist())


def _numbers(labels: Tensor, where: str) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the largest label."""
    largest = int(labels.max()) if len(labels) else 0
    if largest >= _MOST_CLASSES:
        raise ValueError(f"{where} holds the label {largest}; labels must be below {_MOST_CLASSES}")
    return tuple(str(label) for label in range(max(largest, 0) + 1))


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no class folder; images must be at {folder}/CLASS/NAME.png")
    return names


def _image_files(folder: Path, class_names: list[str], allow_empty: bool = False) -> list[tuple[Path, int]]:
    """Image files under each class folder, in sorted order, with their class number."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    samples: list[tuple[Path, int]] = []
    for label, name in enumerate(class_names):
        files = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files and not allow_empty:
            raise ValueError(f"{folder / name} holds no image; wanted files ending in {', '.join(IMG_EXTENSIONS)}")
        samples += [(file, label) for file in files]
    if not samples:
        raise ValueError(f"{folder} holds no image")
    return samples


def read_images(files: Sequence[Path], input_size: tuple[int, ...] | None) -> Tensor:
    """Decode image files into uint8 [N, C, H, W]; :func:`read_image_folder` says what becomes of size and colour.

    Raises:
        ValueError: a file that is no 8-bit image; images of several sizes where ``input_size`` is None.
    """
    from PIL import Image, ImageOps

    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"its pixels are of mode {image.mode!r}, more than 8 bits")
                is_grey = image.mode in ("1", "L") if input_size is None else input_size[0] == 1
                image = image.convert("L" if is_grey else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} cannot be read as an 8-bit image: {error}") from error
        if input_size is not None:
            image = ImageOps.fit(image, (input_size[2], input_size[1]), Image.Resampling.BILINEAR)
        elif images and image.size != images[0].size:
            (w, h), (w0, h0) = image.size, images[0].size
            raise ValueError(f"{file} is {h} x {w}, {files[0]} is {h0} x {w0}; state input_size to resize them")
        images.append(image)
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode)) for image in images])
    return _channel_first(arrays, "decoded images")
