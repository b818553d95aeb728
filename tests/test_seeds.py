"""Several seeds of one recipe, kernel settings chosen on held-out images, and the entries made of both."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from dataclasses import replace

import pytest
import torch

import pizoo
from pizoo import functional
from pizoo.data import load_dataset, split_validation
from pizoo.evaluation.accuracy import accuracy, percent
from pizoo.files import CheckpointError, read_tensors
from pizoo.recipes import RecipeError, load_recipe
from pizoo.training import plan, report, supervised
from pizoo.training.reproduce import add_seeds, reproduce
from pizoo.training.seeds import parse_seeds, run_seeds, train_seeds
from pizoo.training.tune import tune

CPU = torch.device("cpu")
TINY = ("model.r=8", "data.subset=40", "train.epochs=2", "train.batch_size=16")


@pytest.fixture
def recipe():
    return load_recipe("digits_infpi", TINY)


def kernel_recipe(grid: str = "{depth: [1, 2], var_b: [0.0, 1.0], ridge: [0.001, 0.1]}"):
    return load_recipe("digits_nngp", ("data.subset=200", f"tune={{validation: 0.25, grid: {grid}}}"))


# Seeds


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-2", [0, 1, 2]), ("0,3,7", [0, 3, 7]), ("5", [5]), ("4-4", [4]), ("0-1, 9", [0, 1, 9])],
)
def test_seeds_are_written_as_ranges_and_lists(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "2-0", "-1", "0-", "0,,1", "0.5", "0-99999999999", "1,0-2", "0 1"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(ValueError, match=r"seeds is .*(0-2 or 0,3,7|given twice)"):
        parse_seeds(text)


def test_every_seed_is_the_training_of_that_seed_alone(recipe, tmp_path):
    for run in train_seeds(recipe, [3, 1], tmp_path, device=CPU):
        alone = pizoo.train(recipe.with_seed(run.record["seed"]), device=CPU)
        assert run.record["accuracy"] == alone.results["accuracy"] == percent(run.correct)
        assert run.record["curve"]["test_accuracy"] == [r["test_accuracy"] for r in alone.history]
        assert run.outcome.folder == tmp_path / f"seed-{run.record['seed']}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-1", "seed-3"]


def test_seeds_give_a_mean_its_standard_error_and_their_curves(recipe, tmp_path):
    results = run_seeds(recipe, [0, 1, 2], tmp_path, device=CPU)
    assert results == json.loads((tmp_path / "results.json").read_text())
    accuracies = [run["accuracy"] for run in results["seeds"]]
    assert results["mean_accuracy"] == pytest.approx(statistics.mean(accuracies))
    assert results["standard_error"] == pytest.approx(statistics.stdev(accuracies) / 3**0.5)
    assert (results["lowest_accuracy"], results["highest_accuracy"]) == (min(accuracies), max(accuracies))
    assert results["total_wall_seconds"] == pytest.approx(sum(run["wall_seconds"] for run in results["seeds"]))
    for run in results["seeds"]:
        assert 0 < run["train_seconds"] < run["wall_seconds"] and run["hardware"].startswith("CPU")
        assert run["versions"]["torch"] == torch.__version__
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_seeds_go_on_where_they_were(recipe, tmp_path, monkeypatch):
    whole = run_seeds(recipe, [0, 1], tmp_path / "whole", device=CPU)
    real, steps = supervised.Training._step, []

    def interrupted(self, step, *args):
        if self.recipe.train.seed == 1 and step == 4:  # the second epoch of the second seed
            raise KeyboardInterrupt
        return real(self, step, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised.Training, "_step", interrupted)
        run_seeds(recipe, [0, 1], tmp_path / "part", device=CPU)
    assert len(json.loads((tmp_path / "part" / "results.json").read_text())["seeds"]) == 1
    monkeypatch.setattr(supervised.Training, "_step", lambda *args: steps.append(args[1]) or real(*args))
    resumed = run_seeds(recipe, [0, 1], tmp_path / "part", device=CPU)
    assert steps == [3, 4, 5]
    assert [run["curve"] for run in resumed["seeds"]] == [run["curve"] for run in whole["seeds"]]


def test_wall_time_counts_every_session_of_a_training(recipe, tmp_path):
    first = pizoo.train(recipe, tmp_path / "run", device=CPU)
    walls = [record["wall_seconds"] for record in first.history]
    assert all(record["train_seconds"] < record["wall_seconds"] for record in first.history)
    assert sum(walls) < first.results["wall_seconds"]
    (tmp_path / "run" / "results.json").unlink()  # as if stopped before they were written
    again = pizoo.train(recipe, tmp_path / "run", device=CPU)
    assert sum(walls) < again.results["wall_seconds"] < first.results["wall_seconds"] + 5


def test_seeds_of_another_recipe_are_refused_where_a_summary_would_be_overwritten(recipe, tmp_path):
    run_seeds(recipe, [0, 1], tmp_path, device=CPU)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = load_recipe("digits_infpi", (*TINY, "train.lr=0.01"))
    with pytest.raises(CheckpointError, match=r"seed-0 .*train\.lr"):
        run_seeds(other, [2, 3], tmp_path, device=CPU)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(run_seeds(recipe, [2], tmp_path, device=CPU)["seeds"]) == 1  # more of the same are welcome


def test_seeds_are_refused_before_anything_is_trained(recipe, tmp_path):
    pizoo.train(recipe, tmp_path / "single", device=CPU)
    with pytest.raises(CheckpointError, match="single holds a training of its own"):
        run_seeds(recipe, [0, 1], tmp_path / "single", device=CPU)
    with pytest.raises(RecipeError, match=r"data\.split: found 10"):  # the digits have ten splits
        run_seeds(recipe, range(11), tmp_path / "many", device=CPU)
    with pytest.raises(ValueError, match="cifar10_nngp is a kernel, which is not trained: every seed gives the same"):
        run_seeds(load_recipe("cifar10_nngp"), [0, 1], tmp_path / "many", device=CPU)
    assert not (tmp_path / "many").exists()


@pytest.mark.parametrize("lost", [(), ("results.json",), ("seed-0", "seed-1")])
@pytest.mark.parametrize("made", [None, "digits_nngp"])
def test_a_single_training_does_not_overwrite_what_several_seeds_gave(recipe, tmp_path, lost, made):
    run_seeds(recipe, [0, 1], tmp_path / "run", device=CPU)
    for name in lost:  # results come after the first seed, and trainings may have been thrown away
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    held = r"a results\.json of something else" if "seed-0" in lost else r"trainings of several seeds \(seed-0, seed-1"
    with pytest.raises(CheckpointError, match=rf"run holds {held}.*choose another folder"):
        pizoo.train(recipe if made is None else load_recipe(made), tmp_path / "run", device=CPU)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(run_seeds(recipe, [0, 1], tmp_path / "run", device=CPU)["seeds"]) == 2


def test_texts_and_numbers_to_compare_with_may_change_between_sessions(recipe, tmp_path):
    pizoo.train(recipe, tmp_path / "run", device=CPU)
    told = load_recipe("digits_infpi", (*TINY, "description=other", "differs=so", "seeds=3"))
    assert pizoo.train(told, tmp_path / "run", device=CPU).results["accuracy"] > 0
    with pytest.raises(CheckpointError, match="another recipe"):
        pizoo.train(load_recipe("digits_infpi", (*TINY, "train.lr=0.3")), tmp_path / "run", device=CPU)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_training_says_of_which_commit_it_is(tmp_path, monkeypatch):
    """Cards are written into the clone while its entries are made: they are not what decides a number."""
    code = tmp_path / "pizoo" / "training" / "report.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    monkeypatch.setattr(report, "__file__", str(code))
    monkeypatch.delenv("PIZOO_COMMIT", raising=False)
    assert report.commit() is None
    monkeypatch.setenv("PIZOO_COMMIT", "of the copy")
    assert report.commit() == "of the copy"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "model_cards" / "card").write_text("new")
    assert report.commit() == head
    code.write_text("changed = True")
    assert report.commit() == f"{head}-dirty"


# Settings of kernels


def test_the_search_measures_every_setting_on_held_out_training_images():
    recipe = kernel_recipe()
    dataset, normalize = recipe.data.load(), recipe.data.normalize
    found = tune(recipe, dataset, CPU)
    held_out = split_validation(dataset, 0.25)
    x, validation = (normalize(part, torch.float64).flatten(1) for part in (held_out.train_x, held_out.test_x))
    targets = functional.centred_one_hot(held_out.train_y, 10)
    assert (found["training_images"], found["validation_images"], len(found["tried"])) == (150, 50, 8)
    for tried in found["tried"]:
        options = {"depth": tried["depth"], "var_b": tried["var_b"]}
        kernel = functional.nngp(x, x, **options) + tried["ridge"] * torch.eye(150, dtype=torch.float64)
        scores = functional.nngp(validation, x, **options) @ torch.linalg.solve(kernel, targets)
        assert tried["validation_accuracy"] == pytest.approx(accuracy(scores, held_out.test_y))
    best = max(tried["validation_accuracy"] for tried in found["tried"])
    assert found["validation_accuracy"] == best
    assert {**found["settings"], "validation_accuracy": best} in found["tried"]


def test_the_search_does_not_see_the_test_images():
    recipe = kernel_recipe()
    dataset = recipe.data.load()
    flipped = replace(dataset, test_x=dataset.test_x.flip(2), test_y=dataset.test_y.flip(0))
    a, b = tune(recipe, dataset, CPU), tune(recipe, flipped, CPU)
    assert a["tried"] == b["tried"] and a["settings"] == b["settings"]


def test_a_ridge_that_is_too_small_is_passed_over():
    twins = load_dataset("digits", subset=40)
    twins = replace(twins, train_x=twins.train_x.repeat(4, 1, 1, 1), train_y=twins.train_y.repeat(4))
    found = tune(kernel_recipe("{ridge: [1e-30, 0.1]}"), twins, CPU)
    assert found["tried"][0]["validation_accuracy"] is None and found["settings"] == {"ridge": 0.1}
    with pytest.raises(ValueError, match="larger ridge than 1e-30"):
        tune(kernel_recipe("{ridge: [1e-30]}"), twins, CPU)


def test_a_search_is_kept_and_made_again_for_another_grid(tmp_path, monkeypatch):
    recipe = kernel_recipe()
    found = tune(recipe, recipe.data.load(), CPU, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(functional, "solve_ridge", lambda *args: pytest.fail("solved again"))
        assert tune(recipe, recipe.data.load(), CPU, tmp_path) == found
    other = kernel_recipe("{ridge: [0.3]}")
    assert tune(other, other.data.load(), CPU, tmp_path)["settings"] == {"ridge": 0.3}


def test_a_kernel_that_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    recipe = kernel_recipe()
    monkeypatch.setattr(plan, "HEADROOM", 0)
    needed = 2 * 8 * 200**2 + 8 * 200 * 64  # the kernel, its factor, the inputs
    monkeypatch.setattr(plan, "free_memory", lambda device: needed - 1)
    with pytest.raises(
        plan.NotEnoughMemory, match=r"float64 kernel between 200 training images .* data\.subset of less than"
    ):
        pizoo.train(recipe, tmp_path / "run", device=CPU)
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(plan, "free_memory", lambda device: needed)
    assert pizoo.train(recipe, tmp_path / "run", device=CPU).results["accuracy"] > 80


def test_a_kernel_entry_is_reported_as_printed_and_as_tuned(tmp_path):
    recipe = kernel_recipe()
    results = reproduce(recipe, tmp_path / "card", tmp_path / "runs", device=CPU, seeds=[0])
    printed, tuned = (pizoo.load(path) for path in (tmp_path / "card", tmp_path / "card" / "tuned"))
    assert (printed.kernel["depth"], printed.ridge) == (recipe.model.depth, recipe.model.ridge)
    assert {**tuned.kernel, "ridge": tuned.ridge} == {**printed.kernel, **results["tuned"]["settings"]}
    for folder, recorded in ((tmp_path / "card", results), (tmp_path / "card" / "tuned", results["tuned"])):
        report = pizoo.verify(folder, device=CPU)
        assert (report.status, report.measured, report.differing) == ("verified", recorded["accuracy"], 0)
    text = (tmp_path / "card" / "README.md").read_text()
    assert f"gives **{results['tuned']['accuracy']:.2f}** on the test images" in text
    assert 'pizoo.load("digits_nngp/tuned")' in (tmp_path / "card" / "tuned" / "README.md").read_text()
    times = json.loads((tmp_path / "card" / "tuned" / "results.json").read_text())["total_wall_seconds"]
    assert results["total_wall_seconds"] == pytest.approx(
        results["seeds"][0]["wall_seconds"] + results["tuned"]["seconds"] + times
    )


# What an entry records


def test_an_entry_records_which_images_every_seed_classified_correctly(recipe, tmp_path):
    results = reproduce(recipe, tmp_path / "card", tmp_path / "runs", [0, 1], device=CPU)
    found = read_tensors(tmp_path / "card" / "correct.safetensors", results["correct_sha256"])
    assert found.keys() == {"shipped", "seed-0", "seed-1"}
    dataset = recipe.data.load()
    model = pizoo.load(tmp_path / "runs" / "seed-0")
    with torch.no_grad():
        wanted = model(recipe.data.normalize(dataset.test_x)).argmax(1) == dataset.test_y
    assert torch.equal(found["seed-0"], wanted) and torch.equal(found["shipped"], wanted)


def test_seeds_are_added_to_a_card_whose_trainings_are_gone(recipe, tmp_path):
    whole = reproduce(recipe, tmp_path / "whole", tmp_path / "runs", [0, 1, 2], device=CPU)
    card = tmp_path / "card"
    reproduce(recipe, card, tmp_path / "first", [0, 2], device=CPU)
    shutil.rmtree(tmp_path / "first")
    net = (card / "model.safetensors").read_bytes()
    results = add_seeds(recipe, card, tmp_path / "later", [1], device=CPU)
    assert results == json.loads((card / "results.json").read_text())
    assert [(run["seed"], run["curve"]) for run in results["seeds"]] == [
        (r["seed"], r["curve"]) for r in whole["seeds"]
    ]
    for key in ("accuracy", "shipped_seed", "mean_accuracy", "standard_error", "mean_best_epoch_accuracy"):
        assert results[key] == whole[key]
    found, wanted = (read_tensors(folder / "correct.safetensors") for folder in (card, tmp_path / "whole"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert (card / "model.safetensors").read_bytes() == net and pizoo.verify(card, device=CPU).status == "verified"
    assert "mean over 3 splits" in (card / "README.md").read_text()


def test_seeds_that_cannot_be_added_are_refused_before_they_are_trained(recipe, tmp_path):
    reproduce(recipe, tmp_path / "card", tmp_path / "runs", [0], device=CPU)
    before = (tmp_path / "card" / "results.json").read_bytes()
    for added, seeds, error in (
        (recipe, [0, 3], "has 0 of them already"),
        (load_recipe("digits_infpi", (*TINY, "train.lr=0.3")), [3], "card of another recipe"),
        (kernel_recipe(), [3], "digits_nngp is a kernel, which is not trained"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=error):
            add_seeds(added, tmp_path / "card", tmp_path / "later", seeds, device=CPU)
    assert not (tmp_path / "later").exists() and (tmp_path / "card" / "results.json").read_bytes() == before
