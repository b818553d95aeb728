"""Several processes, each with a share of the rows, do what one does with all of them: on CPUs, over gloo."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_golden
import together
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import VARIANTS, relative
from test_meta import made_up_pools, small
from test_rows import assert_same_rows, make_rows, new_rows

import pizoo
from pizoo import ops, processes
from pizoo.files import CheckpointError, json_sha256, write_json
from pizoo.recipes import load_recipe
from pizoo.rows import Share
from pizoo.segments import MANIFEST, read_manifest
from pizoo.training.plan import plan
from pizoo.training.train import train

EXACT = ["train.epochs=4", "train.dtype=float64"]  # 52 steps, the last of each epoch with fewer samples
INFINITE = VARIANTS["infinite"][1]
# Name: entry, overrides, engine or not.
TRAININGS = {
    name: (VARIANTS[name][0], [*VARIANTS[name][1], *EXACT], engine)
    for name, engine in {
        "infinite": True,
        "cross-entropy, layernorm, global clipping": False,
        "three hidden layers, no bias, decay with multipliers": True,
        "one hidden layer, zero read-out, cosine": True,
        "infinite, three hidden layers, hidden frozen": False,
        "finite, projected, decay": None,
    }.items()
}
TRAININGS["momentum"] = ("digits_infpi", [*INFINITE, *EXACT, "train.momentum=0.5", "train.weight_decay=0.01"], None)
TRAININGS["momentum"][1].append("train.apply_lr_mult_to_wd=true")
GOLDEN = [path.stem for path in sorted(test_golden.GOLDEN.glob("*.npz")) if path.stem.startswith(("infpi", "maml"))]
GOLDEN = [name for name in GOLDEN if "finite" not in name]
ROUNDING = {"cpu": 1e-9, "cuda": 1e-3}
ON_GPUS = ("infinite", "one hidden layer, zero read-out, cosine", "finite, projected, decay")


def on(device: str) -> dict[str, tuple]:
    """The trainings of :data:`TRAININGS` that are run on a device, in its dtype."""
    if device == "cpu":
        return TRAININGS
    return {
        name: (TRAININGS[name][0], [*TRAININGS[name][1], "train.dtype=float32"], TRAININGS[name][2]) for name in ON_GPUS
    }


class Ended(SimpleNamespace):
    """Processes that have ended: what became of every case, how they ended and what they said."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def three(folder) -> Ended:
    return ended(folder, together.start(folder, 3), doomed=1)


@pytest.fixture(scope="module")
def two(folder, three) -> Ended:
    """After the three, one of which was killed while training: these go on with it."""
    return ended(folder, together.start(folder, 2), doomed=1)


def ended(folder: Path, started: list[subprocess.Popen], doomed: int) -> Ended:
    """Wait for all but the doomed process, which at the end may have stopped without ending."""
    said = {}
    try:
        for k in sorted(range(len(started)), key=lambda k: k == doomed):
            if k == doomed and started[k].poll() is None:
                time.sleep(0.2)
                started[k].kill()
            said[k] = started[k].communicate(timeout=240)[0]
    finally:
        for process in started:
            process.kill()
    results = folder / f"of{len(started)}.json"
    assert results.exists(), said
    return Ended(cases=json.loads(results.read_text()), codes=[process.returncode for process in started], said=said)


@pytest.fixture(scope="module")
def alone(folder):
    """The net of one process, by the name of its training."""
    nets = {}

    def net(name: str) -> dict[str, torch.Tensor]:
        if name not in nets:
            entry, overrides, engine = TRAININGS[name]
            nets[name] = train(load_recipe(entry, overrides), device="cpu", engine=engine).model.state_dict()
        return nets[name]

    return net


def assert_same_net(folder: Path, wanted: dict[str, torch.Tensor], rounding: float = ROUNDING["cpu"]) -> None:
    found = pizoo.load(folder, dtype=torch.float64).state_dict()
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert relative(found[name], wanted[name]) < rounding, name


# ------------------------------------------------------------------ the same trajectory


@pytest.mark.parametrize("name", GOLDEN)
def test_shares_follow_the_reference(name: str, two: Ended, three: Ended) -> None:
    assert two.cases[name] == "" and three.cases[name] == ""


