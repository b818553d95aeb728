"""Few-shot entries end to end, on made-up characters: training, the epoch that is kept, numbers, verification."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pizoo
from pizoo import cards
from pizoo.compaction.fit import relative_error
from pizoo.data import TaskPool, frozen_uniform, load_dataset, load_tasks, omniglot
from pizoo.evaluation import fewshot
from pizoo.evaluation.accuracy import paired_difference, percent
from pizoo.evaluation.entries import classify
from pizoo.evaluation.fewshot import SPLITS, adapter, measure_splits, split_correct, task_correct
from pizoo.files import CheckpointError, read_tensors, write_tensors
from pizoo.functional import unit
from pizoo.memory import HEADROOM, NotEnoughMemory
from pizoo.models import NNGPLearner
from pizoo.recipes import Recipe, RecipeError, load_recipe
from pizoo.training import meta, supervised
from pizoo.training import plan as planning
from pizoo.training.engine import compiled
from pizoo.training.plan import plan, samples_per_epoch
from pizoo.training.reproduce import reproduce
from pizoo.training.state import Snapshot
from pizoo.training.supervised import TrainingDiverged
from pizoo.training.task_engine import TaskEngine

CPU = torch.device("cpu")
# Everything the tests speak of is set here: the zoo's recipes may change.
SETTINGS = (
    "train.epochs=3",
    "train.steps_per_epoch=4",
    "train.batch_size=3",
    "train.dtype=float32",
    "tasks.validation_tasks=20",
    "tasks.test_tasks=30",
)
SMALL = {"infpi": ("model.r=8", "compact=null"), "finpi": ("model.r=8", "model.width=16"), "mu": ("model.width=16",)}
CLASSES = {"train": 12, "validation": 6, "test": 7}


def small(kind: str, *overrides: str) -> Recipe:
    settings = (*SETTINGS, *SMALL.get(kind, ()), *overrides)
    return load_recipe(f"omniglot_{kind}", [s for s in settings if kind in SMALL or not s.startswith("train")])


def characters(count: int, rng: np.random.RandomState, side: int) -> np.ndarray:
    """Made-up characters, uint8 [count, 20, side, side]: blocks of ink, every drawing with a tenth of its pixels flipped."""
    blocks = rng.rand(count, 1, 7, 7) < 0.4
    ink = blocks.repeat(side // 7, 2).repeat(side // 7, 3)
    flipped = rng.rand(count, 20, side, side) < 0.1
    return np.where(ink ^ flipped, 255, 0).astype(np.uint8)


def made_up_pools() -> dict[str, TaskPool]:
    rng = np.random.RandomState(0)
    return {
        part: TaskPool(part, torch.from_numpy(characters(count, rng, 28))[:, :, None])
        for part, count in CLASSES.items()
    }


@pytest.fixture(scope="module")
def pools() -> dict[str, TaskPool]:
    return made_up_pools()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pools):
    """The result of one uninterrupted training, in its folder."""
    return train(small("infpi"), pools, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A data folder with a small file in Omniglot's form."""
    names = {part: [f"background/{part}/character{i:02d}" for i in range(count)] for part, count in CLASSES.items()}
    images = characters(sum(CLASSES.values()), np.random.RandomState(1), 105).reshape(-1, 105, 105)
    labels = np.repeat(np.arange(len(images) // 20), 20)
    folder = tmp_path / "data"
    folder.mkdir()
    class_names = np.array([name for part in names.values() for name in part])
    np.savez(folder / "omniglot.npz", images=images, label=labels, class_names=class_names)
    monkeypatch.setattr(omniglot, "split_names", lambda: names)
    return folder


def train(recipe: Recipe, pools, folder=None, **options):
    return pizoo.train(recipe, folder, dataset=pools, device="cpu", **options)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in history]


# Training


@pytest.mark.parametrize("kind", SMALL)
def test_all_three_nets_learn_to_learn(kind, pools):
    width = {"infpi": ["model.r=24"], "finpi": ["model.r=24", "model.width=64"], "mu": ["model.width=64"]}[kind]
    result = train(small(kind, *width, "train.steps_per_epoch=40", "tasks.test_tasks=200"), pools)
    losses = [record["train_loss"] for record in result.history]
    assert losses[-1] < 0.7 * losses[0]
    untrained, _ = measure_splits(result.recipe.build_model(), pools, result.recipe.tasks.model_dump())
    for split in ("validation_rotated", "test_rotated"):  # chance is 20; six or seven classes give 57 to 83 over seeds
        accuracy = result.results["splits"][split]["accuracy"]
        assert accuracy > 50 and accuracy > untrained["splits"][split]["accuracy"] + 15


def test_inner_losses_of_a_read_out_at_zero_are_those_of_guessing(whole):
    for record in whole.history:
        assert record["inner_loss"] == pytest.approx(math.log(5))
        assert record["rows"]["output"] == 1  # multiplier 0: it never grows
    assert whole.history[-1]["rows"]["hidden.0"] == 8 + 3 * 4 * 3 * 10  # epochs, steps, tasks, images


def test_a_resumed_training_is_the_uninterrupted_one(whole, pools, tmp_path, monkeypatch):
    real = meta.MetaTraining._save

    def save_then_stop(self, epoch):
        real(self, epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(meta.MetaTraining, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(small("infpi"), pools, tmp_path)
    monkeypatch.undo()
    resumed = train(small("infpi"), pools, tmp_path)
    assert states_equal(resumed.model, whole.model)
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.results["splits"] == whole.results["splits"]
    assert states_equal(train(small("infpi"), pools).model, whole.model)  # nor does a folder matter
    assert not states_equal(train(small("infpi", "train.seed=1"), pools).model, whole.model)


@pytest.mark.parametrize("stopped_after", [None, 2, 3])
@pytest.mark.parametrize("kind", SMALL)
def test_the_epoch_with_the_best_validation_accuracy_is_kept(kind, stopped_after, pools, tmp_path, monkeypatch):
    states, accuracies, save = {}, {1: 50.0, 2: 70.0, 3: 60.0, 4: 70.0}, meta.MetaTraining._save

    def look(self, epoch):
        states[epoch] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        save(self, epoch)
        if epoch == stopped_after and len(states) == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(meta.MetaTraining, "_save", look)
    monkeypatch.setattr(meta.MetaTraining, "_validate", lambda self: accuracies[len(self.history) + 1])
    recipe = small(kind, "train.epochs=4")
    if stopped_after:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, pools, tmp_path)
        assert stopped_after == max(states)
        best_so_far = pizoo.load(tmp_path).state_dict()  # of an unfinished training too
        assert all(torch.equal(best_so_far[name], states[2][name]) for name in best_so_far)
        states[0] = None  # go on this time
    result = train(recipe, pools, tmp_path)
    assert result.results["best_epoch"] == {"epoch": 2, "accuracy": 70.0, "note": "on validation_rotated"}
    for model in (result.model, pizoo.load(tmp_path), pizoo.load(tmp_path, epoch=2)):
        found = model.state_dict()
        assert all(torch.equal(found[name], states[2][name]) for name in found) and not model.training
    assert not all(torch.equal(tensor, states[4][name]) for name, tensor in found.items())
    again = train(recipe, pools, tmp_path)
    assert states_equal(again.model, result.model) and again.results == result.results
    held = sorted(path.name for path in tmp_path.glob("state-*"))
    assert len(held) == (4 if kind == "infpi" else 2)  # of finite nets the best and the last alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_snapshot_returns_the_net_to_where_it_was_decay_included(dtype):
    recipe = small("infpi")
    model = recipe.build_model()
    for layer in model.growing_layers.values():
        layer.to_rows_dtype(dtype)
    layer, x = model.hidden[0], torch.rand(3, 784)
    with torch.no_grad():
        before, features = {k: v.clone() for k, v in model.state_dict().items()}, model.features(x)
        snapshot = Snapshot(model)
        layer.append(torch.randn(5, 8), torch.randn(5, 8), -1.0)
        layer.decay *= 0.5
        layer.fold_decay()
        model.input.A.mul_(2)
        assert not torch.allclose(model.features(x), features)
        snapshot.restore(model)
        assert torch.equal(model.features(x), features)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_a_loss_that_is_not_finite_stops_at_that_step_and_keeps_the_last_epoch(
    kind, engine, pools, tmp_path, monkeypatch
):
    real, calls = TaskPool.draw, []

    def poisoned(self, uniform, count, *shape):
        batch = real(self, uniform, count, *shape)
        if count == 12:  # an epoch's tasks, three a step
            calls.append(1)
            if len(calls) == 2:
                batch.query_x[4] = math.nan
        return batch

    monkeypatch.setattr(TaskPool, "draw", poisoned)
    with pytest.raises(
        TrainingDiverged, match=r"at step 5 \(epoch 2\); the step was not taken; the net of epoch 1 stands"
    ):
        train(small(kind), pools, tmp_path, engine=engine)
    assert len(calls) == 2
    monkeypatch.undo()
    resumed = train(small(kind), pools, tmp_path, engine=engine)
    assert states_equal(resumed.model, train(small(kind), pools, engine=engine).model)


def test_predictions_that_are_not_finite_are_divergence_too(pools, monkeypatch):
    monkeypatch.setattr(meta, "task_correct", lambda *args: (_ for _ in ()).throw(ValueError("logits are not finite")))
    with pytest.raises(TrainingDiverged, match="after epoch 1 logits are not finite; no epoch was saved"):
        train(small("mu"), pools)


@pytest.mark.parametrize("settings", [("tasks.first_order=true",), ("tasks.first_order=true", "tasks.layers=all")])
@pytest.mark.parametrize("kind", SMALL)
def test_first_order_training_appends_rows_of_queries_alone(kind, settings, pools):
    recipe = small(kind, "tasks.steps=2", "tasks.shots=2", *settings)
    result = train(recipe, pools)
    assert all(math.isfinite(record["train_loss"]) for record in result.history)
    if kind == "infpi":
        assert result.history[-1]["rows"]["hidden.0"] == 8 + 3 * 4 * 3 * 5
        assert samples_per_epoch(recipe) == 4 * 3 * 5


def test_a_plan_counts_the_rows_that_training_appends(whole):
    planned = plan(whole.recipe, samples_per_epoch(whole.recipe), CPU)
    assert planned.rows == whole.history[-1]["rows"]["hidden.0"] and planned.steps == 12
    assert planned.row_bytes == planned.rows * (2 * 8 * 4 + 4)  # the read-out does not grow


REFUSED = {
    "more ways than validation classes": ("data.classes=25", "ways is 25; train"),
    "more shots than drawings": ("tasks.shots=20", "shots is 20 and queries 1; train has 20 drawings"),
    "images of another size": (
        "data.input_size=[1, 14, 14]",
        r"train: images are \[1, 28, 28\]; they must be \[1, 14, 14\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(case, pools, tmp_path):
    override, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        train(small("mu", override), pools, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_of_the_other_kind_are_refused(pools):
    with pytest.raises(TypeError, match="dataset is a Dataset; for omniglot_mu it must be a dict"):
        train(small("mu"), load_dataset("digits"))
    with pytest.raises(TypeError, match="dataset is a dict; for digits_mu it must be a Dataset"):
        train(load_recipe("digits_mu"), pools)


VARIANTS = {
    "infinite": ("infpi",),
    "infinite, global clipping without bias, decay, two inner steps": (
        "infpi",
        "model.bias_alpha=0",
        "train.weight_decay=0.01",
        "train.clip={max_norm: 0.05, per_param: true}",
        "tasks.steps=2",
    ),
    "infinite, layernorm, three shots": ("infpi", "model.layernorm=true", "tasks.shots=3", "tasks.queries=2"),
    "infinite, nothing grows below the read-out": ("infpi", "model.hidden_layers=1"),
    "finite, projected": ("finpi",),
    "finite, no clipping": ("mu", "train.clip.max_norm=null"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_and_plain_loop_give_one_trajectory_in_float64(variant, pools):
    kind, *overrides = VARIANTS[variant]
    recipe = small(kind, "train.dtype=float64", *overrides)
    plain, engine = (train(recipe, pools, engine=engine) for engine in (False, True))
    for a, b in zip(engine.history, plain.history, strict=True):
        for key in ("inner_loss", "train_loss", "train_accuracy", "validation_accuracy"):
            assert a[key] == pytest.approx(b[key], rel=1e-9), key
        assert a.get("rows") == b.get("rows")
    wanted = plain.model.state_dict()
    for name, tensor in engine.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.parametrize("kind", ["infpi", "finpi"])
def test_compiled_outer_step_is_the_step(kind, pools, monkeypatch):
    recipe = small(kind, "train.epochs=1")
    plain, prepare = train(recipe, pools, engine=False), TaskEngine._prepare

    def compile_too(self, *args):
        prepare(self, *args)
        self._compute = compiled(self._compute_step)

    monkeypatch.setattr(TaskEngine, "_prepare", compile_too)
    wanted = plain.model.state_dict()
    for name, tensor in train(recipe, pools, engine=True).model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", SMALL)
def test_replayed_outer_steps_agree_with_the_plain_loop_on_a_gpu(kind, pools):
    recipe = small(kind)
    plain, engine = (pizoo.train(recipe, dataset=pools, device="cuda", engine=engine) for engine in (False, True))
    for a, b in zip(engine.history, plain.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    wanted = plain.model.state_dict()
    # A unit of a finite net may be at its kink for one of the 90 samples of a step: on in one run, off in the other.
    close = 1e-3 if kind == "infpi" else 1e-2
    for name, tensor in engine.model.state_dict().items():
        assert (tensor - wanted[name]).norm() <= close * wanted[name].norm(), name


@pytest.mark.parametrize("override", ["tasks.first_order=true", "train.last_layer_lr_mult=1.0", "train.momentum=0.9"])
def test_what_the_engine_cannot_train_is_refused_if_asked_for(override, pools):
    with pytest.raises(RecipeError, match="the engine cannot train this recipe"):
        train(small("infpi", override), pools, engine=True)


@pytest.mark.parametrize("stopped_after", [None, 3])
def test_a_training_with_rows_on_the_host_is_the_same_training(whole, stopped_after, pools, tmp_path, monkeypatch):
    planned = supervised.plan
    monkeypatch.setattr(supervised, "plan", lambda *args, **options: replace(planned(*args), rows_on="host"))
    save, accuracies = meta.MetaTraining._save, {1: 50.0, 2: 70.0, 3: 60.0, 4: 65.0}

    def save_then_stop(self, epoch):
        save(self, epoch)
        if epoch == stopped_after:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="of rows are kept in host memory .* and stream to cpu"):
        if stopped_after:
            monkeypatch.setattr(meta.MetaTraining, "_validate", lambda self: accuracies[len(self.history) + 1])
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(meta.MetaTraining, "_save", save_then_stop)
                train(small("infpi", "train.epochs=4"), pools, tmp_path)
        streaming = train(small("infpi", *(["train.epochs=4"] if stopped_after else [])), pools, tmp_path)
    assert all(layer.rows_on == "host" for layer in streaming.model.growing_layers.values())
    monkeypatch.setattr(supervised, "plan", planned)
    resident = train(small("infpi", "train.epochs=4"), pools) if stopped_after else whole
    assert states_equal(streaming.model, resident.model)
    assert streaming.results["splits"] == resident.results["splits"]
    loaded = pizoo.load(tmp_path, rows_on="host")
    assert loaded.hidden[0].rows_on == "host" and states_equal(loaded, resident.model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_training_with_rows_on_the_host_is_the_same_training(pools, tmp_path):
    recipe = small("infpi", "model.r=64")
    resident = pizoo.train(recipe, dataset=pools, device="cuda", engine=False)
    with pytest.warns(RuntimeWarning, match="stream to cuda"):
        streaming = pizoo.train(recipe, tmp_path, dataset=pools, device="cuda", rows_on="host")
    assert streaming.model.hidden[0].A.is_pinned()
    assert states_equal(streaming.model.cpu(), resident.model.cpu())


def test_a_training_that_does_not_fit_is_refused_with_what_would(pools, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: HEADROOM + 1000)
    with pytest.raises(
        NotEnoughMemory, match=r"About .* rows would fit: fewer train.epochs, a smaller train.steps_per_epoch"
    ):
        train(small("infpi"), pools, tmp_path)
    assert not (tmp_path / "config.json").exists()


# Compact nets


@pytest.fixture(scope="module")
def grown(tmp_path_factory, pools):
    """A training whose trunk has 368 rows, in its folder."""
    return train(small("infpi", "train.epochs=1", "train.steps_per_epoch=12"), pools, tmp_path_factory.mktemp("grown"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["read-out at zero", "read-out with rows"])
def test_a_compact_trunk_gives_the_features_of_the_full_one(dtype, alone, grown, pools):
    model, x, unseen = grown.model, pools["train"].rotated().samples(), pools["test"].samples()
    if not alone:
        model = copy.deepcopy(model)
        model.output.append(torch.randn(400, 5), unit(model.features(x[:400]))[0], 0.1)
    few = pizoo.compact(model, x, 150, dtype=dtype, views=1)
    rows = {"hidden.0": 150} if alone else {"hidden.0": 150, "output": 75}
    assert few.compacted["rows"] == rows == {name: few.growing_layers[name].count for name in rows}
    with torch.no_grad():
        assert relative_error(few.features(unseen), model.features(unseen)) < 0.03
        assert relative_error(few(unseen), model(unseen)) < (1e-9 if alone else 0.1)
    assert few.output.count == (1 if alone else 75) and few.output.A.dtype == dtype
    if alone:
        assert (
            few.compacted["held_out"].keys() == {"features_error"}
            and few.compacted["held_out"]["features_error"] < 0.03
        )
    again = pizoo.compact(model, x, 150, dtype=dtype, views=1)
    assert states_equal(few, again)


def test_a_compact_learner_is_reproduced_verified_and_told_of(data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fewshot, "VERIFIED_TASKS", 20)
    settings = ("train.epochs=1", "train.steps_per_epoch=12", "compact={rows: 150, views: 1}")
    recipe, card, options = small("infpi", *settings), tmp_path / "card", {"data_dir": data_dir, "device": "cpu"}
    results = reproduce(recipe, card, tmp_path / "runs", [0, 1], **options)
    full, pools = json.loads((tmp_path / "runs/seed-0/results.json").read_text()), load_tasks("omniglot", data_dir)
    made = results["compact"]
    assert made["full_rows"] == {"hidden.0": 368} and made["full_accuracy"] == pytest.approx(full["accuracy"])
    assert [size["rows"]["hidden.0"] for size in made["sizes"]] == [18, 37, 75, 150]
    assert made["sizes"][-1]["features_error"] < 0.05 and made["sizes"][-1]["agreement"] > 95
    assert made["sizes"][-1]["features_error"] < 0.5 * made["sizes"][0]["features_error"]
    assert results["mean_accuracy"] == pytest.approx(sum(run["accuracy"] for run in results["seeds"]) / 2)
    caplog.set_level(logging.INFO, "pizoo")
    net = pizoo.load(card)
    told = f"150 rows for the full net's 368, {results['accuracy']:.2f} % on tasks of test classes, the full net"
    assert f"a compact net, {told} {full['accuracy']:.2f} %" in caplog.text
    tasks = recipe.tasks.model_dump()
    measured, (few, _), (many, _) = (
        measure_splits(net, pools, tasks),
        *(fewshot.split_logits(model, pools, tasks) for model in (net, pizoo.load(tmp_path / "runs/seed-0"))),
    )
    assert results["splits"] == measured.recorded["splits"] and results["accuracy"] == measured.recorded["accuracy"]
    equal = 100 * (few.argmax(-1) == many.argmax(-1)).double().mean().item()
    assert made["sizes"][-1]["agreement"] == pytest.approx(equal, abs=0.01)
    for quick in (False, True):
        assert pizoo.verify(card, data_dir, "cpu", quick=quick).status == "verified"
    text = (card / "README.md").read_text()
    assert "## A compact net" in text and "**this checkpoint** (compact, of seed 0)" in text
    for size in made["sizes"]:
        near = f"{size['agreement']:.2f} | {size['logits_error']:.3f} | {size['features_error']:.3f}"
        assert f"| {size['accuracy']:.2f} | {near} |" in text
    assert "on the queries of 30 tasks of test classes" in text
    assert (card / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_on_tasks_is_made_compact(grown, data_dir, tmp_path, pizoo_command):
    out, options = tmp_path / "few", ("--data", data_dir, "--device", "cpu", "--views", 1)
    done = pizoo_command("compact", grown.folder, "--out", out, "--megabytes", 0.02, *options)
    assert done.code == 0, done.err
    assert "accuracy (test)" in done.out and (out / "model.safetensors").stat().st_size <= 20_000
    results = json.loads((out / "results.json").read_text())
    assert results["mean_accuracy"] == grown.results["accuracy"] and results["history"] == grown.results["history"]
    assert pizoo.verify(out, data_dir, "cpu").status == "verified"
    assert pizoo.load(out).hidden[0].count == results["compact"]["sizes"][-1]["rows"]["hidden.0"] > 200
    for megabytes, complaint in (
        (25, "a net of 368 rows needs no 25 MB"),
        (0.005, "megabytes is 0.005; a net like this takes"),
    ):
        done = pizoo_command("compact", grown.folder, "--out", tmp_path / "none", "--megabytes", megabytes, *options)
        assert done.code and complaint in done.err
    assert not (tmp_path / "none").exists()


def test_what_learns_tasks_and_cannot_be_made_compact_is_refused(grown, pools):
    x = pools["train"].samples()
    with pytest.raises(TypeError, match="model is a MuMLP; only an InfPiMLP has rows"):
        pizoo.compact(small("mu").build_model(), x)
    with pytest.raises(TypeError, match="x is a TaskPool; it must be a tensor of the net's training inputs"):
        pizoo.compact(grown.model, pools["train"], 20)
    with pytest.raises(ValueError, match=r"x has values from 0 to 255; this net takes pixels in \[0, 1\]"):
        pizoo.compact(pizoo.load(grown.folder), 255 * x, 20)
    with pytest.raises(
        ValueError, match="no growing layer but a read-out that gives nothing: there is nothing to compact"
    ):
        pizoo.compact(small("infpi", "model.hidden_layers=1").build_model(), x, 20)


# Several seeds


def test_several_seeds_give_a_mean_on_every_split(data_dir, tmp_path, monkeypatch, pizoo_command):
    monkeypatch.chdir(tmp_path)
    sets = [part for setting in (*SETTINGS, *SMALL["mu"]) for part in ("--set", setting)]
    done = pizoo_command("train", "omniglot_mu", *sets, "--seeds", "0,3", "--data", data_dir, "--device", "cpu")
    assert done.code == 0, done.err
    runs = tmp_path / "runs/omniglot_mu"
    results = json.loads((runs / "results.json").read_text())
    single = [json.loads((runs / f"seed-{seed}/results.json").read_text()) for seed in (0, 3)]
    assert [run["accuracy"] for run in results["seeds"]] == [one["accuracy"] for one in single]
    for split in SPLITS:
        accuracies = [one["splits"][split]["accuracy"] for one in single]
        mean = results["mean_splits"][split]
        assert mean["accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert mean["standard_error"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)
    assert results["mean_accuracy"] == pytest.approx(results["mean_splits"]["test"]["accuracy"])
    assert f"{results['mean_accuracy']:.2f} ± {results['standard_error']:.2f} %, 2 runs" in done.out
    for run, one in zip(results["seeds"], single, strict=True):
        curve = [record["validation_accuracy"] for record in one["history"]]
        assert run["curve"]["validation_accuracy"] == curve and run["best_epoch"]["accuracy"] == max(curve)
        assert run["wall_seconds"] > sum(record["wall_seconds"] for record in one["history"])  # four splits measured
    assert (runs / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_kernel_has_no_seeds(data_dir, tmp_path):
    with pytest.raises(ValueError, match="omniglot_ntk is a kernel, which is not trained: every seed gives the same"):
        reproduce(small("ntk"), tmp_path / "card", tmp_path / "runs", [0, 1], data_dir=data_dir, device="cpu")


def test_among_other_entries_a_kernel_is_made_once(data_dir, tmp_path, pizoo_command):
    options = ("--set", "tasks.test_tasks=20", "--data", data_dir, "--device", "cpu")
    folders = ("--cards", tmp_path / "cards", "--runs", tmp_path / "runs")
    done = pizoo_command("reproduce", "omniglot_n*", "--seeds", "0-1", *folders, *options)
    assert done.code == 0, done.err
    for entry in ("omniglot_nngp", "omniglot_ntk"):
        results = json.loads((tmp_path / "cards" / entry / "results.json").read_text())
        assert [run["seed"] for run in results["seeds"]] == [0]
    done = pizoo_command("reproduce", "omniglot_*", *folders, *options[2:], "--set", "train.epochs=1")
    assert (
        done.code and "kernel" in done.err and not (tmp_path / "cards/omniglot_mu").exists()
    )  # before anything is trained


# Numbers


def test_the_first_tasks_are_the_same_however_many_are_measured_and_in_whatever_parts(whole, pools, monkeypatch):
    learner = adapter(whole.model, whole.recipe.tasks.model_dump())
    found = task_correct(whole.model, learner, pools["test"], 700)
    assert torch.equal(task_correct(whole.model, learner, pools["test"], 30), found[:30])
    monkeypatch.setattr(fewshot, "TASKS_AT_ONCE", 7)
    assert torch.equal(task_correct(whole.model, learner, pools["test"], 600), found[:600])
    assert not torch.equal(task_correct(whole.model, learner, pools["test"], 700, seed=1), found)


def test_a_query_is_right_where_the_adapted_net_classifies_it_so(whole, pools):
    model, step_size = whole.model, whole.recipe.tasks.step_size
    found = task_correct(model, adapter(model, whole.recipe.tasks.model_dump()), pools["test"], 40, 2, 3)
    batch = pools["test"].draw(frozen_uniform(CPU, fewshot.TEST_SEED), fewshot.TASKS_DRAWN, 5, 2, 3)
    for task in range(40):
        with torch.no_grad():
            logits = model.adapt(batch.support_x[task], batch.support_y[task], step_size)(batch.query_x[task])
        assert torch.equal(found[task], logits.argmax(1) == batch.query_y[task])


def test_every_number_names_its_split_and_has_an_interval(whole, pools):
    results = whole.results
    assert list(results["splits"]) == list(SPLITS) and results["split"] == "test" == results["data"]["part"]
    assert results["accuracy"] == results["splits"]["test"]["accuracy"]
    for split in SPLITS:
        right = split_correct(whole.model, pools, whole.recipe.tasks.model_dump(), split)
        each = 100 * right.double().mean(1)
        recorded = fewshot.TaskAccuracy(**results["splits"][split])
        assert recorded.accuracy == pytest.approx(each.mean().item()) and recorded.tasks == 30
        assert recorded.half_width == pytest.approx(1.96 * each.std().item() / 30**0.5)


def test_the_nearest_neighbour_predictor_is_measured_as_any_other(pools):
    model = small("infpi", "model.r=24").build_model()
    found = task_correct(model, model.nearest_neighbour, pools["test"], 100)
    assert found.double().mean() > 0.6  # these characters are told apart without learning


def test_a_model_that_cannot_adapt_is_refused(pools):
    with pytest.raises(TypeError, match="model is a Linear, whose read-out cannot be adapted"):
        measure_splits(nn.Linear(784, 5), pools, small("mu").tasks.model_dump())


# Entries


def test_a_kernel_learner_is_measured_saved_and_loaded(pools, tmp_path):
    result = train(small("nngp"), pools, tmp_path)
    assert isinstance(result.model, NNGPLearner) and result.results["split"] == "validation_rotated"
    loaded = pizoo.load(tmp_path)
    batch = pools["test"].draw(frozen_uniform(CPU, 3), 4)
    for model in (result.model, loaded):
        logits = model.adapt(batch.support_x, batch.support_y, 0.5)(batch.query_x)
        assert torch.equal(logits, result.model.adapt(batch.support_x, batch.support_y, 0.5)(batch.query_x))
    again = train(small("nngp"), pools, tmp_path)
    assert again.results == result.results
    with pytest.raises(CheckpointError, match="another recipe"):
        train(small("nngp", "model.depth=3"), pools, tmp_path)


def test_a_loaded_net_takes_pixels_from_0_to_1_and_says_so(whole):
    model = pizoo.load(whole.folder)
    x, y = torch.rand(5, 1, 28, 28), torch.arange(5)
    predictor = model.adapt(x, y, 0.35)
    assert predictor(x).shape == (5, 5)
    for call in (lambda: model.adapt(255 * x, y, 0.35), lambda: predictor(x - 1)):
        with pytest.raises(
            ValueError, match=r"has values from .* this net takes pixels in \[0, 1\], ink 1 and paper 0"
        ):
            call()
    with pytest.raises(ValueError, match="no classes of its own: adapt it"):
        classify(whole.folder, [])


@pytest.mark.parametrize("kind", ["infpi", "mu", "ntk"])
def test_an_entry_is_reproduced_evaluated_and_verified(kind, data_dir, tmp_path, monkeypatch):
    recipe, card = small(kind, "tasks.test_tasks=60"), tmp_path / "card"
    monkeypatch.setattr(fewshot, "VERIFIED_TASKS", 50)
    seeds = [0] if kind == "ntk" else [0, 1]
    results = reproduce(recipe, card, tmp_path / "runs", seeds, data_dir=data_dir, device="cpu")
    assert len(results["seeds"]) == len(seeds) and results == json.loads((card / "results.json").read_text())
    text = (card / "README.md").read_text()
    for split in SPLITS:
        assert f"{results['splits'][split]['accuracy']:.2f}" in text and split.replace("_", ", ") in text
    measured = pizoo.evaluate(card, data_dir=data_dir, device="cpu")
    assert measured["splits"] == results["splits"]
    assert pizoo.evaluate(card, data_dir=data_dir, device="cpu", tasks=20)["splits"]["test"]["tasks"] == 20
    report = pizoo.verify(card, data_dir, "cpu")
    assert report.status == "verified", report.reason
    assert report.check == f"50 tasks of {results['split']}" and report.half_width >= 0
    assert report.measured == report.recorded == results["verification"]["accuracy"] and report.differing == 0
    found = read_tensors(card / "correct.safetensors", results["correct_sha256"])
    assert all(percent(found[f"seed-{run['seed']}"]) == run["accuracy"] for run in results["seeds"])
    assert torch.equal(found["shipped"], found["seed-0"]) and found["shipped"].shape == (60, 5)
    some = pizoo.verify(card, data_dir, "cpu", images=10)
    assert some.status == "not run" and "measured on tasks, not on test images" in some.reason
    quick = pizoo.verify(card, device="cpu", quick=True)
    assert (quick.status, quick.check) == ("verified", "probe") and quick.half_width is None
    assert pizoo.verify(card, tmp_path / "nowhere", "cpu").status == "not run"
    results["verification"]["accuracy"] += 0.4
    (card / "results.json").write_text(json.dumps(results))
    report = pizoo.verify(card, data_dir, "cpu")
    assert report.status == "mismatch" and "further apart than 0.05 points" in report.reason


def test_a_card_tells_every_seed_on_every_split_and_compares_entries_task_by_task(data_dir, tmp_path):
    rights, options = {}, {"data_dir": data_dir, "device": "cpu"}
    for entry, kind, seeds in (("one", "mu", [0, 1]), ("other", "finpi", [0]), ("kernel", "ntk", [0])):
        published = load_recipe(f"omniglot_{kind}").to_dict()["published"]
        recipe = Recipe.from_dict({**small(kind).to_dict(), "entry": entry, "published": published})
        results = reproduce(recipe, tmp_path / "cards" / entry, tmp_path / "runs" / entry, seeds, **options)
        found = read_tensors(tmp_path / "cards" / entry / "correct.safetensors")
        rights[entry] = torch.stack([found[f"seed-{seed}"].double() for seed in seeds]).mean((0, 2))
        if entry == "one":
            one = results
    cards.write_card(tmp_path / "cards/one")  # now that the others are there
    text = (tmp_path / "cards/one/README.md").read_text()
    for run in one["seeds"]:
        row = [f"{a['accuracy']:.2f} ± {1.96 * a['standard_error']:.2f}" for a in map(run["splits"].get, SPLITS)]
        best = f"{run['best_epoch']['epoch']} ({run['best_epoch']['accuracy']:.2f})"
        assert f"| seed {run['seed']} | {' | '.join(row)} | {best} |" in text
    means = [f"{a['accuracy']:.2f} ± {a['standard_error']:.2f}" for a in map(one["mean_splits"].get, SPLITS)]
    assert f"| mean ± standard error over seeds | {' | '.join(means)} |" in text
    assert "| published |  |  | 91.22 |  |" in text  # in the column of its split
    assert f"{one['splits']['test']['standard_error']:.2f} points" in text
    assert "![Training loss and validation accuracy over the epochs](curves.png)" in text
    away = paired_difference(rights["one"], rights["other"])
    assert f"| `other` | {away.points:+.2f} | {away.low:+.2f} to {away.high:+.2f} |" in text
    assert "`kernel`" not in text  # its number is on other tasks


def test_a_probe_finds_other_weights(data_dir, tmp_path):
    reproduce(small("mu"), tmp_path / "card", tmp_path / "runs", [0], data_dir=data_dir, device="cpu")
    folder = tmp_path / "card"
    state = read_tensors(folder / "model.safetensors")
    state["layers.0.weight"] = state["layers.0.weight"] * 1.05
    config = json.loads((folder / "config.json").read_text())
    config["pizoo"]["files"]["model.safetensors"] = write_tensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    report = pizoo.verify(folder, device="cpu", quick=True)
    assert report.status == "mismatch" and "the probe's logits are off by" in report.reason


def test_tasks_asked_of_a_net_without_tasks_are_refused():
    with pytest.raises(ValueError, match="tasks is 5; this net does not learn from tasks"):
        pizoo.evaluate("digits_mu", tasks=5)


def test_the_command_line_trains_evaluates_and_verifies_learners(data_dir, tmp_path, monkeypatch, pizoo_command):
    monkeypatch.chdir(tmp_path)
    sets = [part for setting in (*SETTINGS, *SMALL["mu"]) for part in ("--set", setting)]
    done = pizoo_command("train", "omniglot_mu", *sets, "--data", data_dir, "--device", "cpu")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "runs/omniglot_mu/results.json").read_text())
    for split, values in results["splits"].items():
        assert split in done.out and f"{values['accuracy']:.2f} ± {1.96 * values['standard_error']:.2f}" in done.out
    assert "test accuracy" in done.out and "on validation_rotated" in done.out
    done = pizoo_command("evaluate", "runs/omniglot_mu", "--data", data_dir, "--tasks", 10)
    assert done.code == 0 and done.out.count(" 10 ") == 4 and "test_rotated" in done.out
    done = pizoo_command("verify", "runs/omniglot_mu", "--data", data_dir)
    assert done.code == 0 and "measured on 30 tasks of test" in done.out
    longer = ("--set", "model.r=16", "--set", "train.epochs=50", "--set", "train.steps_per_epoch=10")
    done = pizoo_command("train", "omniglot_infpi", "--dry-run", *longer)
    assert done.code == 0 and f"{16 + 50 * 10 * 80:,}" in done.out


def test_pools_of_the_file_are_what_training_takes(data_dir):
    pools = load_tasks("omniglot", data_dir)
    assert {part: len(pool.images) for part, pool in pools.items()} == CLASSES
    assert pizoo.train(small("mu", "train.epochs=1"), data_dir=data_dir, device="cpu").history[0]["step"] == 4
