"""Few-shot tasks: what a file must hold, and that tasks are drawn without repeats, evenly, and again from their seed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pizoo import data
from pizoo.data import TaskPool, device_uniform, frozen_uniform, load_tasks, omniglot

GOLDEN_TASKS = ([[4, 2, 9], [1, 3, 9]], [[1, 3, 3], [3, 3, 1]])  # classes and drawings
REAL = Path(os.environ.get("PIZOO_DATA", "")) / "omniglot.npz"
CPU = torch.device("cpu")
NAMES = {
    "train": ["background/A/character01", "evaluation/B/character02"],
    "validation": ["background/A/character02"],
    "test": ["evaluation/B/character01"],
}


def numbered(classes: int = 6, drawings: int = 4, side: int = 2) -> TaskPool:
    """A pool whose images tell class and drawing: every pixel is 20 * class + drawing."""
    value = 20 * torch.arange(classes)[:, None] + torch.arange(drawings)
    return TaskPool("numbered", value[..., None, None, None].expand(-1, -1, 1, side, side).to(torch.uint8))


def origin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and drawing of each image that was drawn from a numbered pool."""
    value = (x[..., 0] * 255).round().long()
    return value // 20, value % 20


@pytest.mark.parametrize("shots, queries", [(1, 1), (2, 1), (1, 3)])
def test_a_task_has_its_ways_classes_and_no_image_twice(shots: int, queries: int) -> None:
    batch = numbered().draw(frozen_uniform(CPU, 0), 200, 5, shots, queries)
    assert batch.support_x.shape == (200, 5 * shots, 4) and batch.query_x.shape == (200, 5 * queries, 4)
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    classes, drawings = origin(x)
    for task in range(200):
        seen = {(int(label), int(c)) for label, c in zip(y[task], classes[task], strict=True)}
        assert len(seen) == 5 == len({c for _, c in seen}) == len({label for label, _ in seen})
        images = {(int(c), int(d)) for c, d in zip(classes[task], drawings[task], strict=True)}
        assert len(images) == 5 * (shots + queries)


def test_every_class_drawing_and_label_comes_equally_often() -> None:
    """Counts within five standard deviations of what even drawing gives."""
    batch = numbered().draw(frozen_uniform(CPU, 1), 3000, 2, 1, 1)
    classes, drawings = origin(batch.support_x)
    assert (torch.bincount(classes[:, 0], minlength=6) - 500).abs().max() < 5 * (3000 * 5 / 36) ** 0.5
    assert (torch.bincount(drawings.flatten(), minlength=4) - 1500).abs().max() < 5 * (6000 * 3 / 16) ** 0.5


