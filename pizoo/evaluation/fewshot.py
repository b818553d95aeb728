"""Few-shot accuracy: thousands of tasks, a confidence interval, and the split that it is on beside every number.

A split's tasks come from a frozen stream of random numbers (:func:`pizoo.data.frozen_uniform`): task k is the same on every
machine, and the first tasks are the same however many are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pizoo import checkpoint
from pizoo.data import TaskPool, frozen_uniform
from pizoo.evaluation.accuracy import percent
from pizoo.models.adapt import Adaptable

Learner = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
ROTATED = "_rotated"  # every class turned by 0, 90, 180 and 270 degrees, into four classes: easier
SPLITS = ("validation", "validation_rotated", "test", "test_rotated")
TEST_SEED, VALIDATION_SEED = 0, 1  # of final numbers, and of those that choose the epoch to keep
TASKS_DRAWN, TASKS_AT_ONCE = 500, 100  # a part of the stream; what passes the net together
VERIFIED_TASKS = 2000  # how many of the recorded tasks `pizoo verify` measures again
NORMAL_95 = 1.96


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on few-shot tasks.

    Attributes:
        accuracy: mean over tasks, percent of queries classified right.
        standard_error: of that mean, over tasks; None for one task.
        tasks: how many.
    """

    accuracy: float
    standard_error: float | None
    tasks: int

    @property
    def half_width(self) -> float | None:
        """Of the 95 % confidence interval, in points."""
        return None if self.standard_error is None else NORMAL_95 * self.standard_error

    @classmethod
    def of(cls, correct: Tensor) -> TaskAccuracy:
        """From which queries of each task are classified right, bool [T, Q]."""
        accuracies = 100 * correct.double().mean(1)
        spread = (accuracies.std() / len(accuracies) ** 0.5).item() if len(accuracies) > 1 else None
        return cls(percent(correct), spread, len(correct))


class Measured(NamedTuple):
    """A net's accuracy on every split.

    Attributes:
        recorded: what an entry records of it: ``accuracy`` in percent on the headline ``split``; ``splits``, a
            :class:`TaskAccuracy` of each as plain values; ``verification``, the accuracy on the first of the headline's tasks,
            and how many these are.
        correct: bool [T, Q], which queries of the headline's tasks are classified right.
    """

    recorded: dict[str, Any]
    correct: Tensor


def adapter(model: Adaptable, tasks: Mapping[str, Any]) -> Learner:
    """``model.adapt`` as a recipe's ``tasks`` part (plain values: step_size, steps, layers) says.

    Raises:
        TypeError: a model that cannot adapt.
    """
    if not isinstance(model, Adaptable):
        raise TypeError(
            f"model is a {type(model).__name__}, whose read-out cannot be adapted; it must be an InfPiMLP, FinPiMLP, MuMLP or "
            "a kernel learner"
        )
    return partial(model.adapt, step_size=tasks["step_size"], steps=tasks["steps"], layers=tasks["layers"])


@torch.no_grad()
def task_logits(
    model: Adaptable,
    learner: Learner,
    pool: TaskPool,
    count: int,
    shots: int = 1,
    queries: int = 1,
    seed: int = TEST_SEED,
) -> tuple[Tensor, Tensor]:
    """Logits [count, Q, ways] of the queries of ``count`` tasks after adaptation and their labels int64 [count, Q], on the CPU.

    Args:
        model: a net or kernel learner, put into eval mode meanwhile; a task has as many ways as it has outputs.
        learner: from support images and labels to a predictor of queries: :func:`adapter`, ``model.nearest_neighbour``.
        pool: classes to draw tasks from.
        shots, queries: images of each class.
        seed: of the tasks.

    Raises:
        ValueError: too few classes or drawings, predictions that are not finite.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    anchor = next(model.parameters(), torch.empty(0, device=pool.images.device))
    pool = pool.to(anchor.device)
    uniform = frozen_uniform(anchor.device, seed)
    training, parts = model.training, []
    model.eval()
    try:
        for start in range(0, count, TASKS_DRAWN):
            drawn = pool.draw(uniform, TASKS_DRAWN, model.num_classes, shots, queries)
            stop = min(TASKS_DRAWN, count - start)
            for at in range(0, stop, TASKS_AT_ONCE):
                batch = drawn[at : min(at + TASKS_AT_ONCE, stop)]
                logits = learner(batch.support_x, batch.support_y)(batch.query_x)
                if not logits.isfinite().all():
                    raise ValueError("logits of queries hold values that are not finite; the net makes no prediction")
                parts.append((logits.cpu(), batch.query_y.cpu()))
    finally:
        model.train(training)
    logits, labels = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(labels)


def task_correct(*measured: Any, **options: Any) -> Tensor:
    """Which queries of each task are classified right, bool [count, Q] on the CPU; arguments as for :func:`task_logits`."""
    logits, labels = task_logits(*measured, **options)
    return logits.argmax(-1) == labels


def split_pool(pools: Mapping[str, TaskPool], split: str) -> TaskPool:
    """The classes of one of ``SPLITS``, from pools as :func:`pizoo.data.load_tasks` gives them."""
    pool = pools[split.removesuffix(ROTATED)]
    return pool.rotated() if split.endswith(ROTATED) else pool


def split_logits(
    model: Adaptable,
    pools: Mapping[str, TaskPool],
    tasks: Mapping[str, Any],
    split: str | None = None,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`task_logits` as a recipe's ``tasks`` part says, of a split (None: the headline).

    ``count`` is of its first tasks; None: ``test_tasks``.
    """
    learner, pool = adapter(model, tasks), split_pool(pools, split or tasks["headline"])
    return task_logits(model, learner, pool, count or tasks["test_tasks"], tasks["shots"], tasks["queries"])


def split_correct(*measured: Any) -> Tensor:
    """:func:`task_correct` as a recipe's ``tasks`` part says; arguments as for :func:`split_logits`."""
    logits, labels = split_logits(*measured)
    return logits.argmax(-1) == labels


def measure_splits(
    model: Adaptable, pools: Mapping[str, TaskPool], tasks: Mapping[str, Any], count: int | None = None
) -> Measured:
    """Accuracy on ``count`` tasks (None: the recipe's ``test_tasks``) of every split."""
    correct = {split: split_correct(model, pools, tasks, split, count) for split in SPLITS}
    headline = correct[tasks["headline"]]
    first = TaskAccuracy.of(headline[:VERIFIED_TASKS])
    recorded = {
        "accuracy": TaskAccuracy.of(headline).accuracy,
        "split": tasks["headline"],
        "splits": {split: asdict(TaskAccuracy.of(right)) for split, right in correct.items()},
        "verification": {"tasks": first.tasks, "accuracy": first.accuracy},
    }
    return Measured(recorded, headline)


@torch.no_grad()
def save_with_task_probe(
    folder: Path, model: Adaptable, config: Mapping[str, Any], pool: TaskPool, tasks: Mapping[str, Any]
) -> None:
    """:func:`pizoo.checkpoint.save` with the first task of a pool as the probe."""
    anchor = next(model.parameters(), torch.empty(0))
    batch = pool.draw(
        frozen_uniform(torch.device("cpu"), TEST_SEED), 1, model.num_classes, tasks["shots"], tasks["queries"]
    )
    support_x, support_y, x = (part[0].to(anchor.device) for part in (batch.support_x, batch.support_y, batch.query_x))
    logits = adapter(model.eval(), tasks)(support_x, support_y)(x)
    probe = {"x": x, "logits": logits, "support_x": support_x, "support_y": support_y}
    checkpoint.save(folder, model, config, probe)
