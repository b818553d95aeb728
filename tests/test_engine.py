"""The engine is the plain loop written out: the same trajectory, and nothing changes after a step that is not finite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

import pizoo
from pizoo import ops
from pizoo.data import epoch_order
from pizoo.ops.append import append_reference
from pizoo.recipes import RecipeError, load_recipe
from pizoo.rows import directed
from pizoo.training import supervised
from pizoo.training.engine import Engine, compiled
from pizoo.training.supervised import TrainingDiverged
from pizoo.training.train import train

SMALL = ["data.subset=203", "train.epochs=2", "train.batch_size=16", "train.schedule.milestones=[1]"]
INFINITE = [*SMALL, "model.r=20"]
VARIANTS = {
    "infinite": ("digits_infpi", INFINITE),
    "cross-entropy, layernorm, global clipping": (
        "digits_infpi",
        [*INFINITE, "train.loss=cross_entropy", "model.layernorm=true", "train.clip.per_param=false"],
    ),
    "three hidden layers, no bias, decay with multipliers": (
        "digits_infpi",
        [
            *INFINITE,
            "model.hidden_layers=3",
            "model.bias_alpha=0",
            "train.weight_decay=0.01",
            "train.apply_lr_mult_to_wd=true",
        ],
    ),
    "one hidden layer, zero read-out, cosine": (
        "digits_infpi",
        [*INFINITE, "model.hidden_layers=1", "model.readout_zero_init=true", "train.schedule={name: cosine}"],
    ),
    "finite, projected, decay": ("digits_finpi", [*SMALL, "model.width=40", "model.r=20", "train.weight_decay=0.01"]),
    "infinite, input frozen": ("digits_infpi", [*INFINITE, "train.freeze=[input]"]),
    "infinite, three hidden layers, hidden frozen": (
        "digits_infpi",
        [*INFINITE, "model.hidden_layers=3", "train.freeze=[hidden]", "train.weight_decay=0.01"],
    ),
    "infinite, read-out alone": ("digits_infpi", [*INFINITE, "train.freeze=[input, hidden]"]),
    "finite, input and read-out frozen": (
        "digits_finpi",
        [*SMALL, "model.width=40", "model.r=20", "train.freeze=[input, readout]"],
    ),
    "finite, plain, no clipping": ("digits_mu", [*SMALL, "model.width=40", "train.clip.max_norm=null"]),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_and_plain_loop_give_one_trajectory_in_float64(variant: str) -> None:
    recipe = load_recipe(VARIANTS[variant][0], [*VARIANTS[variant][1], "train.dtype=float64"])
    plain, engine = (train(recipe, device="cpu", engine=engine) for engine in (False, True))
    for a, b in zip(engine.history, plain.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-12)
        assert a["lr"] == b["lr"] and a.get("rows") == b.get("rows")
    assert engine.history[-1]["lr"] < recipe.train.lr  # the schedule has set in
    wanted = plain.model.state_dict()
    for name, tensor in engine.model.state_dict().items():
        assert relative(tensor, wanted[name]) < 1e-12, name


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 5e-3), ("int8", 5e-2)])
def test_engine_and_plain_loop_agree_within_rounding_in_short_rows(dtype: str, rounding: float) -> None:
    recipe = load_recipe("digits_infpi", [*INFINITE, f"train.dtype={dtype}"])
    plain, engine = (train(recipe, device="cpu", engine=engine) for engine in (False, True))
    x = recipe.data.normalize(recipe.data.load().test_x)
    with torch.no_grad():
        assert relative(engine.model(x), plain.model(x)) < rounding


@pytest.mark.parametrize("engine", [False, True], ids=["plain loop", "engine"])
def test_rows_that_take_more_than_their_columns_are_saved_and_loaded_as_they_are(engine: bool, tmp_path) -> None:
    recipe = load_recipe("digits_infpi", [*INFINITE, "model.r=47", "train.dtype=float16"])
    trained = train(recipe, tmp_path / "run", device="cpu", engine=engine).model
    assert trained.output.B.stride() == (48, 1)
    loaded = pizoo.load(tmp_path / "run").state_dict()
    for name, wanted in trained.state_dict().items():
        assert torch.equal(loaded[name], wanted), name


def test_training_in_int8_rows_ends_where_training_in_float64_rows_does() -> None:
    """Each row is off by almost a hundredth, each its own way: together they are off by less than half of that."""
    recipes = [
        load_recipe("digits_infpi", ["train.epochs=2", "model.r=32", f"train.dtype={d}"]) for d in ("float64", "int8")
    ]
    exact, short = (train(recipe, device="cpu", engine=False).model for recipe in recipes)
    x = recipes[0].data.normalize(recipes[0].data.load().test_x, torch.float64)
    with torch.no_grad():
        wanted, found = exact(x), short(x.float())
    assert relative(found, wanted) < 5e-3
    assert (found.argmax(1) != wanted.argmax(1)).float().mean() < 0.005


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_resumed_engine_run_is_the_uninterrupted_one_to_the_bit(dtype, tmp_path, monkeypatch) -> None:
    recipe = load_recipe(
        "digits_infpi", [*INFINITE, "train.epochs=3", "train.weight_decay=0.01", f"train.dtype={dtype}"]
    )
    whole = train(recipe, tmp_path / "whole", device="cpu", engine=True)

    class Stop(Exception):
        pass

    save = supervised.Training._save

    def save_then_stop(self, epoch):
        save(self, epoch)
        if epoch == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(supervised.Training, "_save", save_then_stop)
        train(recipe, tmp_path / "resumed", device="cpu", engine=True)
    resumed = train(recipe, tmp_path / "resumed", device="cpu", engine=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("entry", ["digits_infpi", "digits_mu"])
def test_nothing_changes_from_a_step_that_is_not_finite_on(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = INFINITE if entry == "digits_infpi" else [*SMALL, "model.width=40"]
    recipe = load_recipe(entry, [*overrides, "train.dtype=float64", "train.epochs=1"])
    dataset = recipe.data.load()
    bad = epoch_order(203, recipe.train.seed, 0)[5 * 16]  # the first sample of the sixth batch

    engines: list[Engine] = []
    original = Engine.__init__

    def spoil(self, model, optimizer, settings, x, y, factors):
        x = x.clone()
        x[bad] = float("nan")
        original(self, model, optimizer, settings, x, y, factors)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", spoil)
    with pytest.raises(TrainingDiverged, match="step 5"):
        train(recipe, dataset=dataset, device="cpu", engine=True)
    net = engines[0].model
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    if entry == "digits_infpi":
        assert net.output.count == 20 + 5 * 16


def test_a_gradient_that_is_not_finite_is_told_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("digits_mu", [*SMALL, "model.width=40", "train.dtype=float64", "train.epochs=1"])
    loss = Engine._loss

    def spoil(self, logits, y):
        value, gradient = loss(self, logits, y)
        return value, gradient * torch.where(self.step == 7, torch.inf, 1.0)

    monkeypatch.setattr(Engine, "_loss", spoil)
    with pytest.raises(TrainingDiverged, match="step 7"):
        train(recipe, device="cpu", engine=True)


def test_strong_weight_decay_is_the_plain_loops_not_an_error() -> None:
    overrides = [*SMALL, "model.width=40", "train.weight_decay=0.5", "train.last_layer_lr_mult=16"]
    train(load_recipe("digits_mu", overrides), device="cpu", engine=True)
    growing = load_recipe("digits_infpi", [*INFINITE, "train.lr=1.0", "train.weight_decay=0.999"])
    with pytest.raises(RecipeError, match="leaves nothing of a row"):
        train(growing, device="cpu", engine=True)


def test_engine_refuses_what_it_cannot_train() -> None:
    recipe = load_recipe("digits_infpi", [*INFINITE, "train.momentum=0.9", "train.apply_lr_mult_to_wd=true"])
    with pytest.raises(RecipeError, match="momentum"):
        train(recipe, device="cpu", engine=True)


def test_append_writes_at_the_row_the_device_names() -> None:
    storages = (torch.zeros(9, 4, dtype=torch.float16)[:, :3], torch.zeros(9, 5, dtype=torch.float16), torch.zeros(9))
    new = (torch.randn(2, 3), torch.randn(2, 5), torch.randn(2))
    append_reference(new, storages, torch.tensor([6]))
    for storage, part in zip(storages, new, strict=True):
        assert torch.equal(storage[6:8], part.to(storage.dtype))
        assert not storage[:6].any() and not storage[8:].any()


FUSED = """
import torch
from pizoo.ops.append import append_fused, append_reference
for r, r_out in ((7, 10), (400, 400), (5, 1)):
    a = (torch.zeros(20, 2 * r_out, dtype=torch.float16)[:, :r_out], torch.zeros(20, r, dtype=torch.float16), torch.zeros(20))
    b = tuple(part.clone() for part in a)
    new = (torch.randn(3, r_out), torch.randn(3, r), torch.randn(3))
    append_reference(new, a, torch.tensor([5]))
    append_fused(new, b, torch.tensor([5]))
    assert all(torch.equal(x, y) for x, y in zip(a, b)), (r, r_out)
    new = (*(torch.randint(-127, 128, (3, n), dtype=torch.int8) for n in (r_out, r)), torch.randn(3), torch.randn(3))
    a = (*(torch.zeros(20, n, dtype=torch.int8) for n in (r_out, r)), torch.zeros(20), torch.zeros(20))
    b = tuple(part.clone() for part in a)
    append_reference(new, a, torch.tensor([5]))
    append_fused(new, b, torch.tensor([5]))
    assert all(torch.equal(x, y) and x[5:8].any() for x, y in zip(a, b)), (r, r_out)

