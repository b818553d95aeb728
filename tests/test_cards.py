"""Model cards: what they say is what is recorded, and what is recorded can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.figure import Figure

import pizoo
from pizoo import cards, plots, zoo
from pizoo.evaluation.accuracy import paired_difference, percent, within
from pizoo.files import CheckpointError, read_tensors, write_tensors
from pizoo.recipes import Recipe, load_recipe
from pizoo.training.reproduce import reproduce

SHIPPED = [entry for entry in zoo.list_entries() if zoo.has_weights(entry)]


def own_row(tmp_path: Path) -> dict[str, Recipe]:
    """Two recipes on one data set of somebody's own: a net and a kernel."""
    dataset = load_recipe("digits_mu").data.load()
    parts = {"train_images": dataset.train_x[:80, 0], "train_labels": dataset.train_y[:80]}
    parts |= {"test_images": dataset.test_x[:, 0], "test_labels": dataset.test_y}
    np.savez(tmp_path / "mine.npz", **{key: value.numpy() for key, value in parts.items()})
    shared = {
        "data": {
            "name": "mine",
            "path": str(tmp_path / "mine.npz"),
            "classes": 10,
            "input_size": [1, 8, 8],
            "scale": 16.0,
        },
        "published": {"accuracy": 90.0, "rerun": 88.0, "source": "a paper", "protocol": "a test part"},
        "differs": "Because it is a test.",
    }
    mu = {"kind": "mu", "width": 16}
    return {
        entry: Recipe.from_dict({"entry": entry, "description": entry, "model": model, "train": train, **shared})
        for entry, model, train in (
            ("a_net", mu, {"epochs": 2, "batch_size": 8, "lr": 0.1}),
            ("a_kernel", {"kind": "nngp", "depth": 2, "ridge": 0.1}, None),
        )
    }


@pytest.fixture
def row(tmp_path):
    """Folder of the cards of a net, of two seeds, and a kernel on the same test images."""
    for entry, recipe in own_row(tmp_path).items():
        seeds = [0, 1] if recipe.train else [0]
        reproduce(recipe, tmp_path / "cards" / entry, tmp_path / "runs" / entry, seeds, device="cpu")
    return tmp_path / "cards"


# The zoo's cards


@pytest.mark.parametrize("entry", zoo.list_entries())
def test_a_readme_says_what_the_card_records(entry):
    assert (zoo.card(entry) / "README.md").read_text() == cards.card_text(zoo.card(entry))


@pytest.mark.parametrize("entry", SHIPPED)
def test_recorded_images_give_the_recorded_accuracies(entry):
    results = json.loads((zoo.card(entry) / "results.json").read_text())
    found = read_tensors(zoo.card(entry) / "correct.safetensors", results["correct_sha256"])
    smaller = {"verified"} if "transfer" in results else set()  # what is measured without a large GPU
    assert found.keys() == {"shipped", *(f"seed-{run['seed']}" for run in results["seeds"]), *smaller}
    for name in smaller:
        assert 100 * found[name].double().mean() == pytest.approx(results["verification"]["accuracy"])
    assert 100 * found["shipped"].double().mean() == pytest.approx(results["accuracy"])
    for run in results["seeds"]:
        assert 100 * found[f"seed-{run['seed']}"].double().mean() == pytest.approx(run["accuracy"])


@pytest.mark.parametrize("entry", SHIPPED)
def test_the_hub_reads_the_numbers_from_the_header(entry):
    results = json.loads((zoo.card(entry) / "results.json").read_text())
    data = ModelCard.load(zoo.card(entry) / "README.md").data
    measured = {result.metric_name: result.metric_value for result in data.eval_results}
    assert data.license == "mit" and data.library_name == "pizoo" and data.pipeline_tag == "image-classification"
    (single,) = [value for name, value in measured.items() if name.startswith("accuracy of this checkpoint")]
    means = [value for name, value in measured.items() if name.startswith("mean accuracy over")]
    assert single == pytest.approx(results["accuracy"], abs=1e-4)
    assert means == ([pytest.approx(results["mean_accuracy"], abs=1e-4)] if len(results["seeds"]) > 1 else [])


# A card of one's own