@pytest.mark.parametrize("name", TRAININGS)
def test_several_processes_train_the_net_of_one(name: str, two: Ended, three: Ended, alone, folder) -> None:
    for world, run in ((2, two), (3, three)):
        assert run.cases[name] == ""
        assert_same_net(folder / f"{name}, {world}", alone(name))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_gpus_train_the_net_of_one_cpu_and_miss_one_that_is_gone(tmp_path) -> None:
    """Over NCCL, inside replayed graphs."""
    run = ended(tmp_path, together.start(tmp_path, 2, "cuda"), doomed=1)
    for name, (entry, overrides, _) in on("cuda").items():
        assert run.cases[name] == ""
        wanted = train(load_recipe(entry, overrides), device="cpu", engine=False).model.state_dict()
        assert_same_net(tmp_path / f"{name}, 2", wanted, ROUNDING["cuda"])
    assert run.codes == [1, -signal.SIGKILL]
    assert "of this run has ended or does not answer" in run.said[0]


def test_several_processes_learn_to_learn_as_one_does(two: Ended, three: Ended, folder) -> None:
    recipe = small("infpi", "train.dtype=float64")
    wanted = train(recipe, dataset=made_up_pools(), device="cpu", engine=True).model.state_dict()
    for world, run in ((2, two), (3, three)):
        assert run.cases["tasks"] == ""
        assert_same_net(folder / f"tasks, {world}", wanted)


def test_shares_are_equal_and_number_rows_as_one_process_does(three: Ended, folder) -> None:
    manifest = read_manifest(folder / "infinite, 3")
    segments = [entry["rows"]["hidden.0"] for entry in manifest["segments"]]
    assert len(segments) == 3 * 5  # initial rows and four epochs
    counts = [sum(len(range(*numbers)) for numbers in segments if numbers[0] % 3 == k) for k in range(3)]
    assert sum(counts) == 20 + 4 * 203 and max(counts) - min(counts) <= 1
    assert pizoo.load(folder / "infinite, 3", epoch=2).output.count == 20 + 2 * 203


def test_evaluation_splits_the_images(two: Ended, folder) -> None:
    assert two.cases["evaluate"] == ""
    alone = pizoo.evaluate(folder / "infinite, 2", device="cpu")["accuracy"]
    assert json.loads((folder / "accuracy.json").read_text()) == alone


# ------------------------------------------------------------------ what goes wrong


def test_what_processes_cannot_do_together_is_refused_by_all(two: Ended) -> None:
    assert two.cases["refused"] == ""


def test_a_killed_process_ends_the_others_and_fewer_go_on(two: Ended, three: Ended, alone, folder) -> None:
    assert three.codes[1] == -signal.SIGKILL
    for k in (0, 2):
        assert three.codes[k] not in (0, -signal.SIGKILL)
        assert "of this run has ended or does not answer" in three.said[k]
        assert "the same command goes on after the last finished epoch" in three.said[k]
    writers = {entry["file"][-15:-12] for entry in read_manifest(folder / "killed")["segments"]}
    assert writers == {"of3", "of2"}
    assert_same_net(folder / "killed", alone("momentum"))


def test_a_process_that_stops_is_missed(two: Ended) -> None:
    assert two.codes[0] == 1
    assert "of this run has ended or does not answer" in two.said[0]


MISPLACED = {
    "numbers of another share": lambda segments: segments[4]["rows"].update(output=segments[5]["rows"]["output"]),
    "another step": lambda segments: segments[3]["rows"]["output"].__setitem__(2, 2),
    "beyond the end": lambda segments: segments[-1]["rows"]["output"].__setitem__(1, 10**9),
    "a layer left out": lambda segments: segments[2]["rows"].pop("output"),
    "a share left out": lambda segments: segments.pop(7),
    "epochs in another order": lambda segments: segments.append(segments.pop(4)),
}


@pytest.mark.parametrize("damage", MISPLACED)
def test_rows_that_are_not_where_the_manifest_says_are_refused(damage: str, three: Ended, folder, tmp_path) -> None:
    damaged = shutil.copytree(folder / "infinite, 3", tmp_path / "damaged")
    manifest = read_manifest(damaged)
    MISPLACED[damage](manifest["segments"])
    manifest["epochs"][-1]["segments"] = len(manifest["segments"])
    write_json(damaged / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})
    with pytest.raises(CheckpointError, match=r"another segment|damaged|does not hold"):
        pizoo.load(damaged)


