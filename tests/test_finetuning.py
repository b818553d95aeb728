"""``benchmarks/finetuning.py``: what is compared is comparable, and nothing is chosen on test images."""

from __future__ import annotations

import sys

import pytest

from pizoo.data import load_dataset
from pizoo.files import read_json
from pizoo.recipes import RecipeError

SUBSET, EPOCHS = 100, 2


@pytest.fixture
def finetuning(load_benchmark):
    return load_benchmark("finetuning")


@pytest.fixture
def compare(finetuning, tmp_path, monkeypatch):
    """Runs the benchmark on digits; gives what the JSON file holds then, and the recipes and data that were trained."""

    def run(source: str = "digits_infpi"):
        trained, real = [], finetuning.train

        def spy(recipe, dataset, **options):
            outcome = real(recipe, dataset=dataset, **options)
            trained.append((recipe, dataset, outcome.results))
            return outcome

        settings = f"--source {source} --target digits --subset {SUBSET} --epochs {EPOCHS} --device cpu"
        places = ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
        monkeypatch.setattr(sys, "argv", ["finetuning.py", *settings.split(), *places])
        with monkeypatch.context() as patched:
            patched.setattr(finetuning, "train", spy)
            finetuning.main()
        return read_json(tmp_path / "found.json")["comparisons"], trained

    return run


def images(x) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def test_contenders_take_the_same_steps_and_rates_are_chosen_on_images_that_are_neither_trained_on_nor_test(
    compare, finetuning, tmp_path
):
    (record,), trained = compare()
    whole = load_dataset("digits", subset=SUBSET)
    choosing = [one for one in trained if len(one[1].train_x) < SUBSET]
    final = [one for one in trained if len(one[1].train_x) == SUBSET]
    for _, dataset, _ in choosing:
        learned, asked = images(dataset.train_x), images(dataset.test_x)
        assert len(asked) == SUBSET * finetuning.VALIDATION and not learned & asked
        assert learned | asked == images(whole.train_x)
        assert not (learned | asked) & images(whole.test_x)
    assert trained.index(final[0]) > 0 and all(images(data.test_x) == images(whole.test_x) for _, data, _ in final)

    for part in (choosing, final):
        assert len({results["history"][-1]["step"] for *_, results in part}) == 1
        assert len({recipe.train.batch_size for recipe, *_ in part}) == 1
    assert record["steps"] == final[0][2]["history"][-1]["step"]

    assert len(final) == 9 and {recipe.train.seed for recipe, *_ in final} == {0, 1, 2}
    for name, found in record["contenders"].items():
        scores = {one["lr"]: one["validation_accuracy"] or 0.0 for one in found["tried"]}
        assert scores[found["lr"]] == max(scores.values())
        theirs = [(recipe, results) for recipe, _, results in final if name in recipe.description]
        assert {recipe.train.lr for recipe, _ in theirs} == {found["lr"]}
        assert [one["accuracy"] for one in found["seeds"]] == [results["accuracy"] for _, results in theirs]

    scratch, tuned, frozen = (record["contenders"][name] for name in ("from scratch", "fine-tuned", "frozen trunk"))
    assert tuned["mean_accuracy"] > scratch["mean_accuracy"] and frozen["mean_accuracy"] > scratch["mean_accuracy"]
    rows, learned = record["source_rows"]["hidden.0"], SUBSET * EPOCHS
    grown = [found["seeds"][0]["rows"]["hidden.0"] for found in (scratch, tuned, frozen)]
    assert grown[1:] == [rows + learned, rows] and grown[0] < rows

    (again,), trained_again = compare()
    assert not trained_again and again["contenders"] == record["contenders"]
    assert (tmp_path / "found.png").stat().st_size


@pytest.mark.parametrize("peak", range(-6, 7))
@pytest.mark.parametrize("chance", [0.0, 10.0])
def test_the_ladder_is_climbed_to_the_best_rate_over_plateaus_and_past_rates_that_diverge(finetuning, peak, chance):
    asked = []

    def score(rung: int) -> float | None:
        asked.append(rung)
        return None if rung > peak + 1 else max(chance, 13.0 - abs(rung - peak))

    tried = finetuning.climbed(score)
    assert len(asked) == len(set(asked)) <= 7  # no rate twice
    assert finetuning.best(tried) == peak and {peak - 1, peak + 1} <= tried.keys()


def test_a_comparison_takes_the_place_of_an_earlier_one_of_the_same_alone(finetuning):
    def record(epochs: int, accuracy: float, subset: int | None = None):
        return {"source": "a", "target": "b", "epochs": epochs, "subset": subset, "accuracy": accuracy}

    before = [record(1, 10.0), record(5, 20.0)]
    assert finetuning.merged(record(5, 30.0), before) == [record(1, 10.0), record(5, 30.0)]
    assert finetuning.merged(record(5, 30.0, 400), before) == [*before, record(5, 30.0, 400)]


@pytest.mark.parametrize("source", ["digits_nngp", "omniglot_mu"])
def test_a_source_that_is_not_trained_on_images_is_refused(compare, source):
    with pytest.raises(RecipeError, match=f"--source is {source}; it must be a net trained on images"):
        compare(source=source)