from pizoo.ops.dense import product_fused, product_reference, step_fused, step_reference
for b, n, m in ((8, 70, 40), (33, 200, 10), (1, 5, 300)):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        x, weight = torch.randn(b, n).to(dtype), torch.randn(n, m).to(dtype)
        exact = x.double() @ weight.double()
        for w in (weight, weight.T.contiguous().T):
            for product in (product_fused, product_reference):
                assert (product(x, w) - exact).norm() < 1e-6 * exact.norm(), (b, n, m, dtype, product)
        right, kept, factor = torch.randn(b, m).to(dtype), torch.tensor(0.9), torch.tensor(0.3)
        exact = 0.9 * weight.double() - 0.3 * x.double().T @ right.double()
        for step in (step_fused, step_reference):
            stepped = weight.clone()
            step(stepped, x, right, kept, factor, torch.tensor([False]))
            assert torch.equal(stepped, weight)
            step(stepped, x, right, kept, factor, torch.tensor([True]))
            assert (stepped - exact).norm() < tolerance * exact.norm(), (b, n, m, dtype, step)
"""


def test_fused_kernels_of_a_step_do_what_the_plain_ones_do() -> None:
    pytest.importorskip("triton")
    # A process of its own: the interpreter is chosen when Triton is first imported.
    done = subprocess.run(
        [sys.executable, "-c", FUSED], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.parametrize(
    ("variant", "dtype", "rounding"),
    [
        ("three hidden layers, no bias, decay with multipliers", "float32", 1e-5),
        ("finite, projected, decay", "float32", 1e-5),
        ("infinite", "int8", 1e-2),
    ],
)
def test_compiled_step_is_the_step(variant: str, dtype: str, rounding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(VARIANTS[variant][0], [*VARIANTS[variant][1], f"train.dtype={dtype}", "train.epochs=1"])
    plain = train(recipe, device="cpu", engine=False)
    original = Engine.__init__

    def compile_too(self, *args):
        original(self, *args)
        self._compute = compiled(self._compute_step)

    monkeypatch.setattr(Engine, "__init__", compile_too)
    fused = train(recipe, device="cpu", engine=True)
    wanted = plain.model.state_dict()
    for name, tensor in fused.model.state_dict().items():
        assert relative(tensor, wanted[name]) < rounding, name
    if dtype == "int8":  # derived again from what is stored, as after a checkpoint, to the bit
        for layer in fused.model.growing_layers.values():
            assert torch.equal(layer.bmult, directed(layer.B.detach(), torch.int8)[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_replayed_graph_trains_short_rows_as_the_plain_loop_does(dtype: str) -> None:
    recipe = load_recipe("digits_infpi", [*INFINITE, f"train.dtype={dtype}"])
    plain, engine = train(recipe, device="cpu", engine=False), train(recipe, device="cuda", engine=True)
    x = recipe.data.normalize(recipe.data.load().test_x)
    with torch.no_grad():
        assert relative(engine.model.cpu()(x), plain.model(x)) < 1e-2
    if dtype == "int8":
        for layer in engine.model.growing_layers.values():
            assert torch.equal(layer.bmult, directed(layer.B.detach(), torch.int8)[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_that_fails_in_the_first_step_leaves_the_training_to_plain_torch(monkeypatch) -> None:
    from pizoo.ops import triton

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ops, "_failed", False)
    monkeypatch.setattr(triton, "growing_backward", broken)
    recipe = load_recipe("digits_infpi", [*INFINITE, "train.dtype=float16"])
    with pytest.warns(RuntimeWarning, match="plain torch runs instead: RuntimeError: no compiler"):
        engine = train(recipe, device="cuda", engine=True)
    plain = train(recipe, device="cpu", engine=False)
    x = recipe.data.normalize(recipe.data.load().test_x)
    with torch.no_grad():
        assert relative(engine.model.cpu()(x), plain.model(x)) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_graph_agrees_with_the_plain_loop_on_a_gpu(variant: str) -> None:
    recipe = load_recipe(VARIANTS[variant][0], [*VARIANTS[variant][1], "train.dtype=float32"])
    plain, engine = train(recipe, device="cpu", engine=False), train(recipe, device="cuda", engine=True)
    wanted = plain.model.state_dict()
    for name, tensor in engine.model.state_dict().items():
        assert relative(tensor.cpu(), wanted[name]) < 1e-3, name
