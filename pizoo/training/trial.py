"""How long a finite net's steps take on this device: it is trained for a moment, on random inputs."""

from __future__ import annotations

import torch

from pizoo.data import Dataset, TaskPool
from pizoo.recipes import Recipe
from pizoo.training.meta import MetaTraining
from pizoo.training.supervised import Training

STEPS = {"cuda": 200, "cpu": 20}  # of an epoch. Two are trained: the first compiles, and captures a graph
CLASSES, DRAWINGS = 1028, 20  # to draw tasks from, as many as Omniglot has to train on: that counts, a little


def step_seconds(recipe: Recipe, samples: int, device: torch.device) -> float:
    """Seconds of a step of training ``recipe`` on ``samples`` images an epoch, or on its tasks.

    Measured as it would be trained there, in a second or two; of no other use for infinite nets, whose steps grow with their
    rows (:func:`pizoo.training.plan.plan` has an estimate of those).
    """
    tasks, settings, steps = recipe.tasks, recipe.train, STEPS[device.type]
    size = settings.batch_size if tasks else min(settings.batch_size, samples)
    if not tasks:
        steps = min(steps, samples // size)
    # Steps so small that nothing diverges, whatever the inputs.
    short = {"epochs": 2, "batch_size": size, "lr": 1e-6, "init_from": None}
    parts = {"transfer": None}
    if tasks:
        short["steps_per_epoch"] = steps
        parts["tasks"] = tasks.model_copy(update={"validation_tasks": 2, "test_tasks": 2})
    trial = recipe.model_copy(update={**parts, "train": settings.model_copy(update=short)})
    run = (
        MetaTraining(trial, _tasks(trial), None, device)
        if tasks
        else Training(trial, _images(trial, steps), None, device)
    )
    return run.run(progress=False).history[-1]["train_seconds"] / steps


def _images(recipe: Recipe, steps: int) -> Dataset:
    data, count = recipe.data, steps * recipe.train.batch_size
    x = torch.randint(min(255, int(data.scale)) + 1, (count, *data.input_size), dtype=torch.uint8)
    y = torch.randint(data.classes, (count,))
    return Dataset("random", x, y, None, None, tuple(map(str, range(data.classes))))


def _tasks(recipe: Recipe) -> dict[str, TaskPool]:
    drawings = max(DRAWINGS, recipe.tasks.shots + recipe.tasks.queries)
    images = torch.randint(
        256, (max(CLASSES, recipe.data.classes), drawings, *recipe.data.input_size), dtype=torch.uint8
    )
    return {split: TaskPool(split, images) for split in ("train", "validation", "test")}
