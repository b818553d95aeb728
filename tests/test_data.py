"""Data sets: what a file must hold, what the messages say when it does not, and that every draw is reproducible."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pizoo import data
from pizoo.data import DataNotFoundError, Dataset, Normalize, epoch_order, fingerprint, load_dataset

REAL_CIFAR10 = Path(os.environ.get("PIZOO_DATA", "")) / "cifar10.npz"
GOLDEN_DIGITS = {
    0: [7, 7, 4, 7, 2, 0, 1, 2, 4, 8, 1, 6],
    9: [0, 4, 5, 0, 7, 6, 0, 8, 0, 8, 0, 0],
}  # split: labels of the first test images
GOLDEN_ORDER = [2, 9, 3, 7, 0, 1, 6, 4, 5, 8]
needs_cifar10 = pytest.mark.skipif(not REAL_CIFAR10.is_file(), reason="no cifar10.npz in $PIZOO_DATA")


def arrays(n_train: int = 12, n_test: int = 4, **changes) -> dict[str, np.ndarray]:
    """The arrays of a small valid file in CIFAR-10's form, with ``changes``; a change to None leaves the key out."""
    rng = np.random.RandomState(0)
    made = {
        "train_images": rng.randint(0, 256, (n_train, 32, 32, 3)).astype(np.uint8),
        "train_labels": (np.arange(n_train) % 10).astype(np.uint8),
        "test_images": rng.randint(0, 256, (n_test, 32, 32, 3)).astype(np.uint8),
        "test_labels": (np.arange(n_test) % 10).astype(np.uint8),
        "class_names": np.array([f"class {i}" for i in range(10)]),
    } | changes
    return {key: array for key, array in made.items() if array is not None}


@pytest.fixture
def write(tmp_path):
    def write(file="own.npz", **changes) -> Path:
        np.savez(tmp_path / file, **arrays(**changes))
        return tmp_path / file

    return write


# Reading


def test_images_become_channel_first_and_keep_every_pixel(write):
    made = arrays()
    dataset = load_dataset("own", path=write())
    assert dataset.train_x.dtype == torch.uint8 and dataset.train_x.shape == (12, 3, 32, 32)
    assert dataset.train_x[5, 2, 7, 30] == made["train_images"][5, 7, 30, 2]
    assert torch.equal(dataset.test_x.permute(0, 2, 3, 1), torch.from_numpy(made["test_images"]))
    assert dataset.train_x.is_contiguous()
    assert dataset.train_y.dtype == torch.int64 and dataset.train_y.tolist() == made["train_labels"].tolist()
    assert dataset.input_size == (3, 32, 32) and dataset.classes == 10


@pytest.mark.parametrize(("shape", "item"), [((5, 7), (7,)), ((5, 4, 6), (1, 4, 6)), ((5, 4, 6, 3), (3, 4, 6))])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", ">f4"])
def test_vectors_grey_images_and_floats_are_data_sets_too(tmp_path, shape, item, dtype):
    images = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=np.array([0, 1, 2, 1, 0]))
    dataset = load_dataset("own", path=tmp_path / "own.npz")
    assert dataset.input_size == item
    assert dataset.train_x.sum().item() == images.sum()
    assert dataset.test_x is None and dataset.test_y is None
    assert dataset.class_names == ("0", "1", "2")


def test_cifar10_is_found_by_argument_then_environment_then_home(write, tmp_path, monkeypatch):
    write("cifar10.npz")
    monkeypatch.setenv("PIZOO_DATA", str(tmp_path / "elsewhere"))
    assert load_dataset("cifar10", data_dir=tmp_path).name == "cifar10"
    monkeypatch.setenv("PIZOO_DATA", str(tmp_path))
    assert load_dataset("cifar10").name == "cifar10"
    monkeypatch.delenv("PIZOO_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.dataset_path("cifar10") == tmp_path / ".cache/pizoo/data/cifar10.npz"


def test_a_missing_file_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PIZOO_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load_dataset("cifar10")
    for part in (str(tmp_path / "cifar10.npz"), "$PIZOO_DATA", "pizoo data prepare cifar10", "train_images uint8"):
        assert part in str(error.value)
    with pytest.raises(DataNotFoundError, match=r"nowhere\.npz is not there"):
        load_dataset("own", path=tmp_path / "nowhere.npz")


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="'cifar1O'; did you mean 'cifar10'"):
        load_dataset("cifar1O")


