"""Compaction: fewer rows compute the same function, nothing is fitted to test inputs, and both numbers are kept."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import pizoo
from pizoo import checkpoint, zoo
from pizoo.compaction import fit as fitting
from pizoo.compaction.fit import RIDGES, fit_rows, landmarks, relative_error, rounded, rounding_loss, row_features
from pizoo.compaction.full import READOUT_SHARE, Full, row_counts
from pizoo.evaluation.accuracy import accuracy
from pizoo.files import CheckpointError
from pizoo.functional import unit
from pizoo.models import InfPiMLP
from pizoo.nn import InfPiLinear
from pizoo.optim import PiSGD, param_groups
from pizoo.recipes import Compact, Recipe, RecipeError, load_recipe
from pizoo.rows import scaled
from pizoo.training.compact import compact_checkpoint, rows_within, stored_bytes
from pizoo.training.reproduce import reproduce

ROWS = 600


@pytest.fixture(scope="module")
def digits():
    """(net, normalised training images, normalised test images, test labels)."""
    model = pizoo.load("digits_infpi")
    dataset, normalize = zoo.dataset(model.config), zoo.preprocessing(model.config)
    return model, normalize(dataset.train_x), normalize(dataset.test_x), dataset.test_y


@pytest.fixture(scope="module")
def full(digits):
    model, train_x, test_x, _ = digits
    return Full(model, train_x, test_x=test_x)


@pytest.fixture(scope="module")
def small(full):
    return full.fit(ROWS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of three epochs."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ("model.r=16", "train.epochs=3", "data.subset=200")
    pizoo.train("digits_infpi", folder, overrides=settings, device="cpu")
    return folder


@pytest.fixture(scope="module")
def shipped(trained, tmp_path_factory):
    """(folder of its compact net, what was returned)."""
    folder = tmp_path_factory.mktemp("shipped")
    return folder, compact_checkpoint(trained, folder, Compact(rows=60), device="cpu")


def random_net(dtype=torch.float64, **hparams) -> InfPiMLP:
    torch.manual_seed(0)
    net = InfPiMLP(**{"d_in": 12, "d_out": 3, "r": 6, "dtype": dtype, **hparams})
    for layer in net.growing_layers.values():
        g = torch.randn(40, 6, dtype=dtype)
        layer.append(torch.randn(40, layer.A.shape[1], dtype=dtype), unit(g)[0], 0.1)
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    return net.eval()


# Few rows


def test_landmarks_are_directions_of_inputs(full):
    g = full.entering["fit"]
    B = landmarks(g, 50, seed=0)
    assert ((unit(g)[0] @ B.T).amax(0) - 1).abs().max() < 1e-5
    assert (B @ B.T).fill_diagonal_(0).amax() < 1 - 1e-6  # each of another input
    assert not torch.equal(B, landmarks(g, 50, seed=1))


@pytest.mark.parametrize("role", ["hidden", "readout"])
@pytest.mark.parametrize("layernorm", [False, True])
def test_rows_are_the_minimum_of_the_ridge_regression(role, layernorm):
    torch.manual_seed(0)
    options = {"bias_alpha": 0.5, "alpha": 2.0, "layernorm": layernorm, "role": role, "dtype": torch.float64}
    layer = InfPiLinear(6, 6 if role == "hidden" else 3, **options)
    torch.nn.init.normal_(layer.bias)
    g, out = torch.randn(300, 6), torch.randn(300, layer.A.shape[1])
    ridge, _ = fit_rows(layer, 20, (g, out), (g, out), seed=0)
    assert ridge in RIDGES
    A = (layer.A * layer.amult[:, None]).detach().requires_grad_()
    features, kernel = row_features(g.double(), layer.B, layernorm), row_features(layer.B, layer.B, True)
    weight = ridge * features.square().mean() / kernel.diagonal().mean()
    target = (out - layer.finish(torch.zeros(1))) / layer.alpha
    objective = (features @ A - target).square().sum() / len(g) + weight * (A * (kernel @ A)).sum()
    (gradient,) = torch.autograd.grad(objective, A)
    assert gradient.norm() < 1e-6 * (2 * features.T @ target / len(g)).norm()


def test_the_ridge_is_chosen_by_held_out_error(monkeypatch):
    monkeypatch.setattr(fitting, "RIDGES", (1.0, 1e-2, 1e-4, 1e-6))
    torch.manual_seed(0)
    layer = InfPiLinear(6, 3, bias_alpha=0.0, role="readout", dtype=torch.float64)
    g, held_out = torch.randn(60, 6), torch.randn(60, 6)
    smooth = lambda x: x @ torch.arange(18.0).view(6, 3)  # noqa: E731
    noisy = smooth(g) + 30 * torch.randn(60, 3)
    chosen = fit_rows(layer, 50, (g, noisy), (held_out, smooth(held_out)), seed=0)
    assert relative_error(layer(held_out), smooth(held_out)) == pytest.approx(chosen.error, rel=1e-6)
    fooled = fit_rows(layer, 50, (g, noisy), (g, noisy), seed=0)
    assert chosen.ridge > 10 * fooled.ridge
    assert chosen.error < relative_error(layer(held_out), smooth(held_out))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_rounding_makes_up_for_itself(dtype):
    """300 rows span several blocks; their features are nearly collinear, as those of landmarks are."""
    torch.manual_seed(0)
    basis = torch.randn(300, 20, dtype=torch.float64)
    H = basis @ basis.T + 1e-4 * torch.eye(300, dtype=torch.float64)
    A = torch.randn(300, 7, dtype=torch.float64)
    held, amult = rounded(A, torch.linalg.cholesky(H), dtype)
    nearest, scale = scaled(A, dtype)
    assert held.dtype == dtype

    def lost(held, scale):
        error = A - held.to(dtype).double() * scale[:, None]
        return (error.T @ H @ error).trace()

    assert lost(held, amult) < 0.05 * lost(nearest, scale)
    assert rounding_loss(A, torch.linalg.cholesky(H), dtype) == pytest.approx(lost(held, amult).item(), rel=0.3)
    largest = (held.double().abs() * amult[:, None]).amax(1)
    assert (largest - A.abs().amax(1)).abs().max() < 0.2 * A.abs().max()  # no row runs away


def test_inputs_nearly_in_one_direction_are_fitted_with_rows_of_any_dtype(monkeypatch):
    """Few of 60 features are needed there. Unrounded the smallest ridge does best; in 8 bits a larger one."""
    torch.manual_seed(0)
    g = 0.1 * torch.randn(300, 3) + torch.tensor([4.0, 0.0, 0.0])
    target = row_features(g, unit(torch.randn(5, 3))[0], False) @ torch.randn(5, 2)

    def fitted(dtype):
        layer = InfPiLinear(3, 2, bias_alpha=0.0, role="readout", dtype=torch.float64)
        layer.to_rows_dtype(dtype)
        return fit_rows(layer, 60, (g, target), (g, target), seed=0)

    in_8_bits, in_16, in_64 = (fitted(dtype) for dtype in (torch.int8, torch.float16, torch.float64))
    assert in_16.error < 2 * in_64.error < 1e-3
    assert in_8_bits.ridge > 10 * in_64.ridge
    monkeypatch.setattr(fitting, "RIDGES", (in_64.ridge,))
    assert in_8_bits.error < 0.5 * fitted(torch.int8).error


def test_rounding_with_independent_features_is_to_nearest():
    A = torch.randn(200, 5, dtype=torch.float64)
    held, amult = rounded(A, torch.eye(200, dtype=torch.float64), torch.int8)
    nearest, scale = scaled(A, torch.int8)
    assert torch.equal(held, nearest) and torch.equal(amult, scale)


def test_eight_bits_do(full):
    error = {}
    for dtype in (torch.int8, torch.float16):
        net = full.fit(ROWS, dtype)
        assert all(layer.A.dtype == layer.B.dtype == dtype for layer in net.growing_layers.values())
        error[dtype] = full.measure(net, "test")["logits_error"]
    assert error[torch.int8] < 1.2 * error[torch.float16]


# Whole nets


@pytest.mark.parametrize(
    "hparams",
    [{}, {"hidden_layers": 1}, {"hidden_layers": 3}, {"layernorm": True}, {"bias_alpha": 0.0, "last_layer_alpha": 0.5}],
    ids=str,
)
def test_what_the_full_net_gives_is_what_it_gives(hparams):
    net = random_net(**hparams)
    x = torch.randn(1200, 12, dtype=torch.float64)
    full = Full(net, x, test_x=x[:7])
    with torch.no_grad():
        assert (full.output("test") - net(x[:7])).abs().max() < 1e-5 * net(x).abs().max()
    assert len(full.output("held out")) == 120 and len(full.output("fit")) == 1080
    few = full.fit(30)
    assert full.measure(few, "held out")["logits_error"] < 0.1


def test_rows_on_the_host_give_the_same_net():
    net, x = random_net(), torch.randn(700, 12, dtype=torch.float64)
    on_device = pizoo.compact(net, x, 30).state_dict()
    on_host = pizoo.compact(net.keep_rows_on("host"), x, 30).state_dict()
    assert all(torch.equal(on_device[name], on_host[name]) for name in on_device)


def test_few_rows_compute_what_many_do(digits, full, small):
    model, _, test_x, test_y = digits
    assert small.compacted["rows"] == {"hidden.0": ROWS, "output": ROWS // READOUT_SHARE}
    assert small.compacted["full_rows"] == {name: layer.count for name, layer in model.growing_layers.items()}
    with torch.no_grad():
        few, many = small(test_x), model(test_x)
    assert abs(accuracy(few, test_y) - accuracy(many, test_y)) < 1.5
    measured = full.measure(small, "test")
    assert measured["agreement"] > 97
    assert measured["agreement"] == pytest.approx(accuracy(few, many.argmax(1)), abs=0.01)
    assert measured["logits_error"] == pytest.approx(relative_error(few, many), abs=1e-3)


def test_more_rows_bring_it_nearer(full):
    errors = [full.measure(full.fit(rows), "test")["logits_error"] for rows in (ROWS // 3, ROWS, 3 * ROWS)]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1]


def test_one_seed_gives_one_net_and_test_inputs_have_no_part_in_it(digits, full):
    model, train_x, _, _ = digits
    first, again, other = (pizoo.compact(model, train_x, 40, seed=seed).state_dict() for seed in (0, 0, 1))
    with_test_inputs = full.fit(40).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], with_test_inputs[name]) for name in first)
    assert not torch.equal(first["output.A"], other["output.A"])


def test_random_numbers_drawn_elsewhere_are_not_disturbed(digits):
    model, train_x, _, _ = digits
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pizoo.compact(model, train_x[:50], 10)
    assert torch.equal(torch.rand(3), expected)


def test_input_layer_and_biases_stay(digits, small):
    model = digits[0]
    assert torch.equal(small.input.A, model.input.A.half().float())
    for name in ("input.bias", "hidden.0.bias", "output.bias"):
        assert torch.equal(small.state_dict()[name], model.state_dict()[name])
    assert small.hparams == model.hparams and not small.training


def test_a_compact_net_trains_and_grows_on(digits, small):
    _, train_x, _, _ = digits
    net = pizoo.compact(digits[0], train_x[:200], 30)
    y = zoo.dataset(digits[0].config).train_y
    net.train()
    optimizer = PiSGD(param_groups(net, 0.5), 0.5)
    losses = []
    for batch in torch.arange(400).split(16):
        loss = torch.nn.functional.mse_loss(net(train_x[batch]), torch.nn.functional.one_hot(y[batch], 10).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert net.hidden[0].count == 30 + 400 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_a_compact_net_gives_the_same_logits_everywhere(full, dtype):
    net = full.fit(3 * ROWS, dtype)
    x = torch.randn(50, 64)
    with torch.no_grad():
        here = net(x)
        assert relative_error(net.cuda()(x.cuda()).cpu(), here) < 1e-4
        assert relative_error(net.double()(x.double().cuda()).cpu().float(), here) < 1e-4


def test_one_number_of_rows_or_one_for_every_layer():
    full = {"hidden.0": 1000, "hidden.1": 1000, "output": 1000}
    assert row_counts(80, full) == [80, 80, 40]
    assert row_counts([50, 60, 70], full) == [50, 60, 70]
    assert row_counts(80, {"output": 1000}) == [80]
    assert row_counts(80, {"hidden.0": 1000, "hidden.1": 1000}) == [80, 80]  # a read-out that gives nothing has no say
    with pytest.raises(
        ValueError, match=r"rows is \[5, 6\]; it must be one number, or one for each of hidden.0, hidden.1"
    ):
        row_counts([5, 6], full)
    with pytest.raises(ValueError, match=r"rows is 1,001 for hidden.0, which has 1,000: there is nothing to compact"):
        row_counts(1001, full)
    with pytest.raises(ValueError, match=r"rows of hidden.0 is 0; it must be a positive integer"):
        row_counts(0, full)


def test_what_cannot_be_compacted_is_refused(digits):
    model, train_x, _, _ = digits
    with pytest.raises(TypeError, match="model is a FinPiMLP; only an InfPiMLP has rows to make fewer of"):
        pizoo.compact(pizoo.load("digits_finpi"), train_x)
    with pytest.raises(ValueError, match="300 rows are asked for, with 270 inputs to fit to"):
        pizoo.compact(model, train_x[:50], 300)
    with pytest.raises(ValueError, match=r"x has shape \[1, 1, 8, 8\]; it must hold at least two inputs"):
        pizoo.compact(model, train_x[:1], 10)
    with pytest.raises(ValueError, match=r"x has shape .* it must be"):
        pizoo.compact(model, train_x[..., :7], 10)


# Checkpoints


def test_a_compact_checkpoint_holds_both_numbers(trained, shipped):
    folder, results = shipped
    before, after = (json.loads((path / "results.json").read_text()) for path in (trained, folder))
    assert after == json.loads(json.dumps(results))
    made = after["compact"]
    assert made["full_rows"] == {"hidden.0": 616, "output": 616} and made["full_accuracy"] == before["accuracy"]
    assert after["mean_accuracy"] == before["accuracy"] and after["history"] == before["history"]
    (point,) = made["sizes"]
    assert point["accuracy"] == after["accuracy"] and point["rows"] == {"hidden.0": 60, "output": 30}
    assert pizoo.evaluate(folder)["accuracy"] == pytest.approx(after["accuracy"], abs=1e-9)
    assert point["bytes"] <= (folder / "model.safetensors").stat().st_size <= point["bytes"] + 4096


def test_a_compact_checkpoint_is_verified_like_any_other(shipped):
    for quick in (False, True):
        assert pizoo.verify(shipped[0], device="cpu", quick=quick).status == "verified"


def test_load_says_that_it_gave_a_compact_net(trained, shipped, caplog):
    folder, results = shipped
    caplog.set_level(logging.INFO, "pizoo")
    net = pizoo.load(folder)
    assert net.compacted["full_rows"] == {"hidden.0": 616, "output": 616}
    accuracies = (
        f"{results['accuracy']:.2f} % on the test set, the full net {results['compact']['full_accuracy']:.2f} %"
    )
    assert f"a compact net, 60 + 30 rows for the full net's 616 + 616, {accuracies}" in caplog.text
    caplog.clear()
    assert pizoo.load(trained).compacted is None
    assert "loaded" in caplog.text and "compact net" not in caplog.text


def test_shipped_again_it_still_says_so(shipped, tmp_path):
    net = pizoo.load(shipped[0])
    x = torch.randn(3, 64)
    checkpoint.save(tmp_path, net, net.config, {"x": x, "logits": net(x)})
    assert pizoo.load(tmp_path).compacted == net.compacted


def test_the_file_is_as_small_as_asked(trained, tmp_path):
    for megabytes, dtype in ((0.008, "float16"), (0.02, "float16"), (0.02, "int8")):
        compact_checkpoint(trained, tmp_path, Compact(megabytes=megabytes, dtype=dtype), device="cpu")
        size = (tmp_path / "model.safetensors").stat().st_size
        assert 0.6 * megabytes * 1e6 < size <= megabytes * 1e6
    model = pizoo.load(trained)
    with pytest.raises(ValueError, match=r"megabytes is 0.001; a net like this takes 0.01 at least"):
        rows_within(model, 0.001, torch.float16)


def test_float32_that_fits_float16_is_stored_so_and_nothing_else():
    state = {
        "fits": torch.tensor([1.0, -0.5, 2.0**-24]),
        "precise": torch.tensor([1.0, 1.0 + 2.0**-20]),
        "large": torch.tensor([1e6]),
        "not a number": torch.tensor([float("nan")]),
        "integers": torch.tensor([1, 2]),
    }
    packed = checkpoint.packed(state)
    assert list(packed) == list(state)
    assert [tensor.dtype for tensor in packed.values()] == [torch.float16, *[torch.float32] * 3, torch.int64]
    assert torch.equal(packed["fits"].float(), state["fits"])


def test_a_curve_is_recorded_and_drawn(trained, tmp_path):
    pytest.importorskip("matplotlib")
    results = compact_checkpoint(trained, tmp_path, Compact(rows=64), curve=True, device="cpu")
    assert [point["rows"]["hidden.0"] for point in results["compact"]["sizes"]] == [8, 16, 32, 64]
    assert pizoo.load(tmp_path).hidden[0].count == 64
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    sizes = [point["bytes"] for point in results["compact"]["sizes"]]
    assert sizes == sorted(sizes) and sizes[-1] == stored_bytes(pizoo.load(tmp_path))


def test_a_folder_that_holds_another_checkpoint_is_left_alone(trained, shipped, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    with pytest.raises(CheckpointError, match="holds a checkpoint that is not a compact net"):
        compact_checkpoint(trained, copy, Compact(rows=60), device="cpu")
    assert {file.name: file.stat().st_size for file in copy.iterdir()} == {
        file.name: file.stat().st_size for file in trained.iterdir()
    }
    with pytest.raises(TypeError, match="model is a MuMLP"):
        compact_checkpoint("digits_mu", tmp_path / "mu", Compact(rows=60), device="cpu")
    with pytest.raises(zoo.WeightsNotFoundError):
        compact_checkpoint("imagenet32_infpi_r200", tmp_path / "none", Compact(rows=60), device="cpu")
    with pytest.raises(ValueError, match=r"617 for hidden.0, which has 616"):
        compact_checkpoint(trained, tmp_path / "more", Compact(rows=617), device="cpu")
    assert not (tmp_path / "mu").exists() and not (tmp_path / "none").exists()


def test_an_entry_is_made_of_full_nets_and_ships_a_compact_one(tmp_path):
    settings = ("model.r=16", "train.epochs=3", "data.subset=200", "compact={rows: 60, views: 2}")
    card, recipe = tmp_path / "card", load_recipe("digits_infpi", settings)
    results = reproduce(recipe, card, tmp_path / "runs", [0, 1], device="cpu")
    net = pizoo.load(card)
    assert {name: layer.count for name, layer in net.growing_layers.items()} == {"hidden.0": 60, "output": 30}
    full = pizoo.load(tmp_path / "runs/seed-0")
    assert net.compacted["full_rows"] == {name: layer.count for name, layer in full.growing_layers.items()}
    assert pizoo.evaluate(card)["accuracy"] == pytest.approx(results["accuracy"], abs=1e-9)
    assert [run["accuracy"] for run in results["seeds"]] == [
        pytest.approx(pizoo.evaluate(tmp_path / f"runs/seed-{seed}")["accuracy"], abs=1e-9) for seed in (0, 1)
    ]
    assert results["compact"]["full_accuracy"] == pytest.approx(results["seeds"][0]["accuracy"], abs=1e-4)
    report = pizoo.verify(card, device="cpu")
    assert report.status == "verified" and report.reproduction == "no published number"
    text = (card / "README.md").read_text()
    assert "## A compact net" in text and "60 + 30" in text
    for size in results["compact"]["sizes"]:
        assert f"| {size['accuracy']:.2f} | {size['agreement']:.2f} |" in text
    assert (card / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_only_nets_that_grow_are_made_compact():
    with pytest.raises(RecipeError, match=r"compact: must be left out, it is for nets of model.kind infpi"):
        load_recipe("digits_mu", ("compact={megabytes: 5}",))


def test_an_entry_made_compact_is_verified(tmp_path):
    results = compact_checkpoint("digits_infpi", tmp_path, Compact(rows=800, views=2), device="cpu")
    before = json.loads((zoo.card("digits_infpi") / "results.json").read_text())
    assert results["seeds"] == before["seeds"] and results["mean_accuracy"] == before["mean_accuracy"]
    assert results["compact"]["full_accuracy"] == pytest.approx(before["accuracy"], abs=1e-4)
    for quick in (False, True):
        report = pizoo.verify(tmp_path, device="cpu", quick=quick)
        assert (report.status, report.reason) == ("verified", "")


def test_what_cannot_be_fitted_is_refused_before_or_in_words(digits, monkeypatch, tmp_path):
    model, train_x, _, _ = digits
    with pytest.raises(ValueError, match="what the full net gives for x, or what enters its layers, is not finite"):
        pizoo.compact(model, torch.full_like(train_x[:50], float("nan")), 10)
    monkeypatch.setattr(Full, "__init__", lambda *_, **__: pytest.fail("the full net was asked first"))
    with pytest.raises(ValueError, match=r"rows is 1,000,000 for hidden.0"):
        pizoo.compact(model, train_x, 10**6)
    with pytest.raises(
        ValueError, match=r"a net of 13,544 \+ 13,544 rows needs no 25 MB: give fewer megabytes, or rows"
    ):
        compact_checkpoint("digits_infpi", tmp_path / "out", Compact(), device="cpu")


def test_what_is_left_open_is_as_the_recipe_says(trained, monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def asked(model, dataset, recipe, settings, *_):
        raise Asked(settings.model_dump())

    monkeypatch.setattr("pizoo.training.compact.compact_net", asked)
    said, read = Compact(megabytes=3.0, views=2), Recipe.from_dict
    monkeypatch.setattr(Recipe, "from_dict", lambda *args: read(*args).model_copy(update={"compact": said}))
    for given, found in (
        (Compact(), said),
        (Compact(rows=60, views=6), said.model_copy(update={"rows": 60, "views": 6})),
    ):
        with pytest.raises(Asked) as raised:
            compact_checkpoint(trained, tmp_path, given, device="cpu")
        assert raised.value.args[0] == found.model_dump()


def test_a_read_out_that_gives_nothing_is_made_compact():
    net = InfPiMLP(12, 3, r=8, readout_zero_init=True)
    net.hidden[0].append(torch.randn(30, 8), unit(torch.randn(30, 8))[0], 0.1)
    few = pizoo.compact(net.eval(), torch.randn(100, 12), 10)
    assert few(torch.randn(4, 12)).abs().max() < 1e-6
