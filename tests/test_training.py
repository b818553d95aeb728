"""Training: everything follows from the recipe, a training stopped anywhere is the same training, and nets learn."""

from __future__ import annotations

import json
import logging
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pizoo
from pizoo import checkpoint, segments, zoo
from pizoo.data import Dataset, Normalize, epoch_order, load_dataset
from pizoo.evaluation.accuracy import accuracy, percent, predict
from pizoo.evaluation.entries import classify
from pizoo.files import CheckpointError
from pizoo.recipes import Recipe, RecipeError, load_recipe
from pizoo.rows import Reserved, growing_layers
from pizoo.training import results, supervised
from pizoo.training.folder import LOCK, training_lock
from pizoo.training.reproduce import reproduce
from pizoo.training.schedule import schedule_factor
from pizoo.training.supervised import TrainingDiverged

N = 40
# Everything the tests speak of is set here: the zoo's recipes may change.
SETTINGS = (f"data.subset={N}", "train.batch_size=16", "train.lr=0.5", "train.clip.max_norm=0.5")
TINY = ("model.r=8", "train.epochs=3", *SETTINGS)
SMALL = {
    "infpi": ("model.r=8",),
    "finpi": ("model.r=8", "model.width=16"),
    "mu": ("model.width=16",),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of one uninterrupted training, in its folder."""
    return pizoo.train("digits_infpi", tmp_path_factory.mktemp("whole"), overrides=TINY, device="cpu")


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small(kind: str, *overrides: str) -> Recipe:
    return load_recipe(f"digits_{kind}", ("train.epochs=2", *SETTINGS, *SMALL[kind], *overrides))


def spy(monkeypatch, name: str) -> list[tuple]:
    """Arguments of every call the trainer makes to one of its functions."""
    calls, real = [], getattr(supervised, name)

    def recorded(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(supervised, name, recorded)
    return calls


# The same training again


def test_without_a_folder_nothing_is_written_and_the_net_is_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pizoo.train("digits_infpi", overrides=TINY, device="cpu")
    assert states_equal(result.model, whole.model)
    assert list(tmp_path.iterdir()) == [] and result.folder is None


@pytest.mark.parametrize("kind", SMALL)
def test_a_seed_decides_the_net(kind):
    first, again = (pizoo.train(small(kind), device="cpu") for _ in range(2))
    assert states_equal(first.model, again.model)
    other = pizoo.train(small(kind, "train.seed=1"), device="cpu")
    assert not torch.equal(first.model.state_dict()[WEIGHT[kind]], other.model.state_dict()[WEIGHT[kind]])


WEIGHT = {"infpi": "input.A", "finpi": "layers.0.weight", "mu": "layers.0.weight"}


def test_training_draws_nothing_from_the_callers_random_numbers():
    torch.manual_seed(7)
    np.random.seed(7)
    wanted = (torch.rand(3), np.random.rand(3))
    for seed in (7, 8):
        torch.manual_seed(seed)
        np.random.seed(seed)
        trained = pizoo.train(small("finpi"), device="cpu")
        if seed == 7:
            assert torch.equal(torch.rand(3), wanted[0]) and (np.random.rand(3) == wanted[1]).all()
            first = trained
    assert states_equal(first.model, trained.model)


def test_a_resumed_training_is_the_uninterrupted_one(whole, tmp_path, monkeypatch, caplog):
    real = supervised.Training._save

    def save_then_stop(self, epoch):
        real(self, epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(supervised.Training, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        pizoo.train("digits_infpi", tmp_path, overrides=TINY, device="cpu")
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "pizoo"):
        resumed = pizoo.train("digits_infpi", tmp_path, overrides=TINY, device="cpu")
    assert "after epoch 2" in caplog.text
    assert states_equal(resumed.model, whole.model)
    times = {"train_seconds": 0, "wall_seconds": 0}
    assert [{**r, **times} for r in resumed.history] == [{**r, **times} for r in whole.history]
    assert "stopped by KeyboardInterrupt" in (tmp_path / "train.log").read_text()


def test_a_finished_training_is_loaded_not_trained_and_its_results_stay(whole, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir() if path.name != "train.log"}
    monkeypatch.setattr(supervised.Training, "_step", lambda *args: pytest.fail("a step was taken"))
    monkeypatch.setattr(results, "hardware", lambda device: "another machine")
    again = pizoo.train("digits_infpi", whole.folder, overrides=TINY, device="cpu")
    assert states_equal(again.model, whole.model) and not again.model.training
    assert again.results == whole.results == json.loads((whole.folder / "results.json").read_text())
    assert before == {path.name: path.read_bytes() for path in whole.folder.iterdir() if path.name != "train.log"}


def test_a_solved_regressor_is_loaded_not_solved_again(tmp_path, monkeypatch):
    solved = pizoo.train("digits_nngp", tmp_path, overrides=["data.subset=50"], device="cpu")
    monkeypatch.setattr("pizoo.models.KernelRegressor.fit", lambda *args: pytest.fail("it was solved again"))
    again = pizoo.train("digits_nngp", tmp_path, overrides=["data.subset=50"], device="cpu")
    assert states_equal(again.model, solved.model) and again.results == solved.results
    x = torch.randn(3, 64)
    torch.testing.assert_close(again.model(x), solved.model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("entry", "overrides", "message"),
    [
        ("digits_infpi", ("train.lr=0.25",), r"train\.lr is 0\.5 there, 0\.25 here"),
        ("digits_infpi", ("train.epochs=4",), r"train\.epochs is 3 there, 4 here"),
        ("digits_infpi", ("train.clip.max_norm=1.0",), r"train\.clip\.max_norm is 0\.5 there, 1\.0 here"),
        ("digits_infpi", ("data.split=2",), r"data\.split is 0 there, 2 here"),
        ("digits_nngp", ("data.subset=40",), r"another recipe"),
    ],
)
def test_a_folder_of_another_recipe_is_refused_naming_the_difference(whole, entry, overrides, message):
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir() if path.name != "train.log"}
    overrides = (*TINY, *overrides) if entry == "digits_infpi" else overrides
    with pytest.raises(CheckpointError, match=message):
        pizoo.train(entry, whole.folder, overrides=overrides, device="cpu")
    assert before == {path.name: path.read_bytes() for path in whole.folder.iterdir() if path.name != "train.log"}


def test_a_shipped_net_is_not_trained_over(tmp_path):
    recipe = small("mu")
    dataset = recipe.data.load()
    model = recipe.build_model()
    checkpoint.save_with_probe(tmp_path, model, recipe.config(dataset.class_names), dataset, recipe.data.normalize)
    with pytest.raises(CheckpointError, match="holds a shipped net, not a training"):
        pizoo.train(recipe, tmp_path, device="cpu")
    assert states_equal(pizoo.load(tmp_path), model)


# Recipes and overrides


def test_overrides_go_with_a_name_and_not_with_a_recipe():
    recipe = small("mu", "train.epochs=1", "train.lr=0.0625")
    result = pizoo.train(recipe, device="cpu")
    assert result.recipe is recipe and len(result.history) == 1 and result.history[0]["lr"] == 0.0625
    with pytest.raises(RecipeError, match="overrides go with a name or path"):
        pizoo.train(recipe, overrides=["train.epochs=2"])


def test_a_data_set_that_does_not_fit_the_recipe_is_refused_before_anything_is_written(tmp_path):
    dataset = Dataset("mine", torch.rand(4, 5), torch.arange(4) % 2, None, None, ("a", "b"))
    with pytest.raises(ValueError, match=r"items of shape \(5,\); they must be of shape \(1, 8, 8\)"):
        pizoo.train(small("mu"), tmp_path / "run", dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_every_batch_comes_from_the_epochs_order_and_the_short_last_one_counts(monkeypatch):
    seen = []
    step = supervised.Training._step
    monkeypatch.setattr(
        supervised.Training, "_step", lambda self, i, x, y: seen.append((i, x, y)) or step(self, i, x, y)
    )
    recipe = small("mu")
    pizoo.train(recipe, device="cpu")
    dataset = recipe.data.load()
    wanted = [batch for epoch in range(2) for batch in epoch_order(N, 0, epoch).split(16)]
    assert [len(y) for _, _, y in seen] == [16, 16, 8] * 2 and [i for i, _, _ in seen] == list(range(6))
    for (_, x, y), batch in zip(seen, wanted, strict=True):
        assert torch.equal(x, dataset.train_x[batch]) and torch.equal(y, dataset.train_y[batch])


# Schedule and clipping


def test_multistep_drops_when_a_milestone_of_epochs_is_finished():
    schedule = small("mu", "train.schedule={name: multistep, milestones: [2, 3], gamma: 0.1}").train.schedule
    factors = [schedule_factor(schedule, step, steps_per_epoch=5, steps=20) for step in range(20)]
    assert factors == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)


def test_cosine_goes_from_one_to_zero():
    schedule = small("mu", "train.schedule={name: cosine}").train.schedule
    factors = [schedule_factor(schedule, step, 5, 20) for step in range(21)]
    assert factors[0] == 1 and factors[10] == pytest.approx(0.5) and factors[20] == pytest.approx(0, abs=1e-15)
    assert factors == pytest.approx([(1 + math.cos(math.pi * t / 20)) / 2 for t in range(21)])


@pytest.mark.parametrize("follows", [True, False])
def test_the_trainer_steps_with_the_scheduled_rate_and_clips_at_the_threshold_that_drops_with_it(monkeypatch, follows):
    thresholds = spy(monkeypatch, "clip_grad_norm_")
    rates = []
    step = supervised.PiSGD.step
    monkeypatch.setattr(
        supervised.PiSGD, "step", lambda self: rates.append({g["lr"] for g in self.param_groups}) or step(self)
    )
    recipe = small(
        "mu",
        "train.epochs=3",
        "train.lr=0.5",
        "train.schedule={name: multistep, milestones: [1, 2], gamma: 0.1}",
        "train.clip.max_norm=0.25",
        f"train.clip.follows_schedule={str(follows).lower()}",
    )
    result = pizoo.train(recipe, device="cpu")
    factors = [1.0] * 3 + [0.1] * 3 + [0.01] * 3
    assert [len(r) for r in rates] == [1] * 9
    assert [r.pop() for r in rates] == pytest.approx([0.5 * f for f in factors])
    wanted = [0.25 * (f if follows else 1) for f in factors]
    assert [max_norm for _, max_norm, _ in thresholds] == pytest.approx(wanted)
    assert [record["lr"] for record in result.history] == pytest.approx([0.5, 0.05, 0.005])


def test_without_clipping_nothing_is_scaled(monkeypatch):
    thresholds = spy(monkeypatch, "clip_grad_norm_")
    pizoo.train(small("mu", "train.clip.max_norm=null", "train.lr=0.01"), device="cpu")
    assert {max_norm for _, max_norm, _ in thresholds} == {None}


def test_cosine_ends_near_a_rate_of_zero(monkeypatch):
    result = pizoo.train(small("infpi", "train.schedule={name: cosine}"), device="cpu")
    assert result.history[-1]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)) / 2)


# Rows


def test_a_training_appends_one_row_per_sample_and_never_moves_those_there(monkeypatch):
    moves = []
    reserve = Reserved.reserve

    def counted(self, capacity):
        storage = self.storage
        reserve(self, capacity)
        moves.append(self.storage is not storage)

    monkeypatch.setattr(Reserved, "reserve", counted)
    recipe = small("infpi", "train.epochs=3", "train.weight_decay=0.01")
    initial = {name: layer.count for name, layer in growing_layers(recipe.build_model()).items()}
    result = pizoo.train(recipe, device="cpu")
    assert sum(moves) == 2 * 3, "A, B and amult of two layers, once each"
    for record in result.history:
        assert record["rows"] == {name: count + N * record["epoch"] for name, count in initial.items()}
    first = recipe.build_model()
    for name, layer in growing_layers(result.model).items():
        assert layer.count == layer.capacity == initial[name] + 3 * N
        assert torch.equal(layer.A[: initial[name]], first.state_dict()[f"{name}.A"])


# Losses


def test_cross_entropy_and_mean_squared_error_are_what_they_are_called(monkeypatch):
    for loss, expected in (
        ("cross_entropy", nn.functional.cross_entropy),
        ("mse", lambda logits, y: ((logits - nn.functional.one_hot(y, 10)) ** 2).mean()),
    ):
        recipe = small("mu", f"train.loss={loss}", "train.epochs=1", f"train.batch_size={N}")
        dataset, normalize = recipe.data.load(), recipe.data.normalize
        with torch.no_grad():
            wanted = expected(recipe.build_model()(normalize(dataset.train_x)), dataset.train_y)
        result = pizoo.train(recipe, device="cpu")
        assert result.history[0]["train_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_mean_squared_error_trains():
    result = pizoo.train(small("mu", "train.loss=mse", "train.lr=0.1", "train.epochs=5"), device="cpu")
    losses = [record["train_loss"] for record in result.history]
    assert losses[-1] < 0.8 * losses[0]


FLOORS = {"infpi": 80.0, "finpi": 80.0, "mu": 80.0, "nngp": 90.0, "ntk": 90.0}  # chance is 10


@pytest.mark.parametrize("kind", FLOORS)
def test_all_five_kinds_learn_the_digits(kind):
    overrides = ["data.subset=600", *(["train.epochs=4"] if kind in SMALL else [])]
    if kind in ("infpi", "finpi"):
        overrides.append("model.r=24")
    result = pizoo.train(f"digits_{kind}", overrides=overrides, device="cpu")
    assert result.results["accuracy"] > FLOORS[kind]
    dataset = result.recipe.data.load()
    measured = accuracy(predict(result.model, dataset.test_x, result.recipe.data.normalize), dataset.test_y)
    assert measured == result.results["accuracy"]
    if kind in SMALL:
        losses = [record["train_loss"] for record in result.history]
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("count", [10_000, 449])
def test_an_accuracy_has_no_digits_but_its_own(count):
    assert str(percent(torch.arange(10_000) < 5760)) == "57.6"
    for right in range(count + 1):
        assert percent(torch.arange(count) < right) == float(Fraction(100 * right, count))


def test_results_say_what_was_measured_and_call_the_best_epoch_test_selected(whole):
    accuracies = [record["test_accuracy"] for record in whole.history]
    assert whole.results["accuracy"] == accuracies[-1]
    assert whole.results["best_epoch"]["accuracy"] == max(accuracies)
    assert whole.results["best_epoch"]["note"] == "test-selected"
    assert whole.results["data"] == {"name": "digits", "part": "test", "subset": N, "split": 0}
    assert whole.results["versions"]["torch"] == torch.__version__


def test_test_images_are_normalised_once_and_measured_as_raw_ones_are(monkeypatch):
    calls, real = [], Normalize.__call__
    monkeypatch.setattr(Normalize, "__call__", lambda self, x, *args: calls.append(len(x)) or real(self, x, *args))
    result, test_x = pizoo.train(small("infpi"), device="cpu"), load_dataset("digits").test_x
    assert len(result.history) > 1 and calls.count(len(test_x)) == 1
    normalize = result.recipe.data.normalize
    raw, normalised = predict(result.model, test_x, normalize), predict(result.model, normalize(test_x), None)
    assert torch.equal(raw, normalised)


# Divergence


def last_epoch_kept(folder, epoch: int, states) -> None:
    found = checkpoint.load(folder)[0].state_dict()
    assert all(torch.equal(found[name], states[epoch - 1][name]) for name in found)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", SMALL)
def test_a_loss_that_is_not_finite_stops_at_that_step_and_keeps_the_last_epoch(tmp_path, monkeypatch, kind, poison):
    recipe, calls, states = small(kind), 0, []
    real, save = Normalize.__call__, segments.save_epoch

    def poisoned(self, x, dtype=torch.float32):
        nonlocal calls
        x = real(self, x, dtype)
        if len(x) <= 16:  # a training batch, not the test part
            calls += 1
            if calls == 5:
                x[3] = poison
        return x

    def save_and_keep(folder, model, *args, **kwargs):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save(folder, model, *args, **kwargs)

    monkeypatch.setattr(Normalize, "__call__", poisoned)
    monkeypatch.setattr(segments, "save_epoch", save_and_keep)
    with pytest.raises(TrainingDiverged) as caught:
        pizoo.train(recipe, tmp_path, device="cpu")
    assert calls == 5
    message = str(caught.value)
    assert "at step 4 (epoch 2); the step was not taken" in message
    assert f"the net of epoch 1 stands in {tmp_path}" in message
    last_epoch_kept(tmp_path, 1, states)
    monkeypatch.undo()
    assert states_equal(pizoo.train(recipe, tmp_path, device="cpu").model, pizoo.train(recipe, device="cpu").model)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("per_param", ["true", "false"])
def test_a_gradient_that_is_not_finite_is_divergence_though_the_loss_is(monkeypatch, kind, per_param):
    real = supervised.clip_grad_norm_

    def overflown(model, *args):
        list(model.parameters())[-1].grad[0] = math.inf
        return real(model, *args)

    monkeypatch.setattr(supervised, "clip_grad_norm_", overflown)
    with pytest.raises(TrainingDiverged, match=r"loss \d.* or its gradient is not finite at step 0"):
        pizoo.train(small(kind, f"train.clip.per_param={per_param}"), device="cpu")


def test_finite_inputs_too_large_for_the_net_stop_in_the_first_epoch():
    x = torch.full((8, 5), 1e300, dtype=torch.float64)
    dataset = Dataset("mine", x, torch.arange(8) % 2, None, None, ("a", "b"))
    with pytest.raises(TrainingDiverged, match=r"step 0 \(epoch 1\).*no epoch was saved"):
        pizoo.train(own(input_size=[5], classes=2), dataset=dataset)


def test_predictions_that_are_not_finite_after_an_epoch_are_divergence_too(tmp_path, monkeypatch):
    real = supervised.predict
    evaluated = []

    def overflows(*args):
        evaluated.append(1)
        return real(*args) * (math.inf if len(evaluated) == 2 else 1)

    monkeypatch.setattr(supervised, "predict", overflows)
    with pytest.raises(
        TrainingDiverged, match=r"predictions after epoch 2 are not finite; the net of epoch 1 stands in"
    ):
        pizoo.train(small("mu"), tmp_path, device="cpu")
    assert len(segments.read_manifest(tmp_path)["epochs"]) == 1


def test_a_learning_rate_far_too_large_diverges_rather_than_training_on(tmp_path):
    recipe = small("mu", "train.loss=mse", "train.lr=1000.0", "train.clip.max_norm=null", "train.epochs=20")
    with pytest.raises(TrainingDiverged, match=r"train\.lr"):
        pizoo.train(recipe, tmp_path, device="cpu")


# One's own data, end to end


def own(**data) -> Recipe:
    return Recipe.from_dict(
        {
            "entry": "mine",
            "description": "my own",
            "model": {"kind": "infpi", "r": 16},
            "data": {"name": "mine", "path": "mine", "scale": 1.0, **data},
            "train": {"epochs": 15, "batch_size": 4, "lr": 0.2, "clip": {"max_norm": 1.0}},
        }
    )


def test_own_arrays_are_trained_on_loaded_and_predicted(tmp_path):
    """Two clouds of vectors a long way apart: every one is told apart."""
    rng = np.random.RandomState(0)
    labels = np.arange(60) % 2
    vectors = (rng.randn(60, 5) + np.where(labels, 4, -4)[:, None]).astype(np.float32)
    np.savez(
        tmp_path / "mine.npz",
        train_images=vectors[:40],
        train_labels=labels[:40],
        test_images=vectors[40:],
        test_labels=labels[40:],
        class_names=np.array(["low", "high"]),
    )
    recipe = own(path=str(tmp_path / "mine.npz"), input_size=[5], classes=2)
    assert pizoo.train(recipe, tmp_path / "run", device="cpu").results["accuracy"] == 100
    loaded = pizoo.load(tmp_path / "run")
    x = torch.tensor([[-4.0] * 5, [4.0] * 5])
    names = loaded.config["class_names"]
    assert [names[i] for i in loaded(x).argmax(1)] == ["low", "high"]
    assert pizoo.evaluate(loaded)["accuracy"] == 100
    with pytest.raises(ValueError, match=r"takes vectors \[5\], not images"):
        classify(tmp_path / "run", [])


def test_own_images_are_trained_on_loaded_and_classified(tmp_path):
    """Red pictures and blue ones, of several sizes, without a test part."""
    rng = np.random.RandomState(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.randint(0, 60, (6 + i, 9, 3)).astype(np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    recipe = own(path=str(tmp_path / "images"), input_size=[3, 4, 4], classes=2)
    recipe = Recipe.from_dict({**recipe.to_dict(), "data": {**recipe.to_dict()["data"], "scale": 255.0}})
    result = pizoo.train(recipe, tmp_path / "run", device="cpu")
    assert "accuracy" not in result.results and "test_accuracy" not in result.history[-1]
    files = [tmp_path / "images" / name / "7.png" for name in ("red", "blue", "red")]
    ranked = classify(tmp_path / "run", files)
    assert [best[0][0] for best in ranked] == ["red", "blue", "red"]
    assert all(sum(p for _, p in best) == pytest.approx(1) and best[0][1] > 0.8 for best in ranked)
    with pytest.raises(ValueError, match="no test part"):
        pizoo.evaluate(tmp_path / "run")


# Making an entry


def test_reproduce_trains_every_seed_ships_the_first_and_records_all(tmp_path, monkeypatch):
    recipe = small("infpi", "train.dtype=float16")
    results = reproduce(recipe, tmp_path / "card", tmp_path / "runs", seeds=[2, 5], device="cpu")
    single = {seed: pizoo.train(recipe.with_seed(seed), device="cpu") for seed in (2, 5)}
    assert [run["accuracy"] for run in results["seeds"]] == [single[s].results["accuracy"] for s in (2, 5)]
    a, b = (run["accuracy"] for run in results["seeds"])
    assert results["mean_accuracy"] == pytest.approx((a + b) / 2)
    assert results["standard_error"] == pytest.approx(abs(a - b) / 2)
    assert results["shipped_seed"] == 2
    loaded = pizoo.load(tmp_path / "card")
    assert states_equal(loaded, single[2].model)
    assert loaded.config["recipe"] == recipe.with_seed(2).to_dict()
    assert results["accuracy"] == pizoo.evaluate(loaded)["accuracy"]
    assert results == json.loads((tmp_path / "card" / "results.json").read_text())
    assert f"{results['accuracy']:.2f}" in (tmp_path / "card" / "README.md").read_text()
    monkeypatch.setattr(supervised.Training, "_step", lambda *args: pytest.fail("a step was taken"))
    assert reproduce(recipe, tmp_path / "card", tmp_path / "runs", seeds=[2, 5], device="cpu") == results


def test_a_folder_in_use_or_refused_is_left_as_it_is(tmp_path):
    tiny = ("model.r=4", "data.subset=20", "train.epochs=1")
    folder = tmp_path / "run"
    with training_lock(folder):
        with pytest.raises(CheckpointError, match="run is in use"):
            pizoo.train("digits_infpi", folder, overrides=tiny, device="cpu")
        assert [path.name for path in folder.iterdir()] == [LOCK]
    pizoo.train("digits_infpi", folder, overrides=tiny, device="cpu")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="another recipe"):
        pizoo.train("digits_infpi", folder, overrides=(*tiny, "train.lr=0.3"), device="cpu")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    card = Path(shutil.copytree(zoo.card("digits_mu"), tmp_path / "card"))
    with pytest.raises(CheckpointError):
        pizoo.train("digits_mu", card, device="cpu")
    assert {path.name for path in card.iterdir()} == {path.name for path in zoo.card("digits_mu").iterdir()}