def test_a_seed_gives_its_tasks_again() -> None:
    pool = numbered(side=1)
    for uniform in (lambda seed: frozen_uniform(CPU, seed), lambda seed: device_uniform(CPU, seed, epoch=2)):
        first, again, other = (pool.draw(uniform(seed), 20).support_x for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
    epochs = [pool.draw(device_uniform(CPU, 3, epoch), 20).support_x for epoch in (2, 3)]
    assert not torch.equal(*epochs)


def test_tasks_that_numbers_are_measured_on_are_frozen() -> None:
    classes, drawings = origin(numbered(classes=12).draw(frozen_uniform(CPU, 0), 2, ways=3).support_x)
    assert (classes.tolist(), drawings.tolist()) == GOLDEN_TASKS


def test_rotated_classes_are_classes_of_their_own() -> None:
    images = torch.arange(2 * 3 * 4).reshape(2, 3, 1, 2, 2).to(torch.uint8)
    turned = TaskPool("test", images).rotated()
    assert turned.name == "test_rotated" and turned.images.shape == (8, 3, 1, 2, 2)
    for k in range(4):
        wanted = np.rot90(images.numpy(), k, (3, 4))
        assert (turned.images[2 * k : 2 * k + 2].numpy() == wanted).all()


def test_floating_point_pixels_are_taken_as_they_are() -> None:
    images = torch.rand(3, 2, 1, 2, 2)
    batch = TaskPool("mine", images).draw(frozen_uniform(CPU, 0), 50, 2)
    assert set(batch.query_x.flatten().tolist()) <= set(images.flatten().tolist())


REFUSED = {
    "too many ways": (lambda: numbered().check(7, 1, 1), ["ways is 7", "6 classes"]),
    "too many shots": (lambda: numbered().check(5, 3, 2), ["shots is 3 and queries 2", "4 drawings"]),
    "when drawing": (lambda: numbered().draw(frozen_uniform(CPU, 0), 1, 5, 4, 1), ["shots is 4", "4 drawings"]),
    "no shots": (lambda: numbered().check(5, 0, 1), ["shots is 0", "at least 1"]),
    "another shape": (lambda: TaskPool("mine", torch.rand(3, 28, 28)), ["mine", "[3, 28, 28]", "[classes, drawings"]),
    "no class": (lambda: TaskPool("mine", torch.rand(0, 2, 1, 3, 3)), ["mine", "[0, 2, 1, 3, 3]"]),
    "pixels above 1": (lambda: TaskPool("mine", torch.full((1, 2, 1, 3, 3), 255.0)), ["from 255 to 255", "[0, 1]"]),
    "pixels that are no number": (lambda: TaskPool("mine", torch.full((1, 2, 1, 3, 3), torch.nan)), ["nan", "[0, 1]"]),
    "integers": (lambda: TaskPool("mine", torch.ones(1, 2, 1, 3, 3, dtype=torch.int32)), ["torch.int32", "uint8"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_was_found_and_what_is_wanted(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


# The file


def arrays(**changes) -> dict[str, np.ndarray]:
    """A small valid file for the split ``NAMES``: class k's drawing i has k * 20 + i inked pixels in its first row."""
    names = [name for part in NAMES.values() for name in part]
    images = np.zeros((len(names) * 20, 105, 105), dtype=np.uint8)
    for i, image in enumerate(images):
        image[0, : i + 1] = 255
    label = np.repeat(np.arange(len(names)), 20).astype(np.int16)
    shuffled = np.random.RandomState(0).permutation(len(label))
    made = {"images": images[shuffled], "label": label[shuffled], "class_names": np.array(names)} | changes
    return {key: array for key, array in made.items() if array is not None}


@pytest.fixture
def small_split(monkeypatch):
    monkeypatch.setattr(omniglot, "split_names", lambda: NAMES)


def test_the_split_has_the_published_sizes_and_no_class_twice() -> None:
    split = omniglot.split_names()
    assert {part: len(names) for part, names in split.items()} == {"train": 1028, "validation": 172, "test": 423}
    assert len({name for names in split.values() for name in names}) == 1623


def test_a_file_is_read_into_its_splits_class_by_class(tmp_path, small_split) -> None:
    np.savez(tmp_path / "omniglot.npz", **arrays())
    pools = load_tasks("omniglot", tmp_path)
    assert {part: tuple(pool.images.shape) for part, pool in pools.items()} == {
        part: (len(names), 20, 1, 28, 28) for part, names in NAMES.items()
    }
    ink = pools["train"].images.double().sum((2, 3, 4))
    assert ink[0].max() < ink[1].min()  # labels, not the order in the file, tell the classes apart


def test_shrinking_averages_the_ink() -> None:
    """Antialiased: every output pixel is a weighted mean of all that it covers, so that no stroke is lost between samples."""
    page = np.zeros((1, 105, 105), np.uint8)
    for column in range(8, 97):
        page[:] = 0
        page[0, :, column] = 255
        small = omniglot.shrink(page)
        assert small.shape == (1, 1, 28, 28) and small.dtype == torch.uint8
        ink = small[0, 0, 14].double().sum().item()
        assert ink == pytest.approx(255 * 28 / 105, abs=2)


BAD_FILES = {
    "a key is missing": ({"label": None}, ["no key 'label'"]),
    "images of another size": ({"images": np.zeros((80, 28, 28), np.uint8)}, ["[80, 28, 28]", "[80, 105, 105]"]),
    "images in [0, 1]": ({"images": np.zeros((80, 105, 105))}, ["float64", "uint8"]),
    "too few images": ({"images": np.zeros((79, 105, 105), np.uint8)}, ["[79, 105, 105]", "[80, 105, 105]"]),
    "a class is missing": (
        {"class_names": np.array([*"abcd"])},
        ["class_names", "'background/A/character01'", "3 more"],
    ),
    "too few drawings": ({"label": np.arange(80) % 3}, ["label", "0 to 27 images", "20 each"]),
    "labels out of range": ({"label": np.arange(80) % 5}, ["label", "0 to 4", "0 to 3"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_right_is_named_with_what_is_wrong(tmp_path, small_split, case: str) -> None:
    changes, words = BAD_FILES[case]
    np.savez(tmp_path / "omniglot.npz", **arrays(**changes))
    with pytest.raises(ValueError) as error:
        load_tasks("omniglot", tmp_path)
    for word in ("omniglot.npz", *words):
        assert word in str(error.value)


def test_where_the_file_should_be_and_how_to_make_it_is_told(tmp_path) -> None:
    with pytest.raises(data.DataNotFoundError) as error:
        load_tasks("omniglot", tmp_path)
    for part in (str(tmp_path / "omniglot.npz"), "$PIZOO_DATA", "pizoo data prepare omniglot", "images uint8"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"cifar10.*there is omniglot"):
        load_tasks("cifar10", tmp_path)
    with pytest.raises(ValueError, match=r"draw tasks from.*load_tasks"):
        data.load_dataset("omniglot", tmp_path)


def test_prepare_makes_the_file_from_what_torchvision_downloads(tmp_path, small_split, monkeypatch) -> None:
    def fake(root: str, background: bool, download: bool) -> None:
        part = "background" if background else "evaluation"
        for names in NAMES.values():
            for name in names:
                where, alphabet, character = name.split("/")
                folder = Path(root) / "omniglot-py" / f"images_{part}" / alphabet / character
                if where == part:
                    folder.mkdir(parents=True)
                    for drawing in range(1, 21):
                        drawn = np.full((105, 105), 255, np.uint8)
                        drawn[drawing] = 0
                        Image.fromarray(drawn).convert("1").save(folder / f"0007_{drawing:02d}.png")

    monkeypatch.setattr("torchvision.datasets.Omniglot", fake)
    path = data.prepare("omniglot", tmp_path)
    with np.load(path, allow_pickle=False) as made:
        assert made["images"].shape == (80, 105, 105) and made["drawing"].tolist() == [*range(1, 21)] * 4
        assert (made["images"][3, 4] == 255).all() and made["images"][3].sum() == 105 * 255  # ink is 255
        names = made["class_names"]
        assert [names[i] for i in made["split_val"]] == NAMES["validation"]
    assert {part: len(pool.images) for part, pool in load_tasks("omniglot", tmp_path).items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


@pytest.mark.skipif(not REAL.is_file(), reason="no omniglot.npz in $PIZOO_DATA")
def test_the_real_omniglot_is_as_it_should_be() -> None:
    pools = load_tasks("omniglot", REAL.parent)
    assert {part: len(pool.images) for part, pool in pools.items()} == {"train": 1028, "validation": 172, "test": 423}
    for pool in pools.values():
        assert 0.05 < pool.images.double().mean() / 255 < 0.12  # ink is 1, most of a page is paper
