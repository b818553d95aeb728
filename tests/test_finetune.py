"""Fine-tuning: a trained trunk under a fresh read-out, growing on from its rows, with layers that stay as they are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import pizoo
from pizoo import zoo
from pizoo.data import keep_classes, load_dataset
from pizoo.files import CheckpointError
from pizoo.recipes import RecipeError, load_recipe
from pizoo.training import supervised
from pizoo.training.finetune import initial_rows, source_net
from pizoo.training.plan import plan

CPU = torch.device("cpu")
N, EPOCHS = 96, 2
SHORT = (f"data.subset={N}", f"train.epochs={EPOCHS}", "train.batch_size=16", "data.keep=[7, 3, 1]", "data.classes=3")
NETS = ("digits_infpi", "digits_finpi", "digits_mu")


def finetuned(entry: str, *more: str, source: str | None = None):
    """A recipe that goes on from an entry of the zoo on three of its classes."""
    return load_recipe(entry, [*SHORT, f"train.init_from={source or entry}", *more])


def trunk(model) -> dict[str, torch.Tensor]:
    readout = next(name for name, module in model.named_modules() if module is model.readout)
    return {name: value for name, value in model.state_dict().items() if not name.startswith(f"{readout}.")}


@pytest.mark.parametrize("entry", NETS)
def test_a_fine_tuning_starts_from_the_sources_trunk_and_a_fresh_read_out(entry):
    recipe = finetuned(entry, "train.lr=1e-6", "train.epochs=1", "train.freeze=[input, hidden]")
    model, source = pizoo.train(recipe, device=CPU).model, pizoo.load(entry)
    for name, value in trunk(source).items():
        assert torch.equal(trunk(model)[name], value), name
    assert model.num_classes == 3
    fresh = recipe.build_model().state_dict()
    name = "output.B" if entry == "digits_infpi" else f"layers.{len(model.layers) - 1}.weight"
    torch.testing.assert_close(model.state_dict()[name][: len(fresh[name])], fresh[name], rtol=1e-3, atol=1e-3)


def test_an_infinite_net_grows_on_from_its_rows():
    source, outcome = pizoo.load("digits_infpi"), pizoo.train(finetuned("digits_infpi"), device=CPU)
    before, after = source.hidden[0], outcome.model.hidden[0]
    assert after.count == before.count + N * EPOCHS and after.A.dtype == before.A.dtype
    assert torch.equal(after.A[: before.count], before.A) and torch.equal(after.B[: before.count], before.B)
    assert outcome.model.output.count == source.r + N * EPOCHS  # a fresh read-out, grown in the same steps


@pytest.mark.parametrize("entry", NETS)
@pytest.mark.parametrize("engine", [False, True])
def test_frozen_layers_stay_as_they_are_to_the_bit(entry, engine):
    source = pizoo.load(entry)
    model = pizoo.train(finetuned(entry, "train.freeze=[input]"), device=CPU, engine=engine).model
    state = source.state_dict()
    prefix = "input." if entry == "digits_infpi" else "layers.0."
    for name, value in model.state_dict().items():
        if name.startswith(prefix):
            assert torch.equal(value, state[name]), name
        elif name.endswith(".bias"):
            assert not torch.equal(value, torch.zeros_like(value)), name


def test_a_frozen_growing_layer_does_not_grow():
    recipe = finetuned("digits_infpi", "train.freeze=[hidden]", "train.weight_decay=0.01")
    source, model = pizoo.load("digits_infpi"), pizoo.train(recipe, device=CPU).model
    for part in ("A", "B", "amult", "bias"):
        assert torch.equal(getattr(model.hidden[0], part), getattr(source.hidden[0], part))
    assert not torch.equal(model.input.A, source.input.A)


def test_a_good_trunk_learns_three_classes_faster_than_a_fresh_one():
    settings = ("train.epochs=1", "data.subset=32", "train.lr=0.02")
    tuned = pizoo.train(finetuned("digits_infpi", *settings), device=CPU).results["accuracy"]
    fresh = pizoo.train(load_recipe("digits_infpi", [*SHORT, *settings]), device=CPU).results["accuracy"]
    assert tuned > fresh + 2


def test_a_training_folder_is_a_source_too_and_its_classes_are_forgotten(tmp_path):
    first = pizoo.train(
        load_recipe("digits_infpi", ["model.r=16", "data.subset=64", "train.epochs=1"]), tmp_path, device=CPU
    )
    outcome = pizoo.train(finetuned("digits_infpi", "model.r=16", source=str(tmp_path)), device=CPU)
    assert outcome.model.hidden[0].count == first.model.hidden[0].count + N * EPOCHS
    assert outcome.model.num_classes == 3


def test_an_interrupted_fine_tuning_goes_on_bit_for_bit(tmp_path, monkeypatch):
    recipe = finetuned("digits_infpi", "train.freeze=[input]")
    whole = pizoo.train(recipe, tmp_path / "whole", device=CPU)
    real = supervised.Training._epoch

    def dies(self, epoch, bar):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(self, epoch, bar)

    monkeypatch.setattr(supervised.Training, "_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        pizoo.train(recipe, tmp_path / "run", device=CPU)
    monkeypatch.undo()
    resumed = pizoo.train(recipe, tmp_path / "run", device=CPU)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
    shutil.rmtree(tmp_path / "whole")
    loaded = pizoo.load(tmp_path / "run")  # which needs no source any more
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(CheckpointError, match=r"train\.init_from is 'digits_infpi' there, 'elsewhere' here"):
        pizoo.train(finetuned("digits_infpi", "train.freeze=[input]", source="elsewhere"), tmp_path / "run", device=CPU)


def test_the_plan_counts_the_sources_rows_and_leaves_out_frozen_layers():
    recipe = finetuned("digits_infpi")
    rows = pizoo.load("digits_infpi").hidden[0].count
    planned = plan(recipe, N, CPU, first=initial_rows(source_net(recipe)))
    assert planned.rows == rows + N * EPOCHS
    frozen = finetuned("digits_infpi", "train.freeze=[readout]")
    less = plan(frozen, N, CPU, first=initial_rows(source_net(frozen)))
    appended = N * EPOCHS * (2 * (64 + 3) + 4)  # of the read-out, float16 with float32 amult
    assert planned.row_bytes - less.row_bytes == appended


@pytest.mark.parametrize(
    ("recipe", "source", "message"),
    [
        ("digits_infpi", "digits_mu", "digits_mu is of class MuMLP; model.kind infpi is of class InfPiMLP"),
        ("digits_finpi", "digits_finpi", r"width is 256 there and 128 here; r is 64 there and 32 here"),
        ("digits_infpi", "digits_nngp", "digits_nngp is of class NNGPRegressor"),
    ],
)
def test_a_source_with_another_trunk_is_refused_by_what_differs(recipe, source, message):
    sizes = ["model.width=128", "model.r=32"] if recipe == "digits_finpi" else []
    with pytest.raises(RecipeError, match=rf"train\.init_from: .*{message}"):
        pizoo.train(finetuned(recipe, *sizes, source=source), device=CPU)


@pytest.mark.parametrize("entry", ["digits_infpi", "digits_mu"])
def test_a_net_with_nothing_left_to_train_is_refused(entry):
    recipe = load_recipe(entry, [*SHORT, "model.hidden_layers=1", "train.freeze=[input, readout]"])
    with pytest.raises(RecipeError, match=r"train\.freeze: found \['input', 'readout'\]; this net has no other layers"):
        pizoo.train(recipe, device=CPU)


def test_a_source_that_is_not_there_is_refused_by_name():
    with pytest.raises(zoo.UnknownEntryError, match="did you mean 'digits_infpi'"):
        pizoo.train(finetuned("digits_infpi", source="digits_infp"), device=CPU)
    with pytest.raises(zoo.WeightsNotFoundError, match="no weights of 'imagenet32_mu' exist"):
        pizoo.train(finetuned("digits_mu", source="imagenet32_mu"), device=CPU)


def test_the_command_line_fine_tunes(pizoo_command, tmp_path):
    arguments = [a for override in SHORT for a in ("--set", override)]
    found = pizoo_command(
        *(
            "train",
            "digits_infpi",
            "--init-from",
            "digits_infpi",
            "--freeze",
            "input,hidden",
            "--out",
            tmp_path / "run",
        ),
        *arguments,
    )
    assert found.code == 0, found.err
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (recipe["train"]["init_from"], recipe["train"]["freeze"]) == ("digits_infpi", ["input", "hidden"])
    model, dataset = pizoo.load(tmp_path / "run"), keep_classes(load_dataset("digits"), [7, 3, 1])
    assert pizoo.evaluate(model)["images"] == len(dataset.test_y)
    dry = pizoo_command("train", "digits_infpi", "--init-from", "digits_infpi", "--dry-run", *arguments)
    rows = pizoo.load("digits_infpi").hidden[0].count + N * EPOCHS
    assert dry.code == 0 and f"{rows:,}" in dry.out
    wrong = pizoo_command("train", "digits_infpi", "--freeze", "first")
    assert wrong.code == 2 and "train.freeze.0: found 'first'" in wrong.err