def test_what_torchrun_is_not_for_is_refused(monkeypatch, pizoo_command) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for arguments, told in ((("list",), "run list without it"), (("train", "digits_mu", "--seeds", "0-1"), "one seed")):
        outcome = pizoo_command(*arguments)
        assert outcome.code == 2 and told in outcome.err and not outcome.out


def test_processes_without_a_gpu_or_nccl_are_told_so(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(ValueError, match=r"process 4 of this machine has no GPU: there are 4; .*--nproc-per-node 4"):
        processes._own_gpu()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(RuntimeError, match="no NCCL"):
        processes._own_gpu()


def test_a_share_is_a_part_of_the_memory(monkeypatch) -> None:
    recipe = load_recipe("cifar10_infpi")
    whole = plan(recipe, 50_000, torch.device("cpu"))
    monkeypatch.setattr(processes, "count", lambda: 4)
    monkeypatch.setattr(processes, "on_this_machine", lambda: 4)
    share = plan(recipe, 50_000, torch.device("cpu"))
    assert share.rows == whole.rows and abs(4 * share.row_bytes - whole.row_bytes) < 4
    assert share.available == pytest.approx(whole.available / 4, rel=0.2)  # others use the machine too


# ------------------------------------------------------------------ shares of rows


@settings(max_examples=30, deadline=None)
@given(of=st.integers(1, 5), sizes=st.lists(st.integers(0, 9), max_size=6), reserved=st.booleans())
def test_shares_of_any_number_of_processes_hold_every_row_once(of: int, sizes: list[int], reserved: bool) -> None:
    whole, shares = make_rows(), [make_rows() for _ in range(of)]
    for index, rows in enumerate(shares):
        rows_of(rows, Share(index, of))
        if reserved:
            rows.reserve(100)
    for seed, size in enumerate(sizes):
        for rows in (whole, *shares):
            rows.append(*new_rows(size, seed), -0.1)
    for index, rows in enumerate(shares):
        assert rows.share == Share(index, of)
        assert_holds(rows, whole)


@settings(max_examples=30, deadline=None)
@given(written=st.integers(1, 5), read=st.integers(1, 5), count=st.integers(5, 23))
def test_what_any_number_wrote_any_number_reads(written: int, read: int, count: int) -> None:
    whole = make_rows(count)
    for index in range(read):
        rows = rows_of(make_rows(), Share(index, read))
        rows.reserve(count)
        for k in range(written):
            parts = (part.detach()[k::written] for part in (whole.A, whole.B, whole.amult))
            rows.put(k, *parts, step=written)
        rows.grown(count, 1.0)
        assert len(rows.A) == math.ceil((count - index) / read)
        assert_holds(rows, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_share_stays_one_when_cast_copied_and_loaded(dtype: torch.dtype) -> None:
    whole, rows = make_rows(11), rows_of(make_rows(7), Share(1, 3))
    rows.load_state_dict(whole.state_dict())
    assert_holds(rows, whole)
    rows.to_rows_dtype(dtype)
    whole.to_rows_dtype(dtype)
    rows.reserve(20)
    for one in (copy.deepcopy(rows), copy.deepcopy(rows).double(), rows):
        assert_holds(one, whole)
        for part in (one, other := copy.deepcopy(whole)):
            part.append(*new_rows(5), -0.1)
        assert_holds(one, other)


def test_a_layer_of_fewer_rows_than_processes_has_shares_without_any() -> None:
    rows = rows_of(make_rows(1), Share(2, 3))
    assert (len(rows.A), rows.count) == (0, 1)
    gbar = new_rows(4)[1]
    out = ops.growing_forward(gbar, rows.A.detach(), rows.B.detach(), rows.amult)
    assert out.shape == (4, 3) and not out.any()


def assert_holds(rows, whole) -> None:
    """``rows`` are a share of ``whole``, and know of how many."""
    assert rows.count == whole.count
    for part in ("A", "B", "amult"):
        assert torch.equal(getattr(rows, part).detach().double(), rows.dealt(getattr(whole, part).detach()).double())


def rows_of(rows, share: Share):
    """What :meth:`Rows.share_rows` makes of ``rows`` in that process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "index", lambda: share.index)
        patch.setattr(processes, "count", lambda: share.of)
        rows.share_rows()
    return rows


def test_alone_nothing_is_shared() -> None:
    rows = make_rows()
    rows.share_rows()
    assert not rows.shared and processes.count() == 1 and processes.gathered(7) == [7]
    assert_same_rows(rows, make_rows())
