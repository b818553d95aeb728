"""Transfer: ridge regression on a net's features, epoch and ridge chosen without the test images; what is recorded of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pizoo
from pizoo import checkpoint, functional, kernels
from pizoo.cards import card_text
from pizoo.data import Dataset, TransferData, load_dataset, split_validation
from pizoo.evaluation import transfer
from pizoo.evaluation.accuracy import accuracy, percent
from pizoo.evaluation.transfer import featured, transfer_correct, verification_split
from pizoo.files import CheckpointError, read_json, read_tensors, write_json, write_tensors
from pizoo.memory import NotEnoughMemory
from pizoo.models import InfPiMLP
from pizoo.recipes import Compact, load_recipe
from pizoo.training import seeds, supervised
from pizoo.training.compact import compact_checkpoint
from pizoo.training.reproduce import reproduce
from pizoo.training.seeds import run_seeds
from pizoo.training.transfer import TransferTraining, measure_shipped

F64 = torch.float64
SETTINGS = (
    "transfer={data: {name: digits, classes: 5, keep: [5, 6, 7, 8, 9], input_size: [1, 8, 8], scale: 16.0, mean: [0.3], "
    "std: [0.4]}, epoch: 2, ridge: 0.01, ridges: [0.001, 0.01, 10.0], epochs: [1], validation: 0.25}"
)
SOURCE = ("data.keep=[0, 1, 2, 3, 4]", "data.classes=5", "data.subset=200", "train.batch_size=16", SETTINGS)


def small(entry: str = "digits_infpi", *more: str):
    """Features learned on images of 0 to 4, measured on images of 5 to 9."""
    sizes = {
        "digits_infpi": ["model.r=16"],
        "digits_mu": ["model.width=32"],
        "digits_finpi": ["model.width=32", "model.r=8"],
    }
    return load_recipe(entry, [*SOURCE, *sizes[entry], "train.epochs=3", "train.schedule={name: constant}", *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return pizoo.train(small(), tmp_path_factory.mktemp("transfer") / "run", device="cpu")


def problem(n: int = 60, k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, dtype=F64, generator=generator)
    return x, torch.randn(n, k, dtype=F64, generator=generator)


# Regression on kernels


def test_one_eigendecomposition_solves_what_a_cholesky_decomposition_a_ridge_does():
    x, targets = problem()
    kernel = functional.relu_kernel(x, x)
    before, many = kernel.clone(), torch.logspace(-4, 1, kernels.EIGEN_FROM).tolist()
    found = kernels.solve_ridges(kernel, targets, many)
    assert torch.equal(kernel, before)
    for ridge, dual in zip(many, found, strict=True):
        torch.testing.assert_close(dual, functional.solve_ridge(kernel, targets, ridge), rtol=1e-8, atol=1e-8)
    (few,) = kernels.solve_ridges(kernel, targets, many[:1])
    assert torch.equal(few, functional.solve_ridge(kernel, targets, many[0]))
    with pytest.raises(ValueError, match=r"not positive definite \(eigenvalue -2"):
        kernels.solve_ridges(-2 * torch.eye(5, dtype=F64), targets[:5], many)


def test_conjugate_gradients_reach_the_solution_without_holding_the_kernel(monkeypatch):
    x, targets = problem(200)
    targets[:, 1] = 0  # a column that is solved before the first step
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 32)
    monkeypatch.setattr(kernels, "BLOCK_ENTRIES", {"cpu": 32 * 48})
    wanted = functional.solve_ridge(functional.relu_kernel(x, x), targets, 1e-2)
    found, steps = kernels.solve_iteratively(functional.relu_kernel, x, targets, 1e-2, tolerance=1e-10, landmarks=50)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    twice = torch.cat([x, x])  # landmarks that coincide
    again, _ = kernels.solve_iteratively(functional.relu_kernel, twice, torch.cat([targets] * 2), 1e-2, landmarks=400)
    torch.testing.assert_close(again[:200], again[200:], rtol=1e-4, atol=1e-4)
    _, without = kernels.solve_iteratively(functional.relu_kernel, x, targets, 1e-2, tolerance=1e-10, landmarks=1)
    assert 1 < steps < without / 2  # what the preconditioner is for
    with pytest.raises(ValueError, match="after 2 iterations, 1e-10 is wanted"):
        kernels.solve_iteratively(functional.relu_kernel, x, targets, 1e-2, tolerance=1e-10, iterations=2, landmarks=1)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    x, targets = problem(10)
    for solve in (
        lambda: kernels.solve_ridges(functional.relu_kernel(x, x), targets, [1.0, ridge]),
        lambda: kernels.solve_iteratively(functional.relu_kernel, x, targets, ridge),
    ):
        with pytest.raises(ValueError, match=r"ridge is .*; it must be positive"):
            solve()


def test_a_kernel_larger_than_memory_is_refused_with_its_size(trained, monkeypatch):
    monkeypatch.setattr(kernels, "free_memory", lambda device: 10**6)
    x = torch.zeros(500, 1, 8, 8)
    with pytest.raises(NotEnoughMemory, match=r"between 500 and 500 inputs takes 0\.0 GiB in float32; .* would fit"):
        pizoo.feature_kernel(trained.model, x)
    features = featured(trained.model, load_dataset("digits"), small().transfer.data.normalize)
    with pytest.raises(NotEnoughMemory, match="between 1,348 and 1,348 inputs, and its factor beside it, takes"):
        transfer_correct(trained.model.feature_kernel, features, [0.1])
    right = transfer_correct(
        trained.model.feature_kernel, features, [0.1], tolerance=1e-8
    )  # which needs no such matrix
    monkeypatch.undo()
    assert torch.equal(right[0], transfer_correct(trained.model.feature_kernel, features, [0.1])[0])


@pytest.mark.parametrize("free", [10**6, 10**8, 10**9, 10**11])  # beneath a block, and far beyond
@pytest.mark.parametrize("copies", [1, kernels.FACTORED, kernels.DECOMPOSED])
def test_a_kernel_of_the_size_that_is_advised_is_not_refused(free, copies, monkeypatch):
    monkeypatch.setattr(kernels, "free_memory", lambda device: free)
    cpu = torch.device("cpu")
    with pytest.raises(NotEnoughMemory) as refused:
        kernels.check_memory(10**6, 10**6, 8, cpu, copies)
    advised = int(re.search(r"One between ([\d,]+) would fit", str(refused.value))[1].replace(",", ""))
    kernels.check_memory(advised, advised, 8, cpu, copies)
    with pytest.raises(NotEnoughMemory):
        kernels.check_memory(advised + 1, advised + 1, 8, cpu, copies)


def test_many_ridges_are_refused_what_their_eigendecomposition_takes(monkeypatch):
    (x, _), labels = problem(1000), torch.zeros(1000, dtype=torch.int64)
    found = Dataset("noise", x, labels, x[:2], labels[:2], ("one",))
    monkeypatch.setattr(kernels, "free_memory", lambda device: kernels.kernel_bytes(1000, 1000, 8, device, 3))
    transfer_correct(functional.relu_kernel, found, [0.1])
    with pytest.raises(NotEnoughMemory, match="and its eigendecomposition, takes"):
        transfer_correct(functional.relu_kernel, found, [0.1] * kernels.EIGEN_FROM)


def test_a_dry_run_refuses_what_the_training_would(monkeypatch, pizoo_command):
    changes = [part for setting in SOURCE for part in ("--set", setting)]
    command = ("train", "digits_mu", "--dry-run", "--device", "cpu", *changes)
    fits = pizoo_command(*command)
    assert fits.code == 0 and "measuring transfer takes" in fits.out, fits.err
    monkeypatch.setattr(kernels, "free_memory", lambda device: 10**6)
    refused = pizoo_command(*command)
    assert refused.code == 1 and "measuring transfer takes" in refused.out
    assert "a smaller transfer.data.subset" in refused.err.replace("\n", " ")


def test_a_kernel_that_will_not_fit_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "free_memory", lambda device: 10**6)
    with pytest.raises(NotEnoughMemory, match=r"would fit: a smaller transfer\.data\.subset"):
        pizoo.train(small(), tmp_path, device="cpu")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="holds no finished epoch yet"):
        pizoo.load(tmp_path)


def test_images_of_another_size_than_the_nets_are_refused(trained):
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 32, 32\]; it must be \[B, 64\]"):
        pizoo.feature_kernel(trained.model, torch.zeros(2, 3, 32, 32))
    dataset = small().load_data()
    smaller = replace(
        dataset.target, train_x=dataset.target.train_x[..., :4, :4], test_x=dataset.target.test_x[..., :4, :4]
    )
    with pytest.raises(ValueError, match=r"items of shape \(1, 4, 4\); they must be of shape \(1, 8, 8\)"):
        pizoo.train(small(), dataset=TransferData(dataset.source, smaller), device="cpu")


# Training


def test_the_number_is_that_of_ridge_regression_on_the_chosen_nets_features(trained):
    found, target = trained.results["transfer"], small().transfer.data.load()
    x, test_x = (small().transfer.data.normalize(part) for part in (target.train_x, target.test_x))
    K, across = (pizoo.feature_kernel(trained.model, a, x, dtype=F64) for a in (x, test_x))
    dual = functional.solve_ridge(K, functional.centred_one_hot(target.train_y, 5), found["ridge"])
    assert accuracy(across @ dual, target.test_y) == found["accuracy"] == trained.results["accuracy"]
    assert (found["training_images"], found["test_images"]) == (len(target.train_y), len(target.test_y))
    assert found["source"]["data"] == "digits" and found["source"]["accuracy"] > 50  # of 0 to 4 themselves


def test_epoch_and_ridge_are_chosen_on_held_out_training_images(trained):
    recipe, records = small(), trained.history
    assert [("transfer" in record) for record in records] == [True, True, True]  # chosen, published, last
    target = recipe.transfer.data.load()
    accuracies = {}
    for record in records:
        net = pizoo.load(trained.folder, epoch=record["epoch"])
        held_out = split_validation(featured(net, target, recipe.transfer.data.normalize), 0.25)
        for ridge, right in zip(
            recipe.transfer.ridges, transfer_correct(net.feature_kernel, held_out, recipe.transfer.ridges), strict=True
        ):
            accuracies[record["epoch"], ridge] = percent(right)
        assert record["transfer"]["validation_accuracies"] == list(accuracies.values())[-3:]
        assert 0 < record["quick_accuracy"] <= 100 and record["transfer_seconds"] > 0
    found = trained.results["transfer"]
    assert found["validation_accuracy"] == max(accuracies.values()) == accuracies[found["epoch"], found["ridge"]]
    chosen = pizoo.load(trained.folder)  # not told which epoch
    wanted = pizoo.load(trained.folder, epoch=found["epoch"])
    assert all(
        torch.equal(a, b) for a, b in zip(chosen.state_dict().values(), wanted.state_dict().values(), strict=True)
    )


def test_of_equally_good_choices_the_earliest_epoch_and_the_smallest_ridge_is_taken():
    of_epochs = {3: [80.0, 90.0, 90.0], 1: [90.0, 70.0, 90.0], 2: [90.0, 90.0, 90.0]}
    history = [
        {"epoch": epoch, "transfer": {"ridges": [1.0, 0.1, 0.01], "validation_accuracies": accuracies}}
        for epoch, accuracies in of_epochs.items()
    ]
    assert TransferTraining._choice(SimpleNamespace(history=history)) == (90.0, 1, 0.01)
    history.append({"epoch": 4, "transfer": {"ridges": [5.0], "validation_accuracies": [91.0]}})
    assert TransferTraining._choice(SimpleNamespace(history=history)) == (91.0, 4, 5.0)


def test_the_published_setting_stands_beside_it(trained):
    recipe, found = small(), trained.results["transfer"]["published_setting"]
    net = pizoo.load(trained.folder, epoch=2)
    features = featured(net, recipe.transfer.data.load(), recipe.transfer.data.normalize)
    assert found == {
        "epoch": 2,
        "ridge": 0.01,
        "accuracy": percent(transfer_correct(net.feature_kernel, features, [0.01])[0]),
    }


def test_choosing_never_looks_at_the_test_images(trained):
    recipe = small()
    dataset = recipe.load_data()
    lying = TransferData(dataset.source, replace(dataset.target, test_x=dataset.target.test_x.flip(0)))
    found = pizoo.train(recipe, dataset=lying, device="cpu")
    for key in ("epoch", "ridge", "validation_accuracy"):
        assert found.results["transfer"][key] == trained.results["transfer"][key]
    assert found.results["accuracy"] != trained.results["accuracy"]
    assert [r["quick_accuracy"] for r in found.history] == [r["quick_accuracy"] for r in trained.history]


@pytest.mark.parametrize("entry", ["digits_infpi", "digits_mu"])
def test_an_interrupted_run_goes_on_to_the_same_choice(entry, tmp_path, monkeypatch):
    whole = pizoo.train(small(entry), tmp_path / "whole", device="cpu")
    real = supervised.Training._epoch

    def dies(self, epoch, bar):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, epoch, bar)

    monkeypatch.setattr(supervised.Training, "_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        pizoo.train(small(entry), tmp_path / "run", device="cpu")
    monkeypatch.undo()
    resumed = pizoo.train(small(entry), tmp_path / "run", device="cpu")
    assert resumed.results["transfer"] == whole.results["transfer"]
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.model.state_dict().items())
    for epoch in (1, 2, 3):  # also of a finite net, whose other epochs are not kept
        pizoo.load(tmp_path / "run", epoch=epoch)


# The entry


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    patch = pytest.MonkeyPatch()
    patch.setattr(transfer, "VERIFIED_TRAIN", 300)
    patch.setattr(transfer, "VERIFIED_TEST", 100)
    reproduce(small("digits_finpi"), folder / "card", folder / "runs", [0, 1], device="cpu")
    yield folder / "card"
    patch.undo()


def test_without_a_gpu_verify_measures_the_smaller_problem_that_is_recorded(card):
    report = pizoo.verify(card, device="cpu")
    results = json.loads((card / "results.json").read_text())
    assert report.status == "verified" and report.differing == 0
    whole = results["transfer"]
    assert (
        report.check == f"100 of {whole['test_images']} test images, 300 of {whole['training_images']} training images"
    )
    assert report.part
    assert report.measured == report.recorded == results["verification"]["accuracy"] != results["accuracy"]
    assert pizoo.verify(card, device="cpu", quick=True).status == "verified"
    assert pizoo.verify(card, device="cpu", images=10).status == "not run"
    found = pizoo.evaluate(card, device="cpu")
    assert found["ridge"] == results["transfer"]["ridge"]
    assert (found["images"], found["training_images"], found["data"]) == (100, 300, "digits")
    assert found["accuracy"] == pytest.approx(
        results["verification"]["accuracy"], abs=1.01
    )  # float32: an image at most


def test_a_number_measured_on_a_part_is_shown_as_that_beside_the_mean(card, tmp_path, pizoo_command):
    other = shutil.copytree(card, tmp_path / "other")
    results = json.loads((card / "results.json").read_text())
    part, whole = results["verification"], results["transfer"]
    shown = pizoo_command("verify", card, other, "--device", "cpu")
    assert shown.code == 0 and shown.out.count(f"{part['accuracy']:.2f} (part)") == 4
    assert f"{results['mean_accuracy']:.2f} ±" in shown.out and f"{whole['accuracy']:.2f} (part)" not in shown.out
    told = (
        f"{card}, {other}: recorded and measured are ridge regression on a part, 100 of {whole['test_images']} test images, "
        f"300 of {whole['training_images']} training images; mean and published are on all of them"
    )
    assert told in shown.out.splitlines()
    assert "part" not in pizoo_command("verify", other, "--quick").out
    del results["verification"], results["correct_sha256"]
    results["transfer"] |= part  # so many there are, then
    (other / "results.json").write_text(json.dumps(results | {"verification": part}))
    shown = pizoo_command("verify", other, "--device", "cpu")
    assert "ridge regression on 100 test images, 300 training images\n" in shown.out and "part" not in shown.out


def test_few_training_images_with_many_test_images_are_compared_with_the_smaller_problem_too(
    card, tmp_path, monkeypatch
):
    monkeypatch.setattr(transfer, "VERIFIED_TRAIN", 5000)
    shutil.copytree(card, tmp_path / "card")
    path, recipe = tmp_path / "card" / checkpoint.RESULTS, small("digits_finpi")
    results, right, of_small = measure_shipped(
        tmp_path / "card", recipe, recipe.load_data(), read_json(path), torch.device("cpu")
    )
    assert results["verification"]["training_images"] == results["transfer"]["training_images"]
    assert results["verification"]["accuracy"] != pytest.approx(results["transfer"]["accuracy"], abs=0.05)
    correct = read_tensors(tmp_path / "card" / checkpoint.CORRECT)
    correct |= {checkpoint.SHIPPED: right, checkpoint.VERIFIED: of_small}
    results["correct_sha256"] = write_tensors(tmp_path / "card" / checkpoint.CORRECT, correct)
    write_json(path, results)
    report = pizoo.verify(tmp_path / "card", device="cpu")
    assert (report.status, report.differing) == ("verified", 0), report.reason
    assert report.check.startswith("100 of 221 test images") and report.measured == percent(of_small)


def test_the_ridge_that_training_chose_is_found_on_the_hub_too(card, scene):
    chosen = read_json(card / checkpoint.RESULTS)["transfer"]["ridge"]
    assert chosen != small("digits_finpi").transfer.ridge
    pizoo.publish(card, "me/card")
    assert pizoo.evaluate("hf-hub:me/card", device="cpu")["ridge"] == chosen


def test_without_a_record_of_the_choice_the_published_ridge_is_taken(card, tmp_path):
    shutil.copytree(card, tmp_path / "card")
    results = read_json(card / checkpoint.RESULTS)
    del results["transfer"]
    write_json(tmp_path / "card" / checkpoint.RESULTS, results)
    assert pizoo.evaluate(tmp_path / "card", device="cpu")["ridge"] == small("digits_finpi").transfer.ridge


def test_the_full_problem_is_what_the_headline_is_of(card):
    results = json.loads((card / "results.json").read_text())
    recipe = small("digits_finpi")
    model, target = pizoo.load(card, dtype=F64), recipe.transfer.data.load()
    features = featured(model, target, recipe.transfer.data.normalize)
    right = transfer_correct(model.feature_kernel, features, [results["transfer"]["ridge"]])[0]
    assert percent(right) == results["accuracy"] == results["transfer"]["accuracy"]
    stored = read_tensors(card / checkpoint.CORRECT)
    assert torch.equal(stored["shipped"], right) and len(stored["verified"]) == 100
    assert len(verification_split(features).train_y) == 300


def test_a_checkpoint_that_is_not_what_it_claims_is_a_mismatch(card, tmp_path):
    shutil.copytree(card, tmp_path / "card")
    results = json.loads((card / "results.json").read_text())
    results["verification"]["accuracy"] -= 1
    (tmp_path / "card" / "results.json").write_text(json.dumps(results))
    report = pizoo.verify(tmp_path / "card", device="cpu")
    assert report.status == "mismatch" and "further apart than 0.05 points" in report.reason


def test_its_card_tells_the_choice_and_what_the_published_setting_gives(card):
    text, results = card_text(card), json.loads((card / "results.json").read_text())
    chosen = results["transfer"]
    assert f"**{results['accuracy']:.2f}**, epoch {chosen['epoch']}, ridge {chosen['ridge']:g}" in text
    assert "at the published epoch 2 and ridge 0.01" in text
    for run in results["seeds"]:
        assert f"{run['transfer']['published_setting']['accuracy']:.2f}" in text
    assert f"another number is recorded ({results['verification']['accuracy']:.2f} %, with the ridge" in text
    assert "test-selected" not in text and "held-out training images" in text


def test_seeds_are_compared_by_transfer(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(seeds, "target_correct", lambda *args: pytest.fail("solved again"))
        results = run_seeds(small("digits_mu"), [0, 1], tmp_path, device="cpu")
    again = run_seeds(small("digits_mu"), [0, 1], tmp_path, device="cpu")  # of trainings that are loaded
    assert again == results
    for run in results["seeds"]:
        assert run["accuracy"] == run["transfer"]["accuracy"] and len(run["curve"]["quick_accuracy"]) == 3
    assert results["mean_accuracy"] == np.mean([run["accuracy"] for run in results["seeds"]])
    assert "mean_best_epoch_accuracy" not in results


def test_features_that_learn_beat_random_ones():
    """What the entry is about, on digits: features learned on 0 to 4 tell 5 to 9 apart better than those they started as."""
    recipe = small("digits_infpi", "model.r=32", "data.subset=null", "train.epochs=6")
    target = recipe.transfer.data.load()
    few = split_validation(target, 0.9)  # on a tenth of the images
    accuracies = [
        percent(transfer_correct(net.feature_kernel, featured(net, few, recipe.transfer.data.normalize), [0.01])[0])
        for net in (recipe.build_model(), pizoo.train(recipe, device="cpu").model)
    ]
    assert isinstance(recipe.build_model(), InfPiMLP) and accuracies[1] > accuracies[0] + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_is_measured_and_training_chooses_as_on_a_cpu(card, tmp_path):
    report = pizoo.verify(card, device="cuda")
    results = json.loads((card / "results.json").read_text())
    assert report.status == "verified" and report.recorded == results["accuracy"] and report.differing == 0
    trained = [pizoo.train(small(), tmp_path / device, device=device).results["transfer"] for device in ("cpu", "cuda")]
    assert abs(trained[0]["accuracy"] - trained[1]["accuracy"]) < 2
    whole = pizoo.evaluate(tmp_path / "cuda", device="cuda")
    assert (
        whole["training_images"] == trained[1]["training_images"]
        and abs(whole["accuracy"] - trained[1]["accuracy"]) < 1
    )


def test_a_compact_net_is_measured_by_transfer_and_so_verified(trained, tmp_path):
    made = compact_checkpoint(trained.folder, tmp_path / "compact", Compact(rows=100, views=2), device="cpu")
    full = json.loads((trained.folder / "results.json").read_text())
    assert made["mean_accuracy"] == full["accuracy"] and made["accuracy"] == made["transfer"]["accuracy"]
    assert abs(made["accuracy"] - full["accuracy"]) < 5 and made["transfer"]["ridge"] == full["transfer"]["ridge"]
    report = pizoo.verify(tmp_path / "compact", device="cpu")
    assert (report.status, report.reason) == ("verified", "")
    other = next(epoch for epoch in (1, 2, 3) if epoch != full["transfer"]["epoch"])
    with pytest.raises(ValueError, match=f"epoch is {other}; .* only the epoch that its training chose has a ridge"):
        compact_checkpoint(trained.folder, tmp_path / "other", Compact(rows=100), epoch=other, device="cpu")


def test_an_infinite_entry_ships_its_compact_net(tmp_path):
    results = reproduce(
        small("digits_infpi", "compact={rows: 100, views: 2}"), tmp_path / "card", tmp_path / "runs", [0]
    )
    assert pizoo.load(tmp_path / "card").hidden[0].count == 100
    assert abs(results["accuracy"] - results["seeds"][0]["accuracy"]) < 5
    assert pizoo.verify(tmp_path / "card", device="cpu").status == "verified"
    assert "## A compact net" in (tmp_path / "card/README.md").read_text()
