"""Supervised training of a recipe, as a plain loop; kernel recipes are solved instead (:mod:`pizoo.training.kernel`).

Everything a training does follows from its recipe: initial values and batch order from the seed, the learning rate from the
step. An epoch is therefore resumed from the net and the optimizer alone, and the resumed run is the uninterrupted one, bit for
bit on the same machine.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pizoo import checkpoint, ops, processes, segments
from pizoo.data import Dataset, epoch_order
from pizoo.evaluation.accuracy import accuracy, predict
from pizoo.files import read_json, write_json
from pizoo.memory import explained
from pizoo.optim import PiSGD, clip_grad_norm_, param_groups
from pizoo.recipes import Recipe, RecipeError
from pizoo.rows import growing_layers
from pizoo.training.engine import Engine, unsupported
from pizoo.training.finetune import freeze, initial_rows, source_net, take_trunk
from pizoo.training.folder import check_folder
from pizoo.training.plan import plan
from pizoo.training.report import LapTimer, StepProgress, log
from pizoo.training.results import TrainResult, training_results
from pizoo.training.schedule import schedule_factor
from pizoo.training.state import Behind, Snapshot, optimizer_tensors, restore

REMEDY = "Try a smaller train.lr or train.clip.max_norm, and check the inputs"


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the message says where, and which checkpoint is the last good one."""


