"""Where published few-shot numbers may come from: nets and kernels on Omniglot by other protocols than their recipes'.

    python benchmarks/protocols.py [ENTRY or FOLDER ...] [--data DIR] [--tasks 8000] [--json FILE]
    python benchmarks/protocols.py --train omniglot_mu omniglot_finpi [--data DIR] [--seeds 2] [--json FILE]

Every line is one change of protocol: other drawings, tasks or predictions for the net that is there. With ``--train`` narrow
nets are trained, for a fifth of the steps, on other drawings or in another way, and measured on drawings of the same kind.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import pizoo
from pizoo.data import FewShotBatch, TaskPool, omniglot
from pizoo.data.known import dataset_path
from pizoo.data.tasks import Uniform
from pizoo.evaluation.fewshot import SPLITS, Learner, TaskAccuracy, adapter, split_pool, task_correct
from pizoo.files import write_json

ENTRIES = ("omniglot_nngp", "omniglot_ntk", "omniglot_mu", "omniglot_finpi", "omniglot_infpi")
NARROW = ("model.width=512", "train.epochs=10", "train.dtype=float32", "tasks.validation_tasks=500")

Shrink = Callable[[np.ndarray], Tensor]
Pools = dict[str, TaskPool]
bilinear: Shrink = omniglot.shrink  # the recipes'


def resized(method: Image.Resampling, images: np.ndarray) -> Tensor:
    """As the recipes resize, by another of PIL's filters."""
    small = [Image.fromarray(image).resize((omniglot.SIZE, omniglot.SIZE), method) for image in images]
    return torch.from_numpy(np.stack(small))[:, None]


def without_antialiasing(images: np.ndarray) -> Tensor:
    """Bilinear between the four nearest pixels, as torch resizes when not told otherwise."""
    x, size = torch.from_numpy(images)[:, None].float(), (omniglot.SIZE, omniglot.SIZE)
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False).round().to(torch.uint8)


DRAWINGS: dict[str, Shrink] = {
    "bilinear": bilinear,
    "bicubic": partial(resized, Image.Resampling.BICUBIC),
    "Lanczos": partial(resized, Image.Resampling.LANCZOS),
    "box": partial(resized, Image.Resampling.BOX),
    "bilinear without antialiasing": without_antialiasing,
    "nearest pixel": partial(resized, Image.Resampling.NEAREST),  # also what PIL makes of black-and-white images
    "bilinear, then thresholded at a half": lambda images: 255 * (bilinear(images) > 127).to(torch.uint8),
    "bilinear, then thresholded at a quarter": lambda images: 255 * (bilinear(images) > 63).to(torch.uint8),
    "ink 0, paper 1": lambda images: 255 - bilinear(images),
}
TRAINED_ON = ("bilinear", "bicubic", "Lanczos", "bilinear without antialiasing", "nearest pixel")


class WithReplacement(TaskPool):
    """Support and query (one of each) are drawn independently: now and then they are the same drawing."""

    def draw(self, uniform: Uniform, count: int, *shape: int) -> FewShotBatch:
        batch = super().draw(uniform, count, *shape)
        same = uniform(tuple(batch.query_y.shape)) < 1 / self.images.shape[1]
        return replace(batch, query_x=torch.where(same[..., None], batch.support_x, batch.query_x))


class Unturned(TaskPool):
    """Classes that are not turned where others are."""

    def rotated(self) -> TaskPool:
        return self


@cache
def read(data_dir: str | None, drawings: str = "bilinear") -> Pools:
    """The splits, with drawings resized in one of the ways of :data:`DRAWINGS`."""
    with mock.patch.object(omniglot, "shrink", DRAWINGS[drawings]):
        return omniglot.read(dataset_path("omniglot", data_dir))


def alphabets(pool: TaskPool, ways: int) -> list[TaskPool]:
    """The test classes, alphabet by alphabet, where there are enough for a task."""
    names = [name.rpartition("/")[0] for name in omniglot.split_names()["test"]]
    grouped = ([i for i, name in enumerate(names) if name == alphabet] for alphabet in sorted(set(names)))
    return [TaskPool("alphabet", pool.images[numbers]) for numbers in grouped if len(numbers) >= ways]


