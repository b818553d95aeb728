"""Data sets as plain arrays: whole tensors in memory, no per-image work.

A data set is one ``.npz`` of plain arrays with the keys ``train_images``, ``train_labels``, ``test_images``,
``test_labels``, ``class_names``; a user's own file has the same keys (``test_*`` and ``class_names`` optional), or is a
folder of images. Files are found in ``data_dir``, else in ``$PIZOO_DATA``, else in ``~/.cache/pizoo/data``; the digits
are inside the package. ImageNet32 is a folder of its official files (:mod:`pizoo.data.imagenet32`). Omniglot is no list
of images with labels but classes to draw tasks from (:func:`load_tasks`).
"""

from pizoo.data.dataset import (
    FILE_KEYS,
    Dataset,
    Normalize,
    TransferData,
    epoch_order,
    fingerprint,
    keep_classes,
    split_validation,
    take_subset,
)
from pizoo.data.files import read_image_folder, read_images, read_npz
from pizoo.data.known import (
    ASSETS,
    DIGITS_SPLITS,
    IMAGENET32,
    DataNotFoundError,
    data_directory,
    dataset_path,
    list_datasets,
    load_dataset,
    load_tasks,
    prepare,
    training_images,
)
from pizoo.data.tasks import FewShotBatch, TaskPool, device_uniform, frozen_uniform

__all__ = [
    "ASSETS",
    "DIGITS_SPLITS",
    "FILE_KEYS",
    "IMAGENET32",
    "DataNotFoundError",
    "Dataset",
    "FewShotBatch",
    "Normalize",
    "TaskPool",
    "TransferData",
    "data_directory",
    "dataset_path",
    "device_uniform",
    "epoch_order",
    "fingerprint",
    "frozen_uniform",
    "keep_classes",
    "list_datasets",
    "load_dataset",
    "load_tasks",
    "prepare",
    "read_image_folder",
    "read_images",
    "read_npz",
    "split_validation",
    "take_subset",
    "training_images",
]
