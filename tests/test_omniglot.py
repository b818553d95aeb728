"""The real Omniglot: kernels score what the reference's kernels score, and nets learn to learn on a CPU in seconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import pizoo
from pizoo.data import load_tasks
from pizoo.evaluation.fewshot import TaskAccuracy, split_correct
from pizoo.recipes import load_recipe

DATA = Path(os.environ.get("PIZOO_DATA", ""))
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "omniglot.npz").is_file(), reason="no omniglot.npz in $PIZOO_DATA"),
]
REFERENCE_ERROR = 0.3  # standard error of the reference's numbers, over 4,000 tasks of its own


@pytest.fixture(scope="module")
def pools():
    return load_tasks("omniglot", DATA)


@pytest.mark.parametrize(
    ("entry", "split", "reference"),
    [
        ("omniglot_nngp", "validation_rotated", 44.5),
        ("omniglot_nngp", "test", 41.3),
        ("omniglot_ntk", "validation_rotated", 53.8),
        ("omniglot_ntk", "test", 52.0),
    ],
)
def test_the_kernels_score_what_the_references_do(pools, entry, split, reference):
    recipe = load_recipe(entry)
    found = TaskAccuracy.of(split_correct(recipe.build_model(), pools, recipe.tasks.model_dump(), split, 4000))
    assert abs(found.accuracy - reference) < 3 * (found.standard_error**2 + REFERENCE_ERROR**2) ** 0.5


def test_a_narrow_net_learns_to_learn(pools):
    settings = ("model.width=256", "model.r=50", "train.epochs=2", "train.steps_per_epoch=150", "train.dtype=float32")
    recipe = load_recipe("omniglot_finpi", (*settings, "tasks.validation_tasks=500", "tasks.test_tasks=500"))
    result = pizoo.train(recipe, dataset=pools, device="cpu")
    first, last = (record["validation_accuracy"] for record in result.history)
    assert 50 < first < last and result.results["accuracy"] > 45  # chance is 20, the NNGP is at 44.5 and 41.3
    assert torch.isfinite(next(result.model.parameters())).all()


@pytest.mark.parametrize("entry", ["omniglot_nngp", "omniglot_ntk"])
def test_the_recorded_numbers_are_measured_again(entry):
    report = pizoo.verify(entry, DATA, "cpu")
    assert report.status == "verified", report.reason