@needs_cifar10
@pytest.mark.data
def test_real_cifar10():
    dataset = load_dataset("cifar10")
    assert dataset.train_x.shape == (50000, 3, 32, 32) and dataset.test_x.shape == (10000, 3, 32, 32)
    assert torch.bincount(dataset.train_y).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_y).tolist() == [1000] * 10
    assert dataset.class_names[0] == "airplane"
    x = Normalize(255.0, (0.49137255, 0.48235294, 0.44666667), (0.24705882, 0.24352941, 0.26156863))(
        dataset.train_x[:10000]
    )
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)


# What a file must hold


def zeros(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.zeros(shape, dtype)


# Each case: what is changed, and what the message has to name.
BAD_FILES = {
    "no images key": ({"train_images": None}, ["no key 'train_images'", "found train_labels"]),
    "no labels key": ({"train_labels": None}, ["no key 'train_labels'"]),
    "test labels alone": ({"test_images": None}, ["test_labels without test_images"]),
    "test images alone": ({"test_labels": None}, ["test_images without test_labels"]),
    "channel first": ({"train_images": zeros(12, 3, 32, 32)}, ["train_images", "[12, 3, 32, 32]", "channels last"]),
    "five dimensions": ({"train_images": zeros(12, 2, 2, 2, 3)}, ["train_images", "[12, 2, 2, 2, 3]", "[N, d]"]),
    "empty": ({"n_train": 0}, ["train_images", "[0, 32, 32, 3]", "no dimension 0"]),
    "integer images": ({"test_images": zeros(4, 32, 32, 3, dtype="int64")}, ["test_images", "int64", "uint8, float16"]),
    "count mismatch": ({"train_labels": zeros(11)}, ["train_images has 12", "train_labels has 11"]),
    "test count mismatch": ({"test_labels": zeros(5)}, ["test_images has 4", "test_labels has 5"]),
    "float labels": ({"train_labels": zeros(12, dtype="float64")}, ["train_labels", "float64 [12]", "integers [N]"]),
    "one-hot labels": ({"train_labels": zeros(12, 10)}, ["train_labels", "[12, 10]", "integers [N]"]),
    "label too large": ({"train_labels": np.full(12, 10)}, ["train_labels holds the label 10", "0 to 9"]),
    "negative label": ({"test_labels": np.full(4, -1)}, ["test_labels holds the label -1", "0 to 9"]),
    "test class unseen": (
        {"class_names": None, "test_labels": np.full(4, 12)},
        ["test_labels holds the label 12", "0 to 9"],
    ),
    "absurd label": (
        {"class_names": None, "train_labels": np.full(12, 10**12)},
        ["train_labels", "1000000000000", "65536"],
    ),
    "class names no strings": ({"class_names": np.arange(10)}, ["class_names", "int64 [10]", "strings"]),
    "no class names": ({"class_names": np.array([], str)}, ["class_names is empty"]),
    "test of another size": ({"test_images": zeros(4, 28, 28, 3)}, ["test_images", "(3, 28, 28)", "(3, 32, 32)"]),
    "test of another dtype": (
        {"test_images": zeros(4, 32, 32, 3, dtype="float32")},
        ["test_images", "float32", "uint8"],
    ),
    "not a number": (
        {"train_images": np.full((12, 5), np.nan), "test_images": zeros(4, 5, dtype="float64")},
        ["train_images", "not finite"],
    ),
    "infinity": (
        {"train_images": zeros(12, 5, dtype="float64"), "test_images": np.full((4, 5), np.inf)},
        ["test_images", "not finite"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_name_and_key(write, case):
    changes, parts = BAD_FILES[case]
    path = write(**changes)
    with pytest.raises(ValueError) as error:
        load_dataset("own", path=path)
    for part in (str(path), *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"not an npz", b"\x80\x04pickle", "objects"])
def test_nobody_is_advised_to_unpickle(tmp_path, content):
    path = tmp_path / "mine.npz"
    if content == "objects":
        np.savez(path, train_images=np.array([{}, None]), train_labels=np.zeros(2, int))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plain array.*Python objects, which are never loaded") as caught:
        load_dataset("mine", path=path)
    assert "pickle" not in str(caught.value)


def test_a_data_set_is_never_unpickled(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, train_images=np.array([{"a": 1}], dtype=object), train_labels=np.array([0]))
    with pytest.raises(ValueError, match=r"own\.npz: train_images cannot be read as a plain array"):
        load_dataset("own", path=path)


@pytest.mark.parametrize("content", [b"", b"not an npz", b"PK\x03\x04 cut short", b"\x80\x04pickle"])
def test_a_file_that_is_no_npz_is_refused_by_name(tmp_path, content):
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.npz is not an \.npz of plain arrays"):
        load_dataset("own", path=path)


def test_a_truncated_or_single_array_is_refused_by_name(write, tmp_path):
    path = write()
    damaged = bytearray(path.read_bytes())
    damaged[5000:6000] = bytes(1000)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"own\.npz: train_images cannot be read"):
        load_dataset("own", path=path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one\.npy holds one array"):
        load_dataset("own", path=tmp_path / "one.npy")


def test_cifar10_must_be_cifar10(write, tmp_path):
    write("cifar10.npz", test_images=None, test_labels=None)
    with pytest.raises(ValueError, match=r"cifar10\.npz: no key 'test_images'"):
        load_dataset("cifar10", data_dir=tmp_path)
    write("cifar10.npz", train_images=np.zeros((12, 28, 28), np.uint8), test_images=np.zeros((4, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"cifar10\.npz: train_images has items of shape \(1, 28, 28\).*\(3, 32, 32\)"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_what_a_recipe_asks_for_is_checked(write):
    with pytest.raises(ValueError, match=r"\(3, 32, 32\).*\(1, 8, 8\)"):
        load_dataset("own", path=write(), input_size=(1, 8, 8))
    with pytest.raises(ValueError, match="10 classes; there must be 7"):
        load_dataset("own", path=write(), classes=7)
    with pytest.raises(ValueError, match="split is 3"):
        load_dataset("own", path=write(), split=3)


def test_arrays_in_memory_are_checked_under_their_own_names():
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="data set 'mine': train_x has 4 items and train_y has 3"):
        Dataset("mine", x, y[:3], None, None, ("a",))
    with pytest.raises(ValueError, match=r"train_y is torch\.float32"):
        Dataset("mine", x, y.float(), None, None, ("a",))
    with pytest.raises(ValueError, match=r"train_x has dtype torch\.int32"):
        Dataset("mine", x.int(), y, None, None, ("a",))


# Digits


def test_the_digits_are_scikit_learns():
    bundled = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(data.ASSETS / "digits.npz", allow_pickle=False) as shipped:
        assert shipped["images"].dtype == shipped["labels"].dtype == np.uint8
        assert np.array_equal(shipped["images"], bundled.images)
        assert np.array_equal(shipped["labels"], bundled.target)


def test_each_split_of_the_digits_holds_out_another_quarter(tmp_path, monkeypatch):
    monkeypatch.setenv("PIZOO_DATA", str(tmp_path))  # they are inside the package
    held_out = set()
    for split in range(10):
        dataset = load_dataset("digits", split=split)
        assert dataset.train_x.shape == (1348, 1, 8, 8) and dataset.test_x.shape == (449, 1, 8, 8)
        assert dataset.train_x.max() == 16 and dataset.classes == 10
        everything = torch.cat([dataset.train_y, dataset.test_y])
        assert torch.bincount(everything).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        held_out.add(fingerprint(dataset.test_x))
    assert len(held_out) == 10
    for split in (-1, 10):
        with pytest.raises(ValueError, match=f"split is {split}; digits has the split 0 to 9"):
            load_dataset("digits", split=split)


def test_the_splits_of_the_digits_never_change():
    # Recorded accuracies speak of these very images.
    assert load_dataset("digits").test_y[:12].tolist() == GOLDEN_DIGITS[0]
    assert load_dataset("digits", split=9).test_y[:12].tolist() == GOLDEN_DIGITS[9]


# Draws


def test_epoch_order_is_a_permutation_fixed_by_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(100, seed, epoch) for seed in range(3) for epoch in range(3)}
    for key, order in orders.items():
        assert order.dtype == torch.int64 and order.device.type == "cpu"
        assert sorted(order.tolist()) == list(range(100))
        assert torch.equal(order, epoch_order(100, *key))
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)
    torch.manual_seed(1), np.random.seed(1)
    assert torch.equal(orders[2, 2], epoch_order(100, 2, 2))
    assert epoch_order(10, 0, 0).tolist() == GOLDEN_ORDER


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 6250), (32, 1563)])
def test_the_short_last_batch_is_kept(batch_size, steps):
    batches = epoch_order(50000, 0, 0).split(batch_size)
    assert len(batches) == steps and len(torch.cat(batches).unique()) == 50000


