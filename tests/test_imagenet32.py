"""ImageNet at 32x32: official files are read without executing them; which classes are kept; the stand-in."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pizoo import data
from pizoo.data import DataNotFoundError, imagenet32, keep_classes, load_dataset
from pizoo.data.pickles import read_pickle

FILES = (*imagenet32.TRAIN_FILES, *imagenet32.TEST_FILES)
REAL_TINY = Path(os.environ.get("PIZOO_DATA", "")) / "tinyimagenet32.npz"


def official(folder: Path, protocol: int = 4, per_file: int = 500) -> dict[str, dict]:
    """Write a folder in the official form, all pixels of an image telling its file and its number; returns what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, made = np.random.RandomState(0), {}
    for i, name in enumerate(FILES):
        pixels = np.full((per_file, 3072), i, dtype=np.uint8)
        pixels[:, 0] = np.arange(per_file) % 256
        labels = rng.randint(1, 1001, per_file).tolist()
        made[name] = {"data": pixels, "labels": labels, "mean": pixels.mean(0)}
        (folder / name).write_bytes(pickle.dumps(made[name], protocol=protocol))
    return made


@pytest.fixture
def folder(tmp_path):
    official(tmp_path / "imagenet32")
    return tmp_path / "imagenet32"


# Reading


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_and_plain_containers_are_read_as_pickle_reads_them(tmp_path, protocol):
    value = {
        "data": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "mean": np.linspace(0, 1, 3),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big end first": np.arange(3, dtype=">i4"),
        "labels": [1, np.int64(7), 2**70],
        "rest": ("text", b"\x00\xff", None, True, 0.5),
    }
    (tmp_path / "file").write_bytes(pickle.dumps(value, protocol=protocol))
    found = read_pickle(tmp_path / "file")
    assert found.keys() == value.keys()
    for key, wanted in value.items():
        if isinstance(wanted, np.ndarray):
            assert found[key].dtype == wanted.dtype
            np.testing.assert_array_equal(found[key], wanted)
        else:
            assert found[key] == wanted


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_nothing_in_a_pickle_is_executed(tmp_path):
    witness = tmp_path / "witness"
    for function, arguments, named in (
        (os.system, (f"touch {witness}",), "system"),
        (eval, (f"open({str(witness)!r}, 'w')",), "builtins.eval"),
        (Path.touch, (witness,), ""),
        (np.save, (str(witness), np.zeros(1)), "numpy"),
    ):
        (tmp_path / "file").write_bytes(pickle.dumps({"data": Evil(function, *arguments)}))
        with pytest.raises(ValueError, match=rf"{tmp_path}/file: it asks for .*{named}.*; numpy arrays and plain"):
            read_pickle(tmp_path / "file")
    assert not list(tmp_path.glob("witness*"))


def test_arrays_of_objects_and_what_is_no_pickle_are_refused_by_name(tmp_path):
    whole = pickle.dumps({"data": np.arange(100)})
    for content in (
        pickle.dumps(np.array([object])),
        pickle.dumps(np.array([{}, "text"], dtype=object)),
        pickle.dumps(np.array(["text"])),
        pickle.dumps(np.dtype("f4")),
        pickle.dumps(torch.zeros(2)),
        whole[: len(whole) // 2],
        b"",
        b"not a pickle",
        b"]K\x01b.",  # a list with a state
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path / "file")):
            read_pickle(tmp_path / "file")


def test_official_files_become_the_papers_250_classes(folder):
    made, dataset = official(folder), load_dataset("imagenet32", folder.parent)
    classes = imagenet32.papers_classes()
    assert len(classes) == len(set(classes)) == dataset.classes == 250 and dataset.input_size == (3, 32, 32)
    wanted = [
        (i, row % 256, classes.index(label - 1))
        for i, name in enumerate(imagenet32.TRAIN_FILES)
        for row, label in enumerate(made[name]["labels"])
        if label - 1 in classes
    ]
    x, y = dataset.train_x, dataset.train_y
    assert list(zip(x[:, 2, 5, 5].tolist(), x[:, 0, 0, 0].tolist(), y.tolist(), strict=True)) == wanted
    assert dataset.class_names[int(y[0])] == str(classes[wanted[0][2]])
    assert 0 < len(dataset.test_x) < 500 and (dataset.test_x[:, 1] == 10).all()


