"""The wheel: what is installed carries recipes, cards, weights and digits, and works without the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

USE = """
import pathlib, sys
import pizoo
from pizoo.recipes import load_recipe

assert pathlib.Path(pizoo.__file__).is_relative_to(sys.argv[1]), pizoo.__file__
print(*pizoo.list_entries())
print(load_recipe("cifar10_infpi").model.r)
print(pizoo.verify("digits_nngp", device="cpu").status)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_all_of_the_zoo_and_nothing_of_the_clone(wheel):
    names = set(wheel.namelist())
    inside = {path: f"pizoo/_{path}" for path in ("recipes", "model_cards")}
    for folder, installed in inside.items():
        for path in (REPOSITORY / folder).rglob("*.*"):
            assert f"{installed}/{path.relative_to(REPOSITORY / folder).as_posix()}" in names
    assert {name for name in names if name.startswith("pizoo/_recipes/common/")} >= {
        f"pizoo/_recipes/common/{name}.yaml" for name in ("cifar10", "cifar10_training", "digits", "digits_training")
    }
    for kind in ("finpi", "infpi", "mu", "nngp", "ntk"):
        assert f"pizoo/_model_cards/digits_{kind}/model.safetensors" in names
    assert {"pizoo/assets/digits.npz", "pizoo/assets/omniglot_split.json"} <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"pizoo"}


def test_the_wheel_alone_lists_and_verifies(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    wheel.extractall(installed)
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(installed)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entries = sorted(path.name for path in (REPOSITORY / "model_cards").iterdir() if path.is_dir())
    assert done.stdout.splitlines() == [" ".join(entries), "400", "verified"]
