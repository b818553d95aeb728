"""Cards of what learns tasks from a few examples: nets, and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pizoo.cards.images import Card
from pizoo.cards.text import duration, markdown_table, measured, plus_minus, words
from pizoo.evaluation.fewshot import SPLITS, TaskAccuracy

VERIFY = (
    "`pizoo verify {entry}` re-measures this checkpoint on the first {verified:,} of the recorded tasks; "
    "`pizoo verify --quick {entry}` checks its logits on one stored task, without data."
)
ADAPT = """\
# support_x [{support}, {size}], ink 1 and paper 0; support_y: labels 0 to {last}
predictor = model.adapt(support_x, support_y, {arguments})
logits = predictor(query_x)"""


class TasksCard(Card):
    """What a card says of a few-shot learner."""

    tags: ClassVar[list[str]] = [*Card.tags, "few-shot-learning"]
    unit = "task"
    drawn = "validation"
    best_epochs = ""

    @property
    def tasks(self) -> dict[str, Any]:
        """The recipe's few-shot part."""
        return self.recipe["tasks"]

    @property
    def split(self) -> str:
        return self.tasks["headline"]

    @property
    def shape(self) -> str:
        """Of a task."""
        return f"{self.recipe['data']['classes']}-way {self.tasks['shots']}-shot"

    @property
    def part(self) -> str:
        return f"the queries of {self.count:,} tasks of {words(self.split)} classes"

    @property
    def measured_on(self) -> str:
        return f"the queries of {self.count:,} tasks of {self.data} ({self.shape}, {words(self.split)} classes)"

    @property
    def chosen(self) -> str:
        return ", epoch chosen on rotated validation classes" if self.trained else ""

    @property
    def chance(self) -> float:
        return self.results["splits"][self.split]["standard_error"]

    @property
    def epochs(self) -> str:
        train, order = self.recipe["train"], "first" if self.tasks["first_order"] else "second"
        return (
            f"{train['epochs']} epochs of {train['steps_per_epoch']} outer steps on {train['batch_size']} tasks each ({order} "
            f"order, inner steps of {self.tasks['step_size']:g})"
        )

    @property
    def solved(self) -> str:
        return f"adapted to each task from zero, by a step of {self.tasks['step_size']:g} in the kernel's space of functions"

    def code(self) -> str:
        tasks, ways = self.tasks, self.recipe["data"]["classes"]
        usual = {"steps": 1, "layers": "readout"}
        options = {key: tasks[key] for key in ("step_size", *usual) if tasks[key] != usual.get(key)}
        adapt = ADAPT.format(
            support=ways * tasks["shots"],
            size=", ".join(map(str, self.recipe["data"]["input_size"])),
            last=ways - 1,
            arguments=", ".join(f"{key}={value!r}" for key, value in options.items()),
        )
        return f"{super().code()}\n{adapt}"

    def verification(self) -> str:
        return VERIFY.format(entry=self.name, verified=self.results["verification"]["tasks"])

    def numbers(self) -> str:
        results = self.results
        validation = f"epoch chosen (on {self.tasks['validation_tasks']:,} tasks of validation, rotated)"
        heads = ["", *(f"**{words(split)}**" if split == self.split else words(split) for split in SPLITS)]
        shipped = f"**this checkpoint** ({self.made_of})" if self.trained else "**this kernel**"
        rows = [[shipped, *_cells(results["splits"], self.split), "", ""]]
        for run in self.seeds if self.trained else ():
            best = f"{run['best_epoch']['epoch']} ({run['best_epoch']['accuracy']:.2f})"
            rows.append([f"{self.run} {run['seed']}", *_cells(run["splits"]), best, duration(run["wall_seconds"])])
        if len(self.seeds) > 1:
            means = [results["mean_splits"][split] for split in SPLITS]
            means = [plus_minus(mean["accuracy"], mean["standard_error"]) for mean in means]
            total = f"{duration(results['total_wall_seconds'])} in all"
            rows.append(["mean ± standard error over seeds", *means, "", total])
        if self.published:
            there = [f"{self.published['accuracy']:.2f}" if split == self.split else "" for split in SPLITS]
            rows.append(["published", *there, "", ""])
        heads, times = [*heads, validation, "time"], "; times are wall time, evaluation and saving included"
        if not self.trained:
            heads, times, rows = heads[:-2], "", [row[:-2] for row in rows]
        told = (
            f"{self.shape} accuracy in percent on {self.count:,} tasks of {self.data} each, with its 95 % interval over tasks. "
            f"The classes are part of every number: rotated ones (each turned into four) are easier. This entry's number is on "
            f"**{words(self.split)}** classes{times}."
        )
        return f"{told}\n\n{markdown_table(heads, rows)}\n\n{measured(results)}"


def _cells(splits: dict[str, Any], headline: str | None = None) -> Iterator[str]:
    for split in SPLITS:
        found, mark = TaskAccuracy(**splits[split]), "**" if split == headline else ""
        yield f"{mark}{found.accuracy:.2f}{mark} ± {found.half_width:.2f}"