def test_chosen_classes_are_kept_in_the_order_given(folder):
    dataset = load_dataset("imagenet32", folder.parent, keep=[900, 3, 77])
    assert dataset.class_names == ("900", "3", "77") and set(dataset.train_y.tolist()) == {0, 1, 2}
    digits = load_dataset("digits")
    kept = keep_classes(digits, [7, 0])
    assert kept.class_names == ("7", "0") and len(kept.train_y) == (digits.train_y % 7 == 0).sum()
    assert torch.equal(kept.test_x[kept.test_y == 0], digits.test_x[digits.test_y == 7])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([3, 5, 3], "3 is there twice"),
        ([3, 1000], "1000 is no class of ImageNet, which has the numbers 0 to 999"),
        ([-1, 3], "-1 is no class"),
        ([3], "two or more"),
    ],
)
def test_impossible_class_lists_are_refused(folder, classes, message):
    with pytest.raises(ValueError, match=f"classes: .*{message}"):
        load_dataset("imagenet32", folder.parent, keep=classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((5, 4096), np.uint8)}, r"data is uint8 \[5, 4096\]; it must be uint8 \[N, 3072\]"),
        ({"data": np.zeros((5, 3072), np.float32)}, r"data is float32 \[5, 3072\]"),
        ({"data": [[0]]}, "data is list"),
        ({"labels": [1, 2]}, r"labels are int64 \[2\]; they must be 5 integers"),
        ({"labels": [[1], 2, 3, 4, 5]}, "labels are object"),
        ({"labels": [0, 1, 2, 3, 4]}, "labels are 0 to 4; they must be 1 to 1000"),
        ({"labels": [1, 2, 3, 4, 1001]}, "labels are 1 to 1001"),
        (None, "holds list; it must be a dict with data and labels"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name_and_key(folder, change, message):
    batch = {"data": np.zeros((5, 3072), np.uint8), "labels": [1, 2, 3, 4, 5]}
    content = [] if change is None else batch | change
    (folder / "train_data_batch_4").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"train_data_batch_4:? {message}"):
        load_dataset("imagenet32", folder.parent)


def test_without_its_files_it_says_where_to_get_them(folder):
    (folder / "val_data").unlink()
    for function in (load_dataset, data.prepare):
        with pytest.raises(DataNotFoundError, match=r"imagenet32 is not at .*image-net\.org") as caught:
            function("imagenet32", folder.parent)
        assert "tinyimagenet32 stands in" in str(caught.value)


# Tiny-ImageNet


def tiny(tmp_path, **changes) -> Path:
    made = {
        "train_images": np.random.RandomState(0).randint(0, 256, (400, 32, 32, 3)).astype(np.uint8),
        "train_labels": (np.arange(400) % 200).astype(np.uint8),
        "val_images": np.zeros((200, 32, 32, 3), np.uint8),
        "val_labels": np.arange(200).astype(np.uint8),
        "class_words": np.array([f"word {k}" for k in range(200)]),
    } | changes
    np.savez(tmp_path / "tinyimagenet32.npz", **made)
    return tmp_path


def test_tiny_imagenet_is_tested_on_its_validation_images(tmp_path):
    dataset = load_dataset("tinyimagenet32", tiny(tmp_path))
    assert dataset.train_x.shape == (400, 3, 32, 32) and dataset.test_y.tolist() == list(range(200))
    assert dataset.class_names[7] == "word 7"
    with pytest.raises(ValueError, match=r"tinyimagenet32\.npz: 199 classes; there must be 200"):
        few = {"class_words": np.array([str(k) for k in range(199)]), "train_labels": np.zeros(400, np.uint8)}
        load_dataset("tinyimagenet32", tiny(tmp_path, **few, val_labels=np.zeros(200, np.uint8)))


def test_tiny_imagenet_is_made_from_its_archive_by_averaging_pixels(tmp_path):
    folder, rng = tmp_path / "tiny-imagenet-200", np.random.RandomState(0)

    def image() -> bytes:
        held = io.BytesIO()
        Image.fromarray(rng.randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(held, "JPEG")
        return held.getvalue()

    for wnid in ("n2", "n1"):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for k in range(2):
            (folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG").write_bytes(image())
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "val" / "images" / "val_0.JPEG").write_bytes(image())
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn2\t0\t0\t9\t9\n")
    (folder / "wnids.txt").write_text("n2\nn1\n")
    (folder / "words.txt").write_text("n1\tcat\nn3\towl\nn2\tdog, hound\n")
    made = imagenet32.shrink_tiny(folder)
    assert made["class_words"].tolist() == ["cat", "dog, hound"] and made["val_labels"].tolist() == [1]
    assert made["train_labels"].tolist() == [0, 0, 1, 1] and made["train_images"].shape == (4, 32, 32, 3)
    original = np.asarray(Image.open(folder / "train" / "n1" / "images" / "n1_1.JPEG")).astype(float)
    mean = original.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(made["train_images"][1] - mean).max() <= 0.5


@pytest.mark.data
@pytest.mark.skipif(not REAL_TINY.is_file(), reason="no tinyimagenet32.npz in $PIZOO_DATA")
def test_real_tiny_imagenet():
    dataset = load_dataset("tinyimagenet32")
    assert dataset.train_x.shape == (100_000, 3, 32, 32) and dataset.test_x.shape == (10_000, 3, 32, 32)
    assert torch.bincount(dataset.train_y).tolist() == [500] * 200
    assert torch.bincount(dataset.test_y).tolist() == [50] * 200
    assert dataset.class_names[0] == "goldfish, Carassius auratus"
