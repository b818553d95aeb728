"""CIFAR-10 itself: a short training on the real images, where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import pizoo
from pizoo.recipes import load_recipe

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (Path(os.environ.get("PIZOO_DATA", "")) / "cifar10.npz").is_file(), reason="no cifar10.npz in $PIZOO_DATA"
    ),
]

N = 200
OVERRIDES = ("model.r=20", f"data.subset={N}", "train.epochs=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    return pizoo.train("cifar10_infpi", folder, overrides=OVERRIDES, device="cpu")


def test_one_epoch_on_200_images_is_better_than_chance(trained):
    assert trained.results["accuracy"] > 12  # chance is 10 ± 0.3
    assert trained.history[0]["train_loss"] < 10


def test_it_has_appended_a_row_per_image_in_float16(trained):
    initial = load_recipe("cifar10_infpi", OVERRIDES).build_model()
    for name, layer in trained.model.growing_layers.items():
        assert layer.count == initial.growing_layers[name].count + N
        assert layer.A.dtype == layer.B.dtype == torch.float16
        assert layer.amult.dtype == torch.float32
    assert trained.model.input.A.dtype == torch.float32


def test_its_checkpoint_evaluates_and_verifies_as_recorded(trained):
    measured = pizoo.evaluate(trained.folder)
    assert measured["accuracy"] == trained.results["accuracy"] and measured["images"] == 10_000
    report = pizoo.verify(trained.folder, device="cpu")
    # Overrides make another net than the published one.
    assert (report.status, report.reproduction, report.published) == ("verified", "no published number", None)


@pytest.mark.parametrize("entry", ["cifar10_mu", "cifar10_finpi", "cifar10_infpi"])
def test_what_ships_scores_on_the_first_thousand_test_images_what_is_recorded_of_them(entry):
    report = pizoo.verify(entry, device="cpu", images=1000)
    assert report.status == "verified" and report.measured == pytest.approx(60, abs=5)
