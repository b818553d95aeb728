"""Reading arrays and images from files; nothing in them is executed."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pizoo.data.dataset import FILE_KEYS, Dataset

_MOST_CLASSES = 65536


def read_npz(path: str | os.PathLike, name: str) -> Dataset:
    """Read a data set from an ``.npz`` of plain arrays; nothing in it is executed.

    Keys: ``train_images`` uint8 or floating point, as images [N, H, W, C] (channels last, C of 1, 3 or 4), grey images
    [N, H, W] or vectors [N, d]; ``train_labels`` integers [N]; optionally ``test_images``, ``test_labels`` the same,
    and ``class_names`` strings, without which the classes are 0 to the largest training label.

    Raises:
        ValueError: naming the file, the key, what was found and what is wanted.
    """
    arrays = read_arrays(
        path, required=("train_images", "train_labels"), optional=("test_images", "test_labels", "class_names")
    )
    tensors: dict[str, Tensor | None] = dict.fromkeys(FILE_KEYS)
    for field, key in FILE_KEYS.items():
        if key in arrays:
            convert = channel_first if field.endswith("_x") else integer_labels
            tensors[field] = convert(arrays[key], f"{path}: {key}")
    if "class_names" in arrays:
        names = text_names(arrays["class_names"], path)
    else:
        names = number_names(tensors["train_y"], f"{path}: train_labels")
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


def read_arrays(
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


def channel_first(array: np.ndarray, where: str) -> Tensor:
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


def integer_labels(array: np.ndarray, where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where} is {array.dtype} {list(array.shape)}; it must be integers [N]")
    return torch.from_numpy(array.astype(np.int64))


def text_names(array: np.ndarray, path: str | os.PathLike, key: str = "class_names") -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1:
        raise ValueError(f"{path}: {key} is {array.dtype} {list(array.shape)}; it must be strings [classes]")
    return tuple(array.tolist())


def number_names(labels: Tensor, where: str) -> tuple[str, ...]:
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
    return channel_first(arrays, "decoded images")
