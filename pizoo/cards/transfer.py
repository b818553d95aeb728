"""Cards of nets measured on another data set than they are trained on: by ridge regression on their features."""

from __future__ import annotations

from typing import Any

from pizoo.cards.images import Card
from pizoo.cards.text import duration, markdown_table, mean_and_error, mean_of, measured

VERIFY = (
    "`pizoo verify {entry}` re-measures this checkpoint: on a large GPU by ridge regression on all {train:,} training images "
    "of {data}, elsewhere on {small:,} of them and the first {small_test:,} test images, of which another number is recorded "
    "({small_accuracy:.2f} %, with the ridge chosen for all of them); `pizoo verify --quick {entry}` checks the weights alone, "
    "without data."
)
KERNEL = """\
# As it is it tells classes of {source}. Its features are what counts:
# pizoo kernel {entry} --on {target} --ridge {ridge:g}"""


class TransferCard(Card):
    """What a card says of a net whose number is its features'."""

    drawn = "transfer"
    chosen = ", by ridge regression on its features' kernel, epoch and ridge chosen on held-out training images"
    best_epochs = ""

    @property
    def images(self) -> str:
        return f"{super().images} of {self.source}"

    @property
    def part(self) -> str:
        return f"the test part of {self.source}, as the classifier that it was trained as"

    def code(self) -> str:
        target, ridge = self.recipe["transfer"]["data"]["name"], self.results["transfer"]["ridge"]
        return f"{super().code()}\n{KERNEL.format(entry=self.name, source=self.source, target=target, ridge=ridge)}"

    def verification(self) -> str:
        full, small = self.results["transfer"], self.results["verification"]
        return VERIFY.format(
            entry=self.name,
            data=self.data,
            train=full["training_images"],
            small=small["training_images"],
            small_test=small["test_images"],
            small_accuracy=small["accuracy"],
        )

    def numbers(self) -> str:
        results, transfer, shipped = self.results, self.recipe["transfer"], self.results["transfer"]
        published = f"at the published epoch {transfer['epoch']} and ridge {transfer['ridge']:g}"
        heads = ("", "chosen", published, f"the net itself on {self.source}", "time")
        chosen = f"**{results['accuracy']:.2f}**, {_setting(shipped)}"
        rows = [(f"**this checkpoint** ({self.made_of})", chosen, "", "", "")]
        others = []
        for run in self.seeds:
            found = run["transfer"]
            chosen = f"{run['accuracy']:.2f}, {_setting(found)} ({found['validation_accuracy']:.2f})"
            others.append([found[key]["accuracy"] for key in ("published_setting", "source")])
            told = ["" if accuracy is None else f"{accuracy:.2f}" for accuracy in others[-1]]
            rows.append((f"{self.run} {run['seed']}", chosen, *told, duration(run["wall_seconds"])))
        if len(self.seeds) > 1:
            total = duration(results["total_wall_seconds"])
            means = ["" if None in column else mean_of(column) for column in zip(*others, strict=True)]
            rows.append(("mean ± standard error", mean_and_error(results), *means, total))
        told = (
            f"Accuracy in percent on the {shipped['test_images']:,} test images of {self.data}, by ridge regression on the "
            f"kernel of the features of its {shipped['training_images']:,} training images, in float64. Epoch and ridge are "
            f"chosen on {100 * transfer['validation']:g} % of the training images, held out (accuracy on these in brackets). "
            "Times are wall time, measuring included."
        )
        return f"{told}\n\n{markdown_table(heads, rows)}\n\n{measured(results)}"


def _setting(found: dict[str, Any]) -> str:
    return f"epoch {found['epoch']}, ridge {found['ridge']:g}"
