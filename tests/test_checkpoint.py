"""Checkpoints: what is loaded is what was saved, to the bit; whatever interrupts a save, the epochs before it are there."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pizoo
from pizoo import checkpoint, segments, stored
from pizoo.config import complete, config_digest
from pizoo.files import CheckpointError, sha256, write_atomically, write_json, write_tensors
from pizoo.models import FinPiMLP, InfPiMLP, MuMLP, NNGPRegressor, NTKRegressor
from pizoo.optim import PiSGD, param_groups
from pizoo.recipes import load_recipe
from pizoo.training import supervised
from pizoo.training.folder import training_lock
from pizoo.training.report import logging_to
from pizoo.training.state import Behind

EPOCHS, N = 3, 40
TINY = (f"data.subset={N}", f"train.epochs={EPOCHS}", "train.batch_size=16", "train.lr=0.1")
RECIPES = {
    "infpi": ("digits_infpi", (*TINY, "model.r=8", "train.dtype=float32", "train.weight_decay=0.01")),
    "float16": ("digits_infpi", (*TINY, "model.r=8", "train.dtype=float16")),
    "int8": ("digits_infpi", (*TINY, "model.r=8", "train.dtype=int8", "train.weight_decay=0.01")),
    "momentum": (
        "digits_infpi",
        (
            *TINY,
            "model.r=8",
            "train.momentum=0.9",
            "train.dampening=0.1",
            "train.weight_decay=0.01",
            "train.apply_lr_mult_to_wd=true",
        ),
    ),
    "finpi": ("digits_finpi", (*TINY, "model.r=8", "model.width=16", "train.momentum=0.9")),
}
GROWING = ("infpi", "float16", "int8", "momentum")


class Stop(Exception):
    """What interrupts a training here: none of the package's own errors."""