@pytest.mark.parametrize("arguments", [(0, 0, 0), (5, -1, 0), (5, 2**32, 0), (5, 0, -1)])
def test_impossible_draws_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^(n|seed|epoch) is"):
        epoch_order(*arguments)


def test_a_subset_is_a_seeded_choice_and_nested():
    dataset = load_dataset("digits")
    small, large = data.take_subset(dataset, 50), data.take_subset(dataset, 100)
    assert torch.equal(large.train_x[:50], small.train_x) and torch.equal(large.train_y[:50], small.train_y)
    assert fingerprint(load_dataset("digits", subset=50).train_x) == fingerprint(small.train_x)
    assert fingerprint(data.take_subset(dataset, 50, seed=1).train_x) != fingerprint(small.train_x)
    assert small.test_x is dataset.test_x
    for n in (0, 1349):
        with pytest.raises(ValueError, match=f"subset is {n}; it must be 1 to 1348"):
            data.take_subset(dataset, n)


def test_validation_splits_the_training_part_and_drops_the_test_part():
    x = torch.arange(100.0)[:, None]
    dataset = Dataset("counted", x, torch.arange(100), x[:3] + 1000, torch.arange(3), tuple(map(str, range(100))))
    for size, n in ((0.25, 25), (10, 10)):
        split = data.split_validation(dataset, size, seed=3)
        assert len(split.test_x) == n and len(split.train_x) == 100 - n
        assert sorted([*split.train_x[:, 0].tolist(), *split.test_x[:, 0].tolist()]) == list(range(100))
        assert torch.equal(split.test_x[:, 0].long(), split.test_y)
        assert torch.equal(split.test_y, data.split_validation(dataset, size, seed=3).test_y)
        assert not torch.equal(split.test_y, data.split_validation(dataset, size, seed=4).test_y)
    for size in (0, 100, 0.0, 1.0):
        with pytest.raises(ValueError, match=f"size is {size}"):
            data.split_validation(dataset, size)