def shown(entry: str, data_dir: str | None, count: int) -> Iterator[dict[str, Any]]:
    """Accuracy of a net or kernel as it is, by one protocol after another; an eighth of the tasks where they cost more."""
    model = pizoo.load(entry)
    tasks, plain = model.config["recipe"]["tasks"], read(data_dir)
    name, recipes, few = model.config["recipe"]["entry"], adapter(model, tasks), count // 8

    def line(
        change: str, split: str, *pools: TaskPool, learner: Learner = recipes, count: int = count, **options: int
    ) -> dict[str, Any]:
        pools = pools or (split_pool(plain, split),)
        correct = [task_correct(model, learner, pool, count // len(pools), **options) for pool in pools]
        found = asdict(TaskAccuracy.of(torch.cat(correct)))
        print(f"{name}, {change}, {split}: {found['accuracy']:.2f} ± {found['standard_error']:.2f}", flush=True)
        return {"entry": name, "change": change, "split": split, **found}

    for split in SPLITS:
        pool = split_pool(plain, split)
        yield line("none", split)
        yield line("drawn with replacement", split, WithReplacement(pool.name, pool.images))
        if hasattr(model, "nearest_neighbour"):
            yield line("nearest neighbour", split, learner=model.nearest_neighbour)
    yield line("other tasks", "test", seed=2)
    yield line("15 queries a class", "test", queries=15, count=few)
    yield line("classes of one alphabet", "test", *alphabets(plain["test"], model.num_classes))
    for change, split in itertools.product(list(DRAWINGS)[1:], ("validation_rotated", "test")):
        yield line(change, split, split_pool(read(data_dir, change), split))
    if hasattr(model, "nearest_neighbour"):
        for steps in (5, 20):
            yield line(f"{steps} inner steps", "test", learner=adapter(model, {**tasks, "steps": steps}))
        everything = adapter(model, {**tasks, "layers": "all"})
        yield line("inner step of all layers", "test", learner=everything, count=few)


def trained(entry: str, data_dir: str | None, seed: int) -> Iterator[dict[str, Any]]:
    """Accuracy of narrow nets trained by one other protocol after another, each measured on drawings of its own kind."""
    plain, lr = read(data_dir), pizoo.load_recipe(entry).train.lr
    unturned = {**plain, "train": Unturned("train", plain["train"].images)}
    more = torch.cat([plain["train"].images, plain["validation"].images])
    changes = {name: (read(data_dir, name), ()) for name in TRAINED_ON}
    changes |= {
        "training classes not turned": (unturned, ()),
        "trained on validation classes too": ({**plain, "train": TaskPool("train", more)}, ()),
        "first order": (plain, ("tasks.first_order=true",)),
        "half the learning rate": (plain, (f"train.lr={lr / 2}",)),
        "a quarter of the learning rate": (plain, (f"train.lr={lr / 4}",)),
    }
    for change, (pools, overrides) in changes.items():
        run = pizoo.train(entry, overrides=[*NARROW, *overrides, f"train.seed={seed}"], dataset=pools, device="cpu")
        for split, found in run.results["splits"].items():
            yield {"entry": entry, "change": change, "seed": seed, "split": split} | found
        accuracies = ", ".join(f"{split} {found['accuracy']:.2f}" for split, found in run.results["splits"].items())
        print(f"{entry}, {change}, seed {seed}: {accuracies}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", default=ENTRIES, help="with --train, of nets alone")
    parser.add_argument("--data", help="folder of data sets")
    parser.add_argument("--tasks", type=int, default=8000)
    parser.add_argument("--train", action="store_true", help="train narrow nets")
    parser.add_argument("--seeds", type=int, default=2, help="of the narrow nets")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.train:
        runs = (trained(entry, args.data, seed) for seed in range(args.seeds) for entry in args.entries)
    else:
        runs = (shown(entry, args.data, args.tasks) for entry in args.entries)
    report = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "lines": []}
    for found in itertools.chain.from_iterable(runs):
        report["lines"].append(found)
        if args.json:
            write_json(args.json, report)


if __name__ == "__main__":
    main()
