"""``benchmarks/eight_bit.py``: a training in int8 is compared with the card's of the same seed, on the same test images."""

from __future__ import annotations

import sys

import pytest

from pizoo import zoo
from pizoo.cards.kinds import read
from pizoo.checkpoint import seed_key
from pizoo.files import read_json
from pizoo.training.seeds import SeedRun

ENTRY = "digits_infpi"


@pytest.fixture
def benchmark_of(load_benchmark, monkeypatch, tmp_path):
    """Run the benchmark on seeds whose trainings are told: as the card's, but for so many images more that are wrong."""
    eight_bit, card, path = load_benchmark("eight_bit"), read(zoo.card(ENTRY)), tmp_path / "found.json"

    def run(more_wrong: dict[int, int]) -> dict:
        def trained(recipe, seeds, *_, **__):
            assert recipe.train.dtype == "int8"
            for seed in seeds:
                right = card.correct[seed_key(seed)].clone()
                right[right.nonzero().flatten()[: more_wrong[seed]]] = False
                record = next(record for record in card.seeds if record["seed"] == seed)
                yield SeedRun({**record, "accuracy": 100 * right.double().mean().item()}, right, None)

        monkeypatch.setattr(eight_bit, "train_seeds", trained)
        seeds = [str(seed) for seed in more_wrong]
        words = ["--entry", ENTRY, "--seeds", *seeds, "--runs", str(tmp_path), "--json", str(path)]
        monkeypatch.setattr(sys, "argv", ["eight_bit.py", *words])
        eight_bit.main()
        return read_json(path)

    return run


def test_a_seed_in_int8_is_compared_with_the_cards_of_that_seed(benchmark_of, capsys):
    (found,) = benchmark_of({1: 9})["seeds"]
    away = found["difference"]
    assert away["points"] == pytest.approx(-100 * 9 / 449) and away["low"] < away["points"] < away["high"] < 0
    assert found["int8"]["accuracy"] == pytest.approx(found["float16"]["accuracy"] + away["points"])
    assert "mean difference -2.00" in capsys.readouterr().out


def test_seeds_of_several_calls_stand_in_one_file_each_once(benchmark_of, tmp_path, capsys):
    benchmark_of({2: 0})
    benchmark_of({0: 9})
    found = benchmark_of({2: 3})["seeds"]
    assert [seed["seed"] for seed in found] == [0, 2]
    assert [round(seed["difference"]["points"] * 449 / 100) for seed in found] == [-9, -3]
    assert "mean difference -1.34 ± 0.67" in capsys.readouterr().out
    assert (tmp_path / "found.png").stat().st_size > 0