# Pixels


def test_normalisation_is_the_recipes_formula_per_channel():
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    mean, std = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)
    out = Normalize(255.0, mean, std)(x, torch.float64)
    for c in range(3):
        wanted = (np.arange(256) / 255.0 - mean[c]) / std[c]
        assert np.array_equal(out[0, c].flatten().numpy(), wanted)  # to the last bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalisation_rounds_once_to_the_dtype_asked_for(dtype):
    x = torch.arange(256, dtype=torch.uint8)[:, None]
    out = Normalize()(x, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, (x.double() / 255).to(dtype) if dtype == torch.float64 else (x.float() / 255).to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_normalisation_gives_the_same_bits_on_every_device(dtype):
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    normalize = Normalize(255.0, (0.49137255, 0.48235294, 0.44666667), (0.24705882, 0.24352941, 0.26156863))
    assert torch.equal(normalize(x.cuda(), dtype).cpu(), normalize(x, dtype))


def test_normalisation_leaves_its_input_alone():
    x = torch.full((2, 1), 4.0)
    assert Normalize(2.0, (1.0,), (0.5,))(x).tolist() == [[2.0], [2.0]]
    assert x.tolist() == [[4.0], [4.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "scale is 0.0"),
        ((float("nan"),), "scale is nan"),
        ((1.0, (0.5,)), "std is None"),
        ((1.0, (0.5,), (1.0, 1.0)), "mean has 1 values and std 2"),
        ((1.0, (0.5,), (0.0,)), "every value must be positive"),
    ],
)
def test_impossible_normalisation_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Normalize(*arguments)


def test_normalisation_checks_channels_and_dtype():
    normalize = Normalize(255.0, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"\(2, 32, 32, 3\); dimension 1 must have the 3"):
        normalize(torch.zeros(2, 32, 32, 3))
    with pytest.raises(ValueError, match=r"dtype is torch\.int64"):
        normalize(torch.zeros(2, 3), torch.int64)


# Fingerprints


def test_a_fingerprint_tells_values_shape_and_dtype():
    x = torch.arange(6, dtype=torch.uint8)
    others = [x.view(2, 3), x.view(3, 2), x.to(torch.int8), x.flip(0), x[:5], x.float(), x[0], x[:0]]
    assert len({fingerprint(t) for t in [x, *others]}) == 9
    assert fingerprint(x) == hashlib.sha256(b"torch.uint8 [6] " + bytes(range(6))).hexdigest()


def test_a_fingerprint_does_not_tell_strides():
    x = torch.arange(6.0).view(2, 3)
    assert fingerprint(x.T.contiguous().T) == fingerprint(x)
    assert fingerprint(x.bfloat16().T) == fingerprint(x.T.bfloat16().contiguous())


# Folders of images