def recipe(kind: str, *more: str):
    entry, overrides = RECIPES[kind]
    return load_recipe(entry, (*overrides, *more))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal to the bit, dtypes included."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def flip_bit(path: Path, position: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_built(path: Path, change) -> None:
    """Change what a config.json says builds the net, as one that wrote it would: with a digest that fits."""

    def change_and_sign(config):
        change(config["pizoo"])
        config["pizoo"]["sha256"] = config_digest(config)

    edit_json(path, change_and_sign)


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Kind -> (folder of a finished training, state of its net after each epoch)."""
    made = {}
    save = segments.save_epoch
    for kind in RECIPES:
        states = []

        def save_and_keep(folder, model, *args, states=states, **kwargs):
            states.append(snapshot(model))
            save(folder, model, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "save_epoch", save_and_keep)
            folder = tmp_path_factory.mktemp(kind)
            pizoo.train(recipe(kind), folder, device="cpu")
        made[kind] = (folder, states)
    return made


@pytest.fixture
def training(finished, tmp_path):
    """A copy of the finished training of digits_infpi, to be damaged."""
    return Path(shutil.copytree(finished["infpi"][0], tmp_path / "run"))


@pytest.fixture
def shipped(tmp_path):
    """A shipped infinite net, to be damaged."""
    return ship(InfPiMLP(d_in=6, d_out=3, r=4), tmp_path / "shipped")


def ship(model: nn.Module, folder: Path) -> Path:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        checkpoint.save(folder, model, {"note": "mine"}, {"x": x, "logits": model.eval()(x)})
    return folder


# Shipped nets


def grown(rows_dtype: torch.dtype = torch.float16) -> InfPiMLP:
    """A net after a few steps: short rows, a decay factor that is not 1."""
    torch.manual_seed(0)
    model = InfPiMLP(d_in=6, d_out=3, r=4, hidden_layers=3, bias_alpha=0.5, layernorm=True, rows_dtype=rows_dtype)
    optimizer = PiSGD(param_groups(model, lr=0.5, weight_decay=0.1), lr=0.5)
    for _ in range(3):
        nn.functional.cross_entropy(model(torch.randn(7, 6)), torch.arange(7) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    "make",
    [
        grown,
        lambda: grown(torch.int8),
        lambda: FinPiMLP(d_in=6, d_out=3, width=9, r=4, last_bias_alpha=0.0),
        lambda: MuMLP(d_in=6, d_out=3, width=9, hidden_layers=1, bias_alpha=0.0),
    ],
    ids=["InfPiMLP", "InfPiMLP of int8", "FinPiMLP", "MuMLP"],
)
def test_a_shipped_net_comes_back_to_the_bit(make, tmp_path):
    model = make().eval()
    x = torch.randn(20, 6)
    loaded, config = checkpoint.load(ship(model, tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    assert_same(loaded.state_dict(), model.state_dict())
    # A net that was trained multiplies its decay factor in after the sum over rows, a loaded one before.
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-7)
    assert torch.equal(loaded(x), checkpoint.load(tmp_path)[0](x))
    assert config["note"] == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "probe.safetensors"]
    probe = load_file(tmp_path / "probe.safetensors")
    torch.testing.assert_close(loaded(probe["x"]), probe["logits"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [NNGPRegressor, NTKRegressor])
def test_a_shipped_regressor_comes_back_and_predicts_from_its_own_training_inputs_only(kind, tmp_path):
    train_x, x = torch.randn(12, 6, dtype=torch.float64), torch.randn(5, 6)
    model = kind(d_in=6, d_out=3, depth=1, var_b=0.5).fit(train_x, torch.arange(12) % 3)
    loaded, _ = checkpoint.load(ship(model, tmp_path))
    assert_same(loaded.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match="attach"):
        loaded(x)
    with pytest.raises(ValueError, match="fingerprint"):
        loaded.attach(train_x.flip(0))
    torch.testing.assert_close(loaded.attach(train_x)(x), model(x), rtol=1e-12, atol=1e-14)


def test_dtype_and_device_are_the_callers_where_given(tmp_path):
    ship(grown(), tmp_path)
    as_stored, _ = checkpoint.load(tmp_path)
    assert as_stored.output.A.dtype == torch.float16 and as_stored.input.A.dtype == torch.float32
    wide, _ = checkpoint.load(tmp_path, device="cpu", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert torch.equal(wide.output.A, as_stored.output.A.double())


def test_int8_rows_load_as_floats_of_the_same_function(finished, monkeypatch):
    monkeypatch.setattr(stored, "READ_BYTES", 100)  # a few rows at once
    folder, _ = finished["int8"]
    as_stored, floats = (pizoo.load(folder, dtype=dtype) for dtype in (None, torch.float32))
    assert (as_stored.output.A.dtype, floats.output.A.dtype, floats.output.bmult) == (torch.int8, torch.float32, None)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(floats(x), as_stored(x), rtol=1e-5, atol=1e-6)


def test_shipping_again_replaces_the_net(tmp_path):
    ship(MuMLP(d_in=6, d_out=3, width=9), tmp_path)
    second = MuMLP(d_in=6, d_out=3, width=5)
    assert_same(checkpoint.load(ship(second, tmp_path))[0].state_dict(), second.state_dict())


# Training checkpoints


@pytest.mark.parametrize("kind", GROWING)
def test_every_epoch_of_a_growing_net_loads_as_it_was(finished, kind):
    folder, states = finished[kind]
    assert len(states) == EPOCHS
    for epoch, state in enumerate(states, start=1):
        model, config = checkpoint.load(folder, epoch)
        assert_same(model.state_dict(), state)
        assert config["recipe"] == recipe(kind).to_dict()
    assert_same(checkpoint.load(folder)[0].state_dict(), states[-1])


@pytest.mark.parametrize("kind", GROWING)
def test_an_epoch_writes_its_own_rows_and_no_others(finished, kind):
    folder, states = finished[kind]
    for epoch in range(1, EPOCHS + 1):
        segment = load_file(folder / f"rows-{epoch:05d}.safetensors")
        assert segment.keys() == {f"{layer}.{part}" for layer in ("hidden.0", "output") for part in "AB"}
        assert {len(tensor) for tensor in segment.values()} == {N}
        numbers = sum(tensor.numel() * tensor.element_size() for tensor in segment.values())
        assert (folder / f"rows-{epoch:05d}.safetensors").stat().st_size < numbers + 1000
        for name, tensor in segment.items():
            assert torch.equal(states[-1][name][-N * (EPOCHS - epoch + 1) :][:N], tensor)


def test_segments_and_states_are_never_written_again(tmp_path):
    """Each file is as it was, bytes and time, when all later epochs have been added."""
    seen: dict[str, tuple[int, str]] = {}
    save = segments.save_epoch

    def save_and_look(folder, model, record, optimizer, keep, chosen, submit):
        save(folder, model, record, optimizer, keep, chosen)
        for path in folder.glob("*.safetensors"):
            now = (path.stat().st_mtime_ns, sha256(path))
            assert seen.setdefault(path.name, now) == now, path.name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "save_epoch", save_and_look)
        pizoo.train(recipe("momentum"), tmp_path, device="cpu")
    assert len(seen) == 1 + 2 * EPOCHS


def test_momentum_moves_the_multipliers_of_old_rows_and_every_epoch_remembers_its_own(finished):
    _, states = finished["momentum"]
    first, last = states[0]["output.amult"], states[-1]["output.amult"][: len(states[0]["output.amult"])]
    assert not torch.isclose(first, last).any()


def test_a_finite_net_keeps_its_last_epoch_and_the_records_of_all(finished):
    folder, states = finished["finpi"]
    assert [path.name for path in folder.glob("*.safetensors")] == [f"state-{EPOCHS:05d}.safetensors"]
    assert_same(checkpoint.load(folder)[0].state_dict(), states[-1])
    assert [record["epoch"] for record in segments.read_manifest(folder)["epochs"]] == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"holds epoch 3 alone; epoch=2 is not there"):
        checkpoint.load(folder, epoch=2)


@pytest.mark.parametrize("epoch", [0, EPOCHS + 1, -1])
def test_an_epoch_that_does_not_exist_is_refused_with_those_that_do(training, epoch):
    with pytest.raises(CheckpointError, match=rf"holds epochs 1 to {EPOCHS}; epoch={epoch} is not there"):
        checkpoint.load(training, epoch=epoch)


def test_a_shipped_net_has_no_epochs(shipped):
    with pytest.raises(CheckpointError, match="one net, not epochs"):
        checkpoint.load(shipped, epoch=1)


# Damage


def damage(name: str, folder: Path) -> None:
    """Do to a checkpoint what ``name`` says."""
    what, _, file = name.partition(" ")
    path = folder / file
    match what:
        case "truncate":
            path.write_bytes(path.read_bytes()[:-100])
        case "empty":
            path.write_bytes(b"")
        case "flip":
            flip_bit(path, path.stat().st_size // 2)
        case "remove":
            path.unlink()
        case "lfs":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
        case "format":
            edit_json(path, lambda value: value.get("pizoo", value).update(format=2))
        case "list":
            path.write_text("[1, 2]")
        case "r":
            edit_built(path, lambda built: built["hparams"].update(r=5))
        case "argument":
            edit_built(path, lambda built: built["hparams"].update(depth=5))
        case "negative":
            edit_built(path, lambda built: built["hparams"].update(r=-1))
        case "alpha":
            edit_json(path, lambda value: value["pizoo"]["hparams"].update(bias_alpha=0.26))
        case "scale":
            edit_json(path, lambda value: value["recipe"]["data"].update(scale=15.0))
        case "split":
            edit_json(path, lambda value: value["recipe"]["data"].update(split=1))
        case "rows":
            edit_json(path, lambda value: value["pizoo"].update(rows_dtype="float64"))
        case "unsigned":
            edit_json(path, lambda value: value.get("pizoo", value).pop("sha256"))
        case "epoch":
            edit_json(path, lambda value: value["epochs"][2].update(epoch=4))
        case "held":
            edit_json(path, lambda value: value["segments"][3]["rows"].update(output=[88, 129]))
        case "class":
            described = {"class": "FinPiMLP", "hparams": {"d_in": 6, "d_out": 3, "width": 9, "r": 4}}
            edit_built(path, lambda built: built.update(described))
        case "unknown":
            edit_built(path, lambda built: built.update({"class": "ResNet"}))
        case "code":
            edit_built(path, lambda built: built.update({"class": "__import__"}))
        case "dtype":
            edit_built(path, lambda built: built.update(rows_dtype="load"))
        case "pickle":
            path.write_bytes(pickle.dumps(Trap(str(folder / "executed"))))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


SHIPPED_DAMAGE = {
    "truncate model.safetensors": "damaged",
    "empty model.safetensors": "damaged",
    "flip model.safetensors": r"model\.safetensors has SHA-256",
    "remove model.safetensors": r"model\.safetensors is missing",
    "lfs model.safetensors": r"git lfs pull",
    "pickle model.safetensors": "damaged",
    "remove config.json": r"config\.json does not exist",
    "truncate config.json": r"config\.json is not valid JSON",
    "empty config.json": r"config\.json is not valid JSON",
    "format config.json": "has format 2; this version of pizoo reads format 1",
    "list config.json": "has format None",
    "r config.json": r"does not hold what its config\.json says.*\[M, 5\]",
    "argument config.json": "hyper-parameters do not fit InfPiMLP.*depth",
    "negative config.json": "hyper-parameters do not fit InfPiMLP.*r is -1",
    "class config.json": r"does not hold what its config\.json says.*missing keys",
    "unknown config.json": "of a 'ResNet'; this version of pizoo knows InfPiMLP",
    "code config.json": "of a '__import__'",
    "dtype config.json": "damaged|do not fit",
    "alpha config.json": r"config\.json: its class, hparams, rows_dtype or recipe\.data are not those it was written with",
    "rows config.json": "are not those it was written with",
    "unsigned config.json": "has no 'sha256': it is damaged",
}


@pytest.mark.parametrize("name", SHIPPED_DAMAGE)
def test_a_damaged_shipped_net_is_refused_and_the_message_names_what_is_wrong(shipped, name):
    damage(name, shipped)
    with pytest.raises(CheckpointError, match=SHIPPED_DAMAGE[name]) as caught:
        checkpoint.load(shipped)
    assert str(shipped) in str(caught.value) or "config" in name
    assert not (shipped / "executed").exists(), "loading ran what was in the file"


TRAINING_DAMAGE = {
    "truncate rows-00001.safetensors": r"rows-00001\.safetensors has SHA-256",
    "flip rows-00002.safetensors": r"rows-00002\.safetensors has SHA-256",
    "flip state-00003.safetensors": r"state-00003\.safetensors has SHA-256",
    "remove rows-00000.safetensors": r"rows-00000\.safetensors is missing",
    "remove state-00003.safetensors": r"state-00003\.safetensors is missing",
    "lfs rows-00001.safetensors": r"git lfs pull",
    "pickle state-00003.safetensors": r"SHA-256",
    "remove checkpoint.json": r"model\.safetensors is missing",
    "truncate checkpoint.json": r"checkpoint\.json is not valid JSON",
    "format checkpoint.json": "has format 2; this version of pizoo reads format 1",
    "list checkpoint.json": "has format None",
    "remove config.json": r"config\.json does not exist",
    "r config.json": r"config\.json is not the one checkpoint\.json was written with",
    "alpha config.json": "are not those it was written with",
    "scale config.json": "are not those it was written with",
    "split config.json": "are not those it was written with",
    "epoch checkpoint.json": r"checkpoint\.json is not as it was written",
    "held checkpoint.json": r"checkpoint\.json is not as it was written",
    "unsigned checkpoint.json": "has no 'sha256': it is damaged",
}


@pytest.mark.parametrize("name", TRAINING_DAMAGE)
def test_a_damaged_training_is_refused_and_the_message_names_what_is_wrong(training, name):
    damage(name, training)
    with pytest.raises(CheckpointError, match=TRAINING_DAMAGE[name]):
        checkpoint.load(training)
    assert not (training / "executed").exists(), "loading ran what was in the file"


def test_damage_to_an_epoch_leaves_those_before_it(training, finished):
    damage("flip rows-00003.safetensors", training)
    damage("remove state-00002.safetensors", training)
    assert_same(checkpoint.load(training, epoch=1)[0].state_dict(), finished["infpi"][1][0])
    with pytest.raises(CheckpointError):
        checkpoint.load(training, epoch=2)


def test_no_flipped_bit_of_a_tensor_file_goes_unseen(training, shipped):
    rng = random.Random(0)
    for folder in (training, shipped):
        for path in folder.glob("*.safetensors"):
            if path.name in ("probe.safetensors", "state-00001.safetensors", "state-00002.safetensors"):
                continue
            before = path.read_bytes()
            for _ in range(10):
                flip_bit(path, rng.randrange(len(before)), rng.randrange(8))
                with pytest.raises(CheckpointError):
                    checkpoint.load(folder)
                path.write_bytes(before)
            checkpoint.load(folder)


def test_flipped_bits_in_json_are_refused_as_damage_or_leave_the_net_what_it_was(training, shipped):
    rng = random.Random(0)
    refused = 0
    for path in (training / "config.json", training / "checkpoint.json", shipped / "config.json"):
        before, (whole, config) = path.read_bytes(), checkpoint.load(path.parent)
        for _ in range(150):
            flip_bit(path, rng.randrange(len(before)), rng.randrange(7))
            try:
                model, found = checkpoint.load(path.parent)
            except CheckpointError:
                refused += 1
            else:
                assert_same(model.state_dict(), whole.state_dict())
                assert model.hparams == whole.hparams
                for key in ("scale", "mean", "std") if "recipe" in config else ():
                    assert found["recipe"]["data"][key] == config["recipe"]["data"][key]
            path.write_bytes(before)
    assert refused > 50


def test_what_does_not_decide_the_net_may_be_edited(training):
    def edit(config):
        config["class_names"][0] = "nought"
        config["recipe"].update(description="edited", published={"accuracy": 1.0, "source": "me", "protocol": "mine"})
        config["recipe"]["data"]["path"] = "/elsewhere"

    edit_json(training / "config.json", edit)
    assert checkpoint.load(training)[1]["class_names"][0] == "nought"


def test_the_decay_factor_is_under_the_states_digest(finished):
    folder, _ = finished["infpi"]
    state = load_file(folder / "state-00003.safetensors")
    for layer in ("hidden.0", "output"):
        decay = state[f"decay/{layer}"]
        assert decay.dtype == torch.float64 and 0.98 < decay.item() < 1
        assert segments.read_epoch(folder).state.stored[layer][1] == decay.item()
    assert "decay" not in (folder / "checkpoint.json").read_text()


def test_pickled_weights_beside_the_checkpoint_are_not_looked_at(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(str(tmp_path / "executed"))))
    (tmp_path / "config.json").write_text(json.dumps(complete({}, MuMLP(6, 3, width=4), {})))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "executed").exists()


# Two processes, a power cut


HOLD = """
import sys
from pathlib import Path
from pizoo.training.folder import training_lock