def test_a_card_has_every_part_a_reader_asks_for(row):
    text, results = ((row / "a_net" / name).read_text() for name in ("README.md", "results.json"))
    results = json.loads(results)
    mean, error, best = (results[key] for key in ("mean_accuracy", "standard_error", "mean_best_epoch_accuracy"))
    assert f"**{mean:.2f} ± {error:.2f} %** of the 449 test images" in text
    assert f"Best epochs, test-selected: {best:.2f} %" in text and "Published: 90.00 %" in text
    assert (
        f"{90 - mean:.2f} points below it" in text
        and f"gives 88.00, {88 - mean:.2f} points from the number here. Because" in text
    )
    for run in results["seeds"]:
        assert f"| seed {run['seed']} | {run['accuracy']:.2f} | {run['best_epoch']['accuracy']:.2f} (epoch" in text
    assert "![Training loss and test accuracy over the epochs](curves.png)" in text
    assert (row / "a_net" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for part in (
        'pizoo.load("a_net")',
        "pizoo verify a_net",
        "pizoo train a_net",
        "## Licence and citation",
        "@inproceedings",
    ):
        assert part in text
    kernel = (row / "a_kernel" / "README.md").read_text()
    assert "model.attach(" in kernel and "pizoo verify --images 1000 a_kernel" in kernel and "curves.png" not in kernel


def test_cards_of_a_row_compare_themselves_on_the_same_test_images(row):
    cards.write_card(row / "a_net")  # now that the other one is there
    rights = {}
    for entry in ("a_net", "a_kernel"):
        results = json.loads((row / entry / "results.json").read_text())
        rights[entry] = [
            read_tensors(row / entry / "correct.safetensors")[f"seed-{run['seed']}"].double()
            for run in results["seeds"]
        ]
    away = paired_difference(sum(rights["a_net"]) / 2, rights["a_kernel"][0])
    for entry, other, sign in (("a_net", "a_kernel", 1), ("a_kernel", "a_net", -1)):
        low, high = sorted((sign * away.low, sign * away.high))
        line = f"| `{other}` | {sign * away.points:+.2f} | {low:+.2f} to {high:+.2f} |"
        assert line in (row / entry / "README.md").read_text()


def test_a_card_is_refreshed_with_its_recipes_texts_and_no_other_recipe(row, tmp_path):
    recipe = own_row(tmp_path)["a_net"]
    before = json.loads((row / "a_net" / "config.json").read_text())
    cards.refresh(row / "a_net", recipe.model_copy(update={"differs": "For a better reason."}))
    assert "For a better reason." in (row / "a_net" / "README.md").read_text()
    after = json.loads((row / "a_net" / "config.json").read_text())
    assert after["recipe"].pop("differs") != before["recipe"].pop("differs") and after == before
    assert pizoo.verify(row / "a_net", device="cpu").status == "verified"
    raw = recipe.to_dict()
    raw["train"]["lr"] = 0.3
    with pytest.raises(CheckpointError, match="card of another recipe"):
        cards.refresh(row / "a_net", Recipe.from_dict(raw))


def test_accuracies_of_a_growing_net_are_drawn_against_its_rows(monkeypatch):
    card = zoo.card("cifar10_infpi")
    results = json.loads((card / "results.json").read_text())
    left, right = Figure().subplots(1, 2)
    monkeypatch.setattr(plots, "drawn", lambda path, draw: draw(left, right))
    plots.draw_curves(card / "none.png", results["seeds"], 61.5, plots.rows_by_epoch(results["history"]))
    for line, run in zip(right.lines, results["seeds"], strict=False):  # then the published number
        assert list(line.get_xdata()) == [400 + 50_000 * epoch for epoch in range(1, 51)]
        assert list(line.get_ydata()) == run["curve"]["test_accuracy"] and line.get_ydata()[-1] == run["accuracy"]
    assert plots.rows_by_epoch([{"epoch": 1}]) is None and plots.rows_by_epoch([]) is None
    assert (
        "![Training loss over the epochs, test accuracy against rows](curves.png)" in (card / "README.md").read_text()
    )


@pytest.mark.parametrize("entry", [entry for entry in SHIPPED if zoo.config(entry)["recipe"]["published"]])
def test_a_card_says_whether_its_mean_is_within_the_tolerance(entry):
    recipe, text = zoo.config(entry)["recipe"], (zoo.card(entry) / "README.md").read_text()
    away = abs(
        json.loads((zoo.card(entry) / "results.json").read_text())["mean_accuracy"] - recipe["published"]["accuracy"]
    )
    tolerance = recipe["tolerance"]["reproduce"]
    said = f"{away - tolerance:.2f} beyond" if away > tolerance else "within"
    assert f"{away:.2f} points " in text and f" it, {said} the recipe's tolerance of {tolerance:g};" in text


# Checks of what is recorded


def test_first_test_images_are_compared_with_what_is_recorded_of_them(row):
    for entry in ("a_net", "a_kernel"):
        right = read_tensors(row / entry / "correct.safetensors")["shipped"]
        report = pizoo.verify(row / entry, device="cpu", images=50)
        assert (report.status, report.check, report.differing) == ("verified", "first 50 test images", 0)
        assert report.recorded == report.measured == percent(right[:50])
    with pytest.raises(ValueError, match="images is 0; it must be at least 1"):
        pizoo.verify(row / "a_net", images=0)


def test_exactly_as_far_apart_as_the_tolerance_is_within_it():
    """Five of 10,000 images, of whatever accuracy."""
    for right in range(0, 9_994, 7):
        a, b, c = (percent(torch.arange(10_000) < right + more) for more in (0, 5, 6))
        assert within(0.05, a, b) and within(0.05, b, a) and not within(0.05, a, c)


def test_what_the_recorded_images_do_not_give_is_a_mismatch(row):
    folder = row / "a_net"
    results = json.loads((folder / "results.json").read_text())
    results["seeds"][1]["accuracy"] += 1
    (folder / "results.json").write_text(json.dumps(results))
    for options in ({}, {"quick": True}):
        report = pizoo.verify(folder, device="cpu", **options)
        assert report.status == "mismatch" and "recorded of seed-1 is not that of its images" in report.reason


def test_a_kernel_is_checked_without_its_training_images(row, tmp_path):
    """The probe holds a few of them: what they contribute depends on the kernel and on their dual coefficients."""
    (tmp_path / "mine.npz").unlink()
    folder = row / "a_kernel"
    assert pizoo.verify(folder, device="cpu").status == "not run"
    assert pizoo.verify(folder, device="cpu", quick=True).status == "verified"
    config, state = (
        json.loads((folder / "config.json").read_text()),
        read_tensors(folder / "model.safetensors"),
    )
    state["dual"][3] *= 1.1
    config["pizoo"]["files"]["model.safetensors"] = write_tensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    report = pizoo.verify(folder, device="cpu", quick=True)
    assert report.status == "mismatch" and "logits are off" in report.reason


def test_a_difference_between_entries_has_the_interval_of_its_images():
    a, b = torch.tensor([1.0, 1, 1, 0, 0.5]), torch.tensor([1.0, 0, 1, 1, 0])
    away = paired_difference(a, b)
    each = 100 * (a - b).double()
    half = 1.96 * each.std().item() / 5**0.5
    assert (away.points, away.low, away.high) == pytest.approx((10.0, 10 - half, 10 + half))
    assert paired_difference(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"a and b have shapes \[5\] and \[4\]"):
        paired_difference(a, b[:4])


def test_the_interval_of_a_difference_holds_what_it_is_of_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    both = torch.rand(2000, 400, generator=generator) < 0.5  # most images are easy or hard for both
    draws = [torch.rand(2000, 400, generator=generator) for _ in range(2)]
    a, b = ((both & (draw < 0.9)) | (~both & (draw < p)) for draw, p in zip(draws, (0.3, 0.2), strict=True))
    differences = [paired_difference(x, y) for x, y in zip(a, b, strict=True)]
    held = sum(one.low <= 5 <= one.high for one in differences) / len(differences)  # 100 * 0.5 * (0.3 - 0.2)
    assert held == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("losses", [[2.0, 0.9, 0.3], [5.0, 0.02, 0.004]])
def test_ticks_of_the_training_loss_are_plain_numbers(tmp_path, monkeypatch, losses):
    labels = []

    def read(self, *args, **kwargs):
        axis = self.axes[0].yaxis
        self.draw_without_rendering()
        labels.extend(t.get_text() for t in (*axis.get_majorticklabels(), *axis.get_minorticklabels()) if t.get_text())
        args[0].write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", read)
    plots.draw_curves(tmp_path / "a.png", [{"seed": 0, "curve": {"train_loss": losses, "test_accuracy": [1, 2, 3]}}])
    assert len(labels) >= 3 and all(float(label) > 0 and "e" not in label for label in labels)