class Training:
    """One training run: its net, optimizer and where it stands."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        folder: Path | None,
        device: torch.device,
        engine: bool | None = None,
        rows_on: str = "auto",
    ):
        self.timer, self.writing = LapTimer(), Behind()
        self.recipe, self.dataset, self.folder, self.device = recipe, dataset, folder, device
        self.history: list[dict[str, Any]] = []
        self.best: Snapshot | None = None  # the net of the best epoch, where that is what a training gives
        self.correct: Tensor | None = None
        self.samples_per_epoch, self.steps_per_epoch, tested = self._sizes()
        self.steps = self.steps_per_epoch * recipe.train.epochs
        self.source = source_net(recipe)
        first = initial_rows(self.source)
        self.plan = plan(recipe, self.samples_per_epoch, device, rows_on=rows_on, first=first, tested=tested)
        self.plan.check(recipe.entry)
        log.info("%s", self.plan.summary(recipe.entry))
        if processes.count() > 1:
            log.info("%d processes train together, each with that much memory", processes.count())
        if self.plan.rows_on == "host":
            self._tell_of_streaming()
        with explained(self._ran_out):
            self._prepare(engine)

    def _tell_of_streaming(self) -> None:
        planned = plan(
            self.recipe,
            self.samples_per_epoch,
            self.device,
            estimate_time=True,
            rows_on="host",
            first=initial_rows(self.source),
        )
        told = planned.streaming(self.recipe.entry)
        log.info("%s", told)
        warnings.warn(told, RuntimeWarning, stacklevel=4)

    def _prepare(self, engine: bool | None) -> None:
        """All a training holds: data on the device, net, optimizer, room for every row to come; where it stopped, if it did."""
        settings = self.recipe.train
        self.model = self.recipe.build_model(self.device)
        self._take()
        if self.source is not None:
            take_trunk(self.model, self.source)
            self.source = None  # its memory is wanted
        freeze(self.model, settings.freeze or ())
        self.optimizer = PiSGD(
            param_groups(
                self.model,
                settings.lr,
                settings.weight_decay,
                settings.first_layer_lr_mult,
                settings.last_layer_lr_mult,
                settings.bias_lr_mult,
                settings.apply_lr_mult_to_wd,
            ),
            settings.lr,
            settings.momentum,
            settings.dampening,
        )
        self.growing = growing_layers(self.model)
        for layer in self.growing.values():
            layer.keep_rows_on(self.plan.rows_on)
            grows = layer.A.requires_grad and (layer.role == "hidden" or settings.last_layer_lr_mult)
            if grows or layer.count >= processes.count():  # not the read-out of one row that few-shot learners keep
                layer.share_rows()
            if grows:
                layer.reserve(layer.count + self.samples_per_epoch * settings.epochs)
        self.net = self._in_parallel()
        self._begin_or_resume()
        self.engine = self._make_engine() if self._wants_engine(engine) else None

    def _in_parallel(self) -> nn.Module:
        """What computes a batch: the net itself; of finite nets in several processes one in which each computes its part."""
        if self.growing or processes.count() == 1:
            return self.model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # torch renames the option; no other name does the same in every version
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    @staticmethod
    def check_data(recipe: Recipe, dataset: Dataset) -> None:
        """Raise ValueError unless the data are what the recipe wants."""
        dataset.require(recipe.data.input_size, recipe.data.classes)

    def _sizes(self) -> tuple[int, int, int]:
        """Samples, and steps, of an epoch; images that the net is measured on after it."""
        samples, tested = len(self.dataset.train_x), 0 if self.dataset.test_x is None else len(self.dataset.test_x)
        return samples, math.ceil(samples / self.recipe.train.batch_size), tested

    def _take(self) -> None:
        """Put the data where they are trained on and, as the net takes them, measured on; set ``class_names``."""
        dataset, self.normalize, self.class_names = self.dataset, self.recipe.data.normalize, self.dataset.class_names
        self.train_x, self.train_y = dataset.train_x.to(self.device), dataset.train_y.to(self.device)
        if dataset.test_x is not None:
            self.test_x = self.normalize(dataset.test_x.to(self.device), next(self.model.parameters()).dtype)

    def _wants_engine(self, asked: bool | None) -> bool:
        reason = self._cannot()
        if self.device.type == "cuda" and not all(ops.fused(1, layer.A, layer.B) for layer in self.growing.values()):
            reason = "there are no fused kernels for its rows on this device"
        if self.net is not self.model:
            reason = "a finite net in several processes is trained by the plain loop"
        if self.plan.rows_on == "host":
            reason = "its rows stream from the host"
        reason = next(filter(None, processes.gathered(reason)), None)  # what one cannot, none does
        if asked and reason:
            raise RecipeError(f"{self.recipe.entry}: the engine cannot train this recipe: {reason}")
        return asked if asked is not None else self.device.type == "cuda" and reason is None

    def _cannot(self) -> str | None:
        """Why the engine cannot train this recipe, in words."""
        return unsupported(self.recipe.train, self.steps_per_epoch, bool(self.growing))

    def _make_engine(self) -> Engine:
        settings = self.recipe.train
        factors = [self._lr_factor(step) for step in range(self.steps)]
        x = self.normalize(self.train_x, next(self.model.parameters()).dtype)
        return Engine(self.model, self.optimizer, settings, x, self.train_y, torch.tensor(factors, dtype=torch.float64))

    def _lr_factor(self, step: int) -> float:
        return schedule_factor(self.recipe.train.schedule, step, self.steps_per_epoch, self.steps)

    def _begin_or_resume(self) -> None:
        if self.folder is None:
            return
        check_folder(self.folder, self.recipe)
        if not (self.folder / segments.MANIFEST).exists():
            segments.start_training(self.folder, self.model, self.recipe.config(self.class_names))
            return
        if records := segments.read_manifest(self.folder)["epochs"]:
            self.history = [record["metrics"] for record in records]
            best = self._best_epoch()
            if best is not None and best < len(records):
                restore(self.model, self.optimizer, segments.read_epoch(self.folder, best))
                self.best = Snapshot(self.model)
            restore(self.model, self.optimizer, segments.read_epoch(self.folder))
            if best == len(records):
                self.best = Snapshot(self.model)
            log.info("resuming %s after epoch %d", self.folder, len(self.history))

    def run(self, progress: bool) -> TrainResult:
        settings, already = self.recipe.train, len(self.history)
        with StepProgress(progress, self.recipe.entry, settings.epochs, self.steps_per_epoch) as bar:
            bar.say(self.plan.summary(self.recipe.entry))
            try:
                for epoch in range(already, settings.epochs):
                    with explained(self._ran_out):
                        self.history.append(processes.of_first(self._epoch(epoch, bar)))
                        processes.equalise(self._held_by_all())
                        if self._best_epoch() == epoch + 1:
                            self.best = Snapshot(self.model)
                        if self.folder is not None:
                            self._save(epoch + 1)
            finally:  # an epoch that has ended well is saved, whatever came after it
                self.writing.wait()
        self._finish()
        kept = self.folder is not None and (self.folder / checkpoint.RESULTS).exists()
        if already == settings.epochs and processes.of_first(kept):
            results = read_json(self.folder / checkpoint.RESULTS)  # of the day and machine it was trained on
        else:
            with explained(self._ran_out):
                results = self._results()
            results["wall_seconds"] += self.timer.lap()
            if self.folder is not None and processes.index() == 0:
                write_json(self.folder / checkpoint.RESULTS, results)
        return TrainResult(self.model, self.recipe, self.folder, self.history, results, self.correct)

    def _held_by_all(self) -> list[Tensor]:
        """Of a net whose rows are shared, what every process holds and trains: input layer and biases."""
        weights = [layer.A for layer in self.growing.values()]
        trained = [param for param in self.model.parameters() if param.requires_grad] if self.growing else []
        return [param.data for param in trained if not any(param is weight for weight in weights)]

    def _finish(self) -> None:
        """After the last epoch: leave the net that this training gives, in eval mode."""
        if self.best is not None:
            self.best.restore(self.model)
        self.model.eval()

    def _results(self) -> dict[str, Any]:
        return training_results(self.recipe, self.history, self.device)

    def _epoch(self, epoch: int, bar: StepProgress) -> dict[str, Any]:
        settings, begin = self.recipe.train, time.perf_counter()
        self.model.train()
        order = epoch_order(len(self.train_x), settings.seed, epoch).to(self.device)
        total, first = 0.0, epoch * self.steps_per_epoch
        for i, (batch, loss) in enumerate(self._losses(order, first)):
            if not math.isfinite(loss):
                self._diverged(first + i, loss)
            total += loss * batch
            bar.advance(epoch, loss)
        step = first + self.steps_per_epoch
        record = {
            "epoch": epoch + 1,
            "step": step,
            "lr": settings.lr * self._lr_factor(step - 1),
            "train_loss": total / len(order),
            "train_seconds": time.perf_counter() - begin,
        }
        if self.dataset.test_x is not None:
            logits = predict(self.model, self.test_x, None)
            try:
                record["test_accuracy"] = accuracy(logits, self.dataset.test_y)
            except ValueError:
                raise TrainingDiverged(
                    f"the net's predictions after epoch {epoch + 1} are not finite; {self._kept(epoch)}. {REMEDY}"
                ) from None
        return self._log(record | self._measure(epoch + 1))

    def _measure(self, epoch: int) -> dict[str, Any]:
        """What else is recorded of the net after epoch ``epoch``."""
        return {}

    def _losses(self, order: Tensor, first: int) -> Iterator[tuple[int, float]]:
        """Train on the samples in ``order``; size and loss of every batch, as it is taken or, by the engine, in the end."""
        size = self.recipe.train.batch_size
        if self.engine is not None:
            for i, loss in enumerate(self.engine.run_epoch(order, first)):
                yield min(size, len(order) - i * size), loss
            return
        for i, batch in enumerate(order.split(size)):
            yield len(batch), self._step(first + i, self.train_x[batch], self.train_y[batch])

    def _log(self, record: dict[str, Any]) -> dict[str, Any]:
        """Note an epoch's record, wall time and row counts added, in the log."""
        # What an epoch took in all: with the set-up before it, or the saving of the epoch before it.
        record["wall_seconds"] = self.timer.lap()
        if self.growing:
            record["rows"] = {name: layer.count for name, layer in self.growing.items()}
        log.info("%s", " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
        return record

    def _schedule(self, step: int) -> float | None:
        """Set the learning rate of a step; return its clipping threshold."""
        settings, factor = self.recipe.train, self._lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        max_norm, follows = settings.clip.max_norm, settings.clip.follows_schedule
        return max_norm * factor if max_norm is not None and follows else max_norm

    def _step(self, step: int, x: Tensor, y: Tensor) -> float:
        settings, max_norm = self.recipe.train, self._schedule(step)
        dtype = next(self.model.parameters()).dtype
        (x, y), share = self._part(x, y)
        logits = self.net(self.normalize(x, dtype)).to(torch.promote_types(dtype, torch.float32))
        if settings.loss == "mse":
            target = nn.functional.one_hot(y, logits.shape[1]).to(logits.dtype)
            loss = nn.functional.mse_loss(logits, target)
        else:
            loss = nn.functional.cross_entropy(logits, y)
        loss = loss * share
        self.optimizer.zero_grad()
        loss.backward()
        norms = clip_grad_norm_(self.model, max_norm, settings.clip.per_param)
        mean = loss.detach()
        if self.net is not self.model:
            mean = processes.summed(mean)[0] / processes.count()
        return self._take_step(step, mean.item(), norms)

    def _part(self, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
        """What of a batch is computed here, and what its loss is multiplied by: their mean over processes is the batch's."""
        world = processes.count()
        if self.net is self.model or len(x) < world:
            return (x, y), 1.0
        own = slice(processes.index(), None, world)
        return (x[own], y[own]), len(x[own]) * world / len(x)

    def _take_step(self, step: int, loss: float, norms: Tensor | dict[str, Tensor]) -> float:
        """Step unless the loss or a gradient's norm is not finite; returns the loss."""
        norm = torch.stack([n.double() for n in norms.values()]).sum() if isinstance(norms, dict) else norms
        if not (math.isfinite(loss) and norm.isfinite()):
            self._diverged(step, loss)
        self.optimizer.step()
        return loss

    def _diverged(self, step: int, loss: float) -> None:
        epoch = step // self.steps_per_epoch + 1
        raise TrainingDiverged(
            f"loss {loss} or its gradient is not finite at step {step} (epoch {epoch}); the step was not taken; "
            f"{self._kept(epoch - 1)}. {REMEDY}"
        )

    def _ran_out(self, reported: str) -> str:
        self.writing.wait()
        begun = self.folder is not None and (self.folder / segments.MANIFEST).exists()
        saved = len(segments.read_manifest(self.folder)["epochs"]) if begun else 0
        return f"{self.plan.ran_out(self.recipe.entry, reported)}; {self._kept(saved)}"

    def _kept(self, epoch: int) -> str:
        """Which net is still there when epoch ``epoch`` was the last to end well."""
        return f"the net of epoch {epoch} stands in {self.folder}" if self.folder and epoch else "no epoch was saved"

    def _save(self, epoch: int) -> None:
        record = {"epoch": epoch, "metrics": self.history[-1]}
        tensors = optimizer_tensors(self.model, self.optimizer)
        best = self._best_epoch()
        # A finite net's state is all of it, every epoch again: only the best, where that is kept, and the last.
        keep = None if self.growing else {best, *self._kept_epochs()}
        self.writing.wait()
        segments.save_epoch(self.folder, self.model, record, tensors, keep, best, self.writing.submit)

    def _best_epoch(self) -> int | None:
        """The epoch whose net this training gives; None: the last."""
        return None

    def _kept_epochs(self) -> Iterable[int]:
        """Epochs of a finite net that stay loadable, beside the best and the last."""
        return ()