with training_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_training_folder_belongs_to_one_process_until_that_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused = pytest.raises(CheckpointError, match=r"run is in use: another process trains there")
        with refused, training_lock(tmp_path / "run"):
            pass
        other.kill()
    with training_lock(tmp_path / "run"), training_lock(None):
        pass


def test_a_rename_is_flushed_with_the_folder_it_was_made_in(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor, real=os.fsync):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "a.json").exists()))
        real(descriptor)

    monkeypatch.setattr("pizoo.files.os.fsync", fsync)
    write_json(tmp_path / "a.json", 1)
    assert flushed == [(str(tmp_path / ".a.json.tmp"), False), (str(tmp_path), True)]


def test_logging_to_a_folder_leaves_the_level_as_it_was(tmp_path):
    log = logging.getLogger("pizoo")
    before = log.level
    with logging_to(tmp_path):
        assert log.level == logging.INFO
    assert log.level == before != logging.INFO


# A full disk


@pytest.mark.parametrize("function", ["save_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("kind", ["infpi", "finpi"])
def test_a_disk_that_fills_up_while_training_keeps_the_epochs_before(finished, tmp_path, kind, function):
    real = {"save_file": save_file, "os.fsync": os.fsync, "os.replace": os.replace}[function]

    def fails_in_the_second_epoch(*args):
        if (tmp_path / "checkpoint.json").exists() and segments.read_manifest(tmp_path)["epochs"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"pizoo.files.{function}", fails_in_the_second_epoch)
        with pytest.raises(CheckpointError, match=r"no space left on the disk to write .*; what was saved before is"):
            pizoo.train(recipe(kind), tmp_path, device="cpu")
    assert temporaries(tmp_path) == []
    states = finished[kind][1]
    assert_same(checkpoint.load(tmp_path)[0].state_dict(), states[0])
    assert_same(pizoo.train(recipe(kind), tmp_path, device="cpu").model.state_dict(), states[-1])


@pytest.mark.parametrize("files_that_fit", [0, 1, 2])
def test_a_disk_that_fills_up_while_shipping_leaves_the_net_shipped_before(tmp_path, monkeypatch, files_that_fit):
    first = MuMLP(d_in=6, d_out=3, width=9)
    ship(first, tmp_path)
    done = 0

    def fsync(fd, real=os.fsync):
        nonlocal done
        if done == files_that_fit:
            raise OSError(errno.ENOSPC, "No space left on device")
        done += 1
        real(fd)

    monkeypatch.setattr("pizoo.files.os.fsync", fsync)
    with pytest.raises(CheckpointError, match="no space left"):
        ship(MuMLP(d_in=6, d_out=3, width=9), tmp_path)
    assert temporaries(tmp_path) == []
    assert_same(checkpoint.load(tmp_path)[0].state_dict(), first.state_dict())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, and a function that gives it another size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        if shutil.which("mount") is None:
            return False
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=64k"):
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield disk, lambda size: mount("remount", f"size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs is Linux's")
def test_a_disk_that_is_really_full_is_told_and_training_goes_on_when_there_is_room_again(small_disk, tmp_path, capfd):
    disk, resize = small_disk
    tiny = recipe("infpi", "train.epochs=30")
    with pytest.raises(CheckpointError, match=r"no space left on the disk to write .*; what was saved before is"):
        pizoo.train(tiny, disk / "run", device="cpu")
    assert "Traceback" not in capfd.readouterr().err
    assert temporaries(disk) == []
    epoch = segments.read_manifest(disk / "run")["epochs"][-1]["epoch"]
    assert 1 <= epoch < 30
    whole = pizoo.train(tiny, tmp_path / "whole", device="cpu")
    assert_same(
        checkpoint.load(disk / "run")[0].state_dict(), checkpoint.load(tmp_path / "whole", epoch)[0].state_dict()
    )
    assert resize("4m")
    assert_same(pizoo.train(tiny, disk / "run", device="cpu").model.state_dict(), whole.model.state_dict())


# Interruptions


@pytest.mark.parametrize("kind", ["momentum", "finpi"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_before_or_after_any_file_a_training_loads_and_resumes(finished, tmp_path, monkeypatch, kind, when):
    _, states = finished[kind]
    real, count = write_atomically, 0

    def write(path, write):
        nonlocal count
        count += 1
        if when == "after":
            real(path, write)
        if count == stop_at:
            raise Stop
        if when == "before":
            real(path, write)

    monkeypatch.setattr("pizoo.files.write_atomically", write)
    files = 3 + 3 * EPOCHS + 1 if kind == "momentum" else 2 + 2 * EPOCHS + 1
    for stop_at in range(1, files + 1):
        folder, count = tmp_path / str(stop_at), 0
        with pytest.raises(Stop):
            pizoo.train(recipe(kind), folder, device="cpu")
        records = segments.read_manifest(folder)["epochs"] if (folder / "checkpoint.json").exists() else []
        if records:
            assert_same(checkpoint.load(folder)[0].state_dict(), states[len(records) - 1])
        else:
            with pytest.raises(CheckpointError):
                checkpoint.load(folder)
        stop_at = 0
        resumed = pizoo.train(recipe(kind), folder, device="cpu")
        assert_same(resumed.model.state_dict(), states[-1])
        assert_same(checkpoint.load(folder)[0].state_dict(), states[-1])
        assert [record["epoch"] for record in resumed.history] == [1, 2, 3]


KILL = """
import os, signal, sys
from pathlib import Path
import pizoo
from pizoo.recipes import load_recipe
from pizoo.training import supervised

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def train(folder, point, entry, *overrides):
    recipe = load_recipe(entry, overrides)
    step, fsync, count = supervised.Training._step, os.fsync, 0
    def counted_step(self, number, *args):
        if point == "step" and number == self.steps_per_epoch + 1:
            self.writing.wait()
            kill()
        return step(self, number, *args)
    def counted_fsync(fd):
        if point == "write" and (Path(folder) / ".state-00002.safetensors.tmp").exists():
            kill()
        fsync(fd)
    supervised.Training._step, os.fsync = counted_step, counted_fsync
    pizoo.train(recipe, folder, device="cpu")

for case in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        train(*case.split("|"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, case
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_and_resumed_a_training_ends_with_the_same_bits(finished, tmp_path):
    kills = [(kind, point) for kind in RECIPES for point in ("step", "write")]
    cases = [
        "|".join((str(tmp_path / kind / point), point, RECIPES[kind][0], *RECIPES[kind][1])) for kind, point in kills
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILL, *cases], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for kind, point in kills:
        folder, states = tmp_path / kind / point, finished[kind][1]
        assert [record["epoch"] for record in segments.read_manifest(folder)["epochs"]][-1:] == [1]
        assert_same(checkpoint.load(folder)[0].state_dict(), states[0])
        assert_same(pizoo.train(recipe(kind), folder, device="cpu").model.state_dict(), states[-1])
        assert_same(checkpoint.load(folder)[0].state_dict(), states[-1])
        assert temporaries(folder) == [], "what the kill left behind"


def test_a_run_interrupted_in_every_epoch_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    step = supervised.Training._step
    for stop_at in (1, 4, 7):  # an epoch has 3 steps

        def stops(self, number, *args, stop_at=stop_at):
            if number == stop_at:
                raise Stop
            return step(self, number, *args)

        monkeypatch.setattr(supervised.Training, "_step", stops)
        with pytest.raises(Stop):
            pizoo.train(recipe("momentum"), tmp_path, device="cpu")
    monkeypatch.undo()
    resumed = pizoo.train(recipe("momentum"), tmp_path, device="cpu")
    assert_same(resumed.model.state_dict(), finished["momentum"][1][-1])


# Writing while the next epoch trains


def held_back(monkeypatch, until: threading.Event, then=lambda: None) -> None:
    """The first epoch's files are not written before ``until`` is set, and what is to be done ``then``."""
    write = write_tensors

    def write_late(path, tensors):
        if path.name == "state-00001.safetensors":
            assert until.wait(30)
            then()
        return write(path, tensors)

    monkeypatch.setattr(segments, "write_tensors", write_late)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("kind", RECIPES)
def test_what_is_written_while_the_next_epoch_trains_is_the_net_as_its_epoch_left_it(
    finished, tmp_path, monkeypatch, kind, engine
):
    """The state of epoch 1 goes to the disk when steps of epoch 2 have moved weights, momentum, decay and rows."""
    more = ["train.momentum=0", "train.dampening=0"] if engine else []  # which the engine leaves to the plain loop
    wanted = pizoo.train(recipe(kind, *more, "train.epochs=1"), device="cpu", engine=engine).model.state_dict()
    moved, save = threading.Event(), segments.save_epoch
    held_back(monkeypatch, moved)

    def save_late(folder, model, record, *args):
        if record["epoch"] == 2:
            moved.set()
            raise Stop
        save(folder, model, record, *args)

    monkeypatch.setattr(segments, "save_epoch", save_late)
    monkeypatch.setattr(Behind, "wait", lambda self, real=Behind.wait: real(self) if moved.is_set() else None)
    with pytest.raises(Stop):
        pizoo.train(recipe(kind, *more), tmp_path, device="cpu", engine=engine)
    assert [record["epoch"] for record in segments.read_manifest(tmp_path)["epochs"]] == [1]
    assert_same(checkpoint.load(tmp_path)[0].state_dict(), wanted)
    assert temporaries(tmp_path) == []
    monkeypatch.undo()
    if not engine:
        assert_same(pizoo.train(recipe(kind), tmp_path, device="cpu").model.state_dict(), finished[kind][1][-1])


def test_interrupted_while_it_waits_for_the_disk_a_training_ends_when_the_epoch_is_written(tmp_path, monkeypatch):
    waits, wait = threading.Event(), Behind.wait

    def wait_and_tell(self):
        if self._work is not None:
            waits.set()
        wait(self)

    def interrupt():
        time.sleep(0.1)  # it waits by now
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)  # the time a disk takes

    held_back(monkeypatch, waits, interrupt)
    monkeypatch.setattr(Behind, "wait", wait_and_tell)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts behind it ignores interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            pizoo.train(recipe("infpi"), tmp_path, device="cpu")
    finally:
        signal.signal(signal.SIGINT, before)
    assert [record["epoch"] for record in segments.read_manifest(tmp_path)["epochs"]] == [1]
    assert temporaries(tmp_path) == []


def test_work_behind_goes_on_one_piece_at_a_time_and_what_it_raises_comes_out_once():
    behind, done = Behind(), []

    def slow() -> None:
        time.sleep(0.05)
        done.append("slow")

    def fails() -> None:
        raise Stop

    behind.submit(slow)
    assert done == []
    behind.submit(fails)
    assert done == ["slow"]
    with pytest.raises(Stop):
        behind.submit(lambda: done.append("after a failure"))
    behind.wait()
    assert done == ["slow"]