@pytest.fixture
def folder(tmp_path):
    """A folder with train/{cat,dog} and test/{cat,dog}: images of one colour per class, 6 x 4 pixels."""
    for part, n in (("train", 3), ("test", 1)):
        for name, colour in (("cat", (200, 0, 0)), ("dog", (0, 0, 100))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (6, 4), colour).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_images_is_a_data_set(folder):
    dataset = load_dataset("pets", path=folder)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train_x.shape == (6, 3, 4, 6) and dataset.test_x.shape == (2, 3, 4, 6)
    assert dataset.train_y.tolist() == [0, 0, 0, 1, 1, 1] and dataset.test_y.tolist() == [0, 1]
    assert dataset.train_x[:, :, 0, 0].tolist() == [[200, 0, 0]] * 3 + [[0, 0, 100]] * 3


def test_class_folders_alone_are_a_training_part(folder):
    dataset = load_dataset("pets", path=folder / "train")
    assert len(dataset.train_x) == 6 and dataset.test_x is None


def test_images_are_made_the_size_asked_for(folder):
    Image.new("L", (50, 30), 7).save(folder / "train" / "cat" / "grey.png")
    assert load_dataset("pets", path=folder, input_size=(3, 8, 8)).train_x.shape == (7, 3, 8, 8)
    assert load_dataset("pets", path=folder, input_size=(1, 2, 5)).train_x.shape == (7, 1, 2, 5)
    with pytest.raises(ValueError, match=r"grey\.png is 30 x 50, .*0\.png is 4 x 6; state input_size"):
        load_dataset("pets", path=folder)


def test_resizing_crops_at_the_centre_instead_of_squeezing(tmp_path):
    (tmp_path / "a").mkdir()
    stripes = np.repeat(np.array([0, 100, 200, 0], np.uint8), 8)[None].repeat(
        16, 0
    )  # 16 x 32, the middle half 100 | 200
    Image.fromarray(stripes).save(tmp_path / "a" / "0.png")
    image = load_dataset("stripes", path=tmp_path, input_size=(1, 16, 16)).train_x[0, 0]
    assert image[0].tolist() == [100] * 8 + [200] * 8


def test_grey_images_have_one_channel(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (3, 3), 9).save(tmp_path / name / "0.png")
    assert load_dataset("grey", path=tmp_path).train_x.shape == (2, 1, 3, 3)


def test_a_bad_folder_is_refused_by_name(folder, tmp_path):
    (folder / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="class 'bird' is not among the classes of"):
        load_dataset("pets", path=folder)
    (folder / "test" / "bird").rmdir()
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no image"):
        load_dataset("pets", path=folder)
    (folder / "train" / "empty").rmdir()
    (folder / "train" / "cat" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an 8-bit image"):
        load_dataset("pets", path=folder)
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(folder / "train" / "cat" / "broken.png")
    with pytest.raises(ValueError, match=r"broken\.png .* more than 8 bits"):
        load_dataset("pets", path=folder)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare holds no class folder"):
        load_dataset("pets", path=tmp_path / "bare")
    with pytest.raises(ValueError, match=r"\(1, H, W\) or \(3, H, W\)"):
        load_dataset("pets", path=folder, input_size=(64,))


# Preparing


class FakeCIFAR10:
    """What torchvision's class offers after a download."""

    classes = tuple(arrays()["class_names"].tolist())

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        (Path(root) / "archive.tar.gz").write_bytes(b"downloaded")
        made = arrays()
        self.data = made["train_images" if train else "test_images"]
        self.targets = made["train_labels" if train else "test_labels"].tolist()


def test_prepare_makes_the_file_that_load_reads_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    path = data.prepare("cifar10", tmp_path / "new")
    assert path == tmp_path / "new" / "cifar10.npz" and [*path.parent.iterdir()] == [path]
    dataset = load_dataset("cifar10", tmp_path / "new")
    assert torch.equal(dataset.train_x.permute(0, 2, 3, 1), torch.from_numpy(arrays()["train_images"]))
    assert dataset.class_names == FakeCIFAR10.classes


def test_prepare_keeps_what_is_there(write, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", None)
    before = write("cifar10.npz").read_bytes()
    assert data.prepare("cifar10", tmp_path).read_bytes() == before
    assert data.prepare("digits") == data.ASSETS / "digits.npz"


@pytest.mark.parametrize("failure", [RuntimeError("File not found or corrupted."), OSError("no route to host")])
def test_without_a_network_prepare_says_what_to_do(tmp_path, monkeypatch, failure):
    def no_network(*_, **__):
        raise failure

    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    with pytest.raises(RuntimeError) as error:
        data.prepare("cifar10", tmp_path)
    for part in (str(failure), "torchvision", str(tmp_path / "cifar10.npz"), "train_images uint8 [50000, 32, 32, 3]"):
        assert part in str(error.value)
    assert [*tmp_path.iterdir()] == []
