"""Cards of what is measured on test images: nets, and kernel regressors."""

from __future__ import annotations

from typing import ClassVar

from pizoo import checkpoint
from pizoo.cards.record import Record
from pizoo.cards.text import duration, markdown_table, mean_and_error, measured
from pizoo.data import ASSETS, dataset_path

VERIFY = (
    "`pizoo verify {entry}` re-measures the number of this checkpoint; `pizoo verify --quick {entry}` checks the weights "
    "alone, without data."
)
# Of kernel regressors whose training images do not ship.
ATTACH = """data = pizoo.zoo.dataset(model.config)  # the training images it predicts from
model.attach(pizoo.zoo.preprocessing(model.config)(data.train_x, torch.float64))"""
VERIFY_KERNEL = """\
It holds dual coefficients and the fingerprint of the training images they belong to, and needs those images to predict.

- `pizoo verify {entry}` re-measures its number. Nothing is solved again: the kernel between {test} test and {train}
  training images is computed in float64, block by block (a few GB of memory, minutes on two CPU cores).
- `pizoo verify --images 1000 {entry}` is a smaller check: the first 1,000 test images, against what is recorded of them.
- `pizoo verify --quick {entry}` needs no data: it checks the SHA-256 of the coefficients, and what the first {probe} training
  images contribute to the scores of {probe} test images."""


class Card(Record):
    """What a card says of a net measured on test images; kinds of entries that differ are subclasses."""

    tags: ClassVar[list[str]] = ["pi-net", "infinite-width", "image-classification"]
    unit = "test image"  # what is counted
    drawn = "test"  # which accuracy its curves show
    part = "the test part"  # what is counted right, once the data set is named

    @property
    def split(self) -> str:
        """What its number is on, as data sets name their parts."""
        return "test"

    @property
    def measured_on(self) -> str:
        """What its number is a share of."""
        return f"the {self.count:,} test images of {self.data}"

    @property
    def chosen(self) -> str:
        """Which epoch's net its number is of, to end a sentence with; nothing for kernels."""
        return " after the last epoch"

    @property
    def best_epochs(self) -> str:
        """What its best epochs give, a sentence; nothing where epochs are chosen, or there are none."""
        return f"Best epochs, test-selected: {self.results['mean_best_epoch_accuracy']:.2f} %."

    @property
    def chance(self) -> float:
        """Standard error in points that its number has for being measured on so many test images, or tasks."""
        share = self.results["mean_accuracy"] / 100
        return 100 * (share * (1 - share) / self.count) ** 0.5

    @property
    def images(self) -> str:
        """What it is trained on."""
        subset = self.recipe["data"]["subset"]
        return f"{subset:,} of the training images" if subset else "all training images"

    @property
    def epochs(self) -> str:
        """How long it is trained, and on what."""
        train = self.recipe["train"]
        return f"{train['epochs']} epochs on {self.images}, batches of {train['batch_size']}"

    @property
    def solved(self) -> str:
        """What is done to a kernel instead of training."""
        return f"solved in float64 on {self.images}"

    def code(self) -> str:
        """How to use it."""
        return f'import pizoo\n\nmodel = pizoo.load("{self.name}")'

    def verification(self) -> str:
        """How to check it."""
        return VERIFY.format(entry=self.name)

    def numbers(self) -> str:
        """The recorded accuracies as a table: this checkpoint, every run, their mean; where and when they were measured."""
        results = self.results
        heads = ("", "after the last epoch", "best epoch, test-selected", "time")
        rows = [(f"**this checkpoint** ({self.made_of})", f"**{results['accuracy']:.2f}**", "", "")]
        for run in self.seeds:
            best = f"{run['best_epoch']['accuracy']:.2f} (epoch {run['best_epoch']['epoch']})"
            rows.append((f"{self.run} {run['seed']}", f"{run['accuracy']:.2f}", best, duration(run["wall_seconds"])))
        if len(self.seeds) > 1:
            best, total = f"{results['mean_best_epoch_accuracy']:.2f}", duration(results["total_wall_seconds"])
            rows.append(("mean ± standard error", mean_and_error(results), best, f"{total} in all"))
        if not self.trained:
            heads, rows = ("", "accuracy", "time"), [(name, accuracy, time) for name, accuracy, _, time in rows]
        told = (
            f"Accuracy in percent on the test part of {self.data}; times are wall time, evaluation and saving included."
        )
        return f"{told}\n\n{markdown_table(heads, rows)}\n\n{measured(results)}"


class KernelCard(Card):
    """What a card says of a kernel regressor."""

    chosen = best_epochs = ""

    @property
    def needs_images(self) -> bool:
        """Whether its training images do not ship."""
        data = self.recipe["data"]
        return data["path"] is not None or not dataset_path(data["name"]).is_relative_to(ASSETS)

    def code(self) -> str:
        return f"import torch\n\n{super().code()}\n{ATTACH}" if self.needs_images else super().code()

    def verification(self) -> str:
        if not self.needs_images:
            return super().verification()
        subset = self.recipe["data"]["subset"]
        train = f"{subset:,}" if subset else "all"
        return VERIFY_KERNEL.format(entry=self.name, test=f"{self.count:,}", train=train, probe=checkpoint.PROBE_INPUTS)
