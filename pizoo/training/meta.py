"""Training a recipe on few-shot tasks: the plain loop of :mod:`pizoo.training.supervised` around outer steps.

Tasks are drawn on the device, from the seed and the number of the epoch alone, so that an epoch is resumed from net and
optimizer as in supervised training. The net of the epoch with the best accuracy on validation classes, rotated, is the one
that a training gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pizoo import checkpoint
from pizoo.data import FewShotBatch, TaskPool, device_uniform
from pizoo.evaluation.accuracy import percent
from pizoo.evaluation.fewshot import (
    VALIDATION_SEED,
    Measured,
    adapter,
    measure_splits,
    save_with_task_probe,
    split_pool,
    task_correct,
)
from pizoo.files import read_json, write_json
from pizoo.models.adapt import Adaptable
from pizoo.recipes import Recipe
from pizoo.training.fewshot import clip_outer_gradient, task_results
from pizoo.training.folder import check_folder
from pizoo.training.plan import samples_per_epoch
from pizoo.training.report import LapTimer, StepProgress
from pizoo.training.results import TrainResult, training_results
from pizoo.training.supervised import REMEDY, Training, TrainingDiverged
from pizoo.training.task_engine import TaskEngine, unsupported_tasks

SELECTED = "validation_rotated"
DRAWN = 1000  # steps whose tasks are drawn at once: an epoch's, of the recipes here


class MetaTraining(Training):
    """One few-shot training: as a supervised one, with tasks for batches and a choice of epoch in the end."""

    @staticmethod
    def check_data(recipe: Recipe, dataset: dict[str, TaskPool]) -> None:
        tasks = recipe.tasks
        for pool in dataset.values():
            pool.check(recipe.data.classes, tasks.shots, tasks.queries)
            if pool.input_size != recipe.data.input_size:
                raise ValueError(
                    f"{pool.name}: images are {list(pool.input_size)}; they must be {list(recipe.data.input_size)}"
                )

    def _sizes(self) -> tuple[int, int, int]:
        return samples_per_epoch(self.recipe), self.recipe.train.steps_per_epoch, 0

    def _take(self) -> None:
        self.pool, self.validation = (split_pool(self.dataset, s).to(self.device) for s in ("train_rotated", SELECTED))
        self.class_names = class_names(self.recipe)

    def _cannot(self) -> str | None:
        return unsupported_tasks(self.model, self.recipe.train, self.recipe.tasks, self.steps_per_epoch)

    def _make_engine(self) -> TaskEngine:
        factors = torch.tensor([self._lr_factor(step) for step in range(self.steps)], dtype=torch.float64)
        settings, tasks = self.recipe.train, self.recipe.tasks
        return TaskEngine(self.model, self.optimizer, settings, tasks, factors.to(self.device), self.steps_per_epoch)

    def _best_epoch(self) -> int:
        """The epoch with the best accuracy on validation classes, the earliest of several."""
        return max(self.history, key=lambda record: record["validation_accuracy"])["epoch"]

    def _epoch(self, epoch: int, bar: StepProgress) -> dict[str, Any]:
        settings, begin = self.recipe.train, time.perf_counter()
        self.model.train()
        dtype = next(self.model.parameters()).dtype
        first, sums = epoch * self.steps_per_epoch, torch.zeros(3, dtype=torch.float64)
        for step, means in enumerate(self._means(epoch, dtype), first):
            if not math.isfinite(means[1]):
                self._diverged(step, means[1])
            sums += torch.tensor(means, dtype=torch.float64)
            bar.advance(epoch, means[1])
        inner_loss, loss, train_accuracy = (sums / self.steps_per_epoch).tolist()
        record = {
            "epoch": epoch + 1,
            "step": first + self.steps_per_epoch,
            "lr": settings.lr * self._lr_factor(first + self.steps_per_epoch - 1),
            "inner_loss": inner_loss,
            "train_loss": loss,
            "train_accuracy": train_accuracy,
            "train_seconds": time.perf_counter() - begin,
        }
        try:
            record["validation_accuracy"] = self._validate()
        except ValueError as error:
            raise TrainingDiverged(f"after epoch {epoch + 1} {error}; {self._kept(epoch)}. {REMEDY}") from None
        return self._log(record)

    def _means(self, epoch: int, dtype: torch.dtype) -> Iterator[list[float]]:
        """Train for an epoch; of each step the means over its tasks of inner loss, outer loss and accuracy."""
        tasks, size = self.recipe.tasks, self.recipe.train.batch_size
        uniform = device_uniform(self.device, self.recipe.train.seed, epoch)
        first, end = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        for start in range(first, end, DRAWN):
            count = size * min(DRAWN, end - start)
            drawn = self.pool.draw(uniform, count, self.recipe.data.classes, tasks.shots, tasks.queries).to(dtype)
            if self.engine is not None:
                yield from self.engine.run_tasks(drawn, start)
            else:
                for i, batch in enumerate(drawn.split(size)):
                    yield self._outer_step(start + i, batch)

    def _outer_step(self, step: int, batch: FewShotBatch) -> list[float]:
        settings, tasks, max_norm = self.recipe.train, self.recipe.tasks, self._schedule(step)
        self.optimizer.zero_grad()
        results = task_results(self.model, batch, tasks.step_size, tasks.first_order, tasks.steps, tasks.layers)
        results.outer_losses.sum().backward()
        norms = clip_outer_gradient(self.model, self.optimizer, max_norm, settings.clip.per_param)
        means = torch.stack([part.detach().double().mean() for part in results]).tolist()
        self._take_step(step, means[1], norms)
        return means

    def _validate(self) -> float:
        tasks = self.recipe.tasks
        learner = adapter(self.model, tasks.model_dump())
        count, shape = tasks.validation_tasks, (tasks.shots, tasks.queries)
        return percent(task_correct(self.model, learner, self.validation, count, *shape, VALIDATION_SEED))

    def _results(self) -> dict[str, Any]:
        best = max(self.history, key=lambda record: record["validation_accuracy"])
        chosen = {"epoch": best["epoch"], "accuracy": best["validation_accuracy"], "note": f"on {SELECTED}"}
        measured = measure_splits(self.model, self.dataset, self.recipe.tasks.model_dump()).recorded
        return {**task_training_results(self.recipe, self.history, measured, self.device), "best_epoch": chosen}


def measure_kernel(
    recipe: Recipe, dataset: dict[str, TaskPool], folder: Path | None, device: torch.device
) -> TrainResult:
    """A kernel learner, which has nothing to train, and its accuracies; if ``folder`` holds them already, they are read."""
    timer, model = LapTimer(), recipe.build_model(device).eval()
    if folder is not None:
        check_folder(folder, recipe)
        if (folder / checkpoint.RESULTS).exists():
            results = read_json(folder / checkpoint.RESULTS)
            return TrainResult(checkpoint.load(folder, device=device)[0], recipe, folder, results["history"], results)
    tasks = recipe.tasks.model_dump()
    measured = measure_splits(model, dataset, tasks).recorded
    best = {"epoch": 0, "accuracy": measured["splits"][SELECTED]["accuracy"], "note": f"on {SELECTED}"}
    record = {"epoch": 0, "train_seconds": 0.0, "wall_seconds": timer.lap()}
    results = {**task_training_results(recipe, [record], measured, device), "best_epoch": best}
    if folder is not None:
        save_with_task_probe(folder, model, recipe.config(class_names(recipe)), dataset["test"], tasks)
        write_json(folder / checkpoint.RESULTS, results)
    return TrainResult(model, recipe, folder, [record], results)


def task_training_results(
    recipe: Recipe, history: list[dict[str, Any]], measured: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What a finished few-shot training records, with what was ``measured`` on every split."""
    results = training_results(recipe, history, device)
    results["data"]["part"] = recipe.tasks.headline
    return {**results, **measured}


def ship(model: Adaptable, config: Mapping[str, Any], folder: Path, pools: dict[str, TaskPool]) -> Measured:
    """Write a net into a folder, and measure what a user will load from there on every split."""
    tasks = config["recipe"]["tasks"]
    save_with_task_probe(folder, model, config, pools["test"], tasks)
    device = next((tensor.device for tensor in model.state_dict().values()), None)
    return measure_splits(checkpoint.load(folder, device=device)[0], pools, tasks)


def class_names(recipe: Recipe) -> list[str]:
    """The classes of a task have no names of their own."""
    return [str(k) for k in range(recipe.data.classes)]
