"""The zoo: cards say what recipes say, and one net is the same net through pizoo, timm and torch.hub."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import pizoo
from pizoo import functional, zoo
from pizoo.config import build, describe
from pizoo.data import epoch_order, load_dataset
from pizoo.evaluation.accuracy import within
from pizoo.files import CheckpointError, read_tensors, sha256
from pizoo.models import FinPiMLP, InfPiMLP, KernelRegressor, MuMLP, NNGPRegressor
from pizoo.optim import PiSGD, clip_grad_norm_, param_groups
from pizoo.recipes import list_recipes, load_recipe
from pizoo.rows import growing_layers

REPOSITORY = Path(__file__).parent.parent
LARGEST_FILE = 25 * 1000**2
LARGER_AS_IT_IS = {"tinyimagenet32_finpi_r400": 25.1 * 1000**2}  # a finite net has the weights it has
CLASSES = {"infpi": InfPiMLP, "finpi": FinPiMLP, "mu": MuMLP}
ENTRIES = zoo.list_entries()
SHIPPED = [entry for entry in ENTRIES if zoo.has_weights(entry)]
NETS = [f"digits_{kind}" for kind in CLASSES]


def timm_name(entry: str) -> str:
    config = zoo.config(entry)
    return f"{config['architecture']}.{config['pretrained_cfg']['tag']}"


@pytest.fixture(scope="module")
def digits():
    """(normalised test images, labels) of split 0."""
    dataset = load_dataset("digits")
    return load_recipe("digits_infpi").data.normalize(dataset.test_x), dataset.test_y


# Names


def test_every_recipe_has_a_card_and_every_card_a_recipe():
    assert list_recipes() == ENTRIES == pizoo.list_entries()


def test_entries_are_listed_by_glob():
    assert pizoo.list_entries("digits_*") == [f"digits_{kind}" for kind in ("finpi", "infpi", "mu", "nngp", "ntk")]
    assert pizoo.list_entries("*_infpi") == ["cifar10_infpi", "digits_infpi", "omniglot_infpi"]
    assert pizoo.list_entries("digits_[im]*") == ["digits_infpi", "digits_mu"]
    assert pizoo.list_entries("resnet*") == []


def test_an_unknown_name_is_answered_with_the_nearest():
    for function in (pizoo.load, pizoo.verify, pizoo.evaluate):
        with pytest.raises(
            zoo.UnknownEntryError, match=r"no entry is called 'digit_infpi'; did you mean 'digits_infpi'\?"
        ):
            function("digit_infpi")
    with pytest.raises(zoo.UnknownEntryError, match=r"no entry is called 'zzz'; `pizoo list`, or pizoo\.list_entries"):
        pizoo.load("zzz")


def test_a_name_of_timms_is_answered_with_the_entrys():
    for entry in pizoo.list_entries("*_infpi"):
        config = zoo.config(entry)
        name = f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
        with pytest.raises(zoo.UnknownEntryError, match=rf"no entry is called '{name}'; timm calls '{entry}' so"):
            pizoo.load(name)


@pytest.mark.parametrize("path", ["/no/such/dir", "runs/none", Path("none")])
def test_a_path_that_leads_nowhere_is_neither_an_entry_nor_a_folder(path):
    for function in (pizoo.load, pizoo.verify, pizoo.evaluate):
        with pytest.raises(zoo.UnknownEntryError, match=f"'{path}' is neither an entry nor a folder; `pizoo list`"):
            function(path)


def test_what_cannot_be_had_pretrained_says_so_and_what_to_do():
    for load in (pizoo.load, lambda entry: timm.create_model(timm_name(entry), pretrained=True)):
        with pytest.raises(zoo.WeightsNotFoundError, match="no weights of 'imagenet32_infpi_r200' exist") as caught:
            load("imagenet32_infpi_r200")
        for remedy in (
            "pizoo train imagenet32_infpi_r200",
            "convert",
            "'tinyimagenet32_infpi_r200'",
            "pretrained=False",
        ):
            assert remedy in str(caught.value)
    untrained = pizoo.load("imagenet32_infpi_r200", pretrained=False)
    assert (untrained.d_in, untrained.num_classes, untrained.r) == (3072, 250, 200)


def test_a_tuned_kernel_goes_by_its_entrys_name_and_is_no_entry_of_its_own(tmp_path, monkeypatch):
    for name in ("digits_nngp", "digits_nngp/tuned", "digits_ntk"):
        shutil.copytree(zoo.card(name.partition("/")[0]), tmp_path / name)
    monkeypatch.setattr(zoo, "cards_dir", lambda: tmp_path)
    assert pizoo.list_entries() == ["digits_nngp", "digits_ntk"]
    assert pizoo.list_entries("*/tuned") == pizoo.list_entries("digits_n*/tuned") == ["digits_nngp/tuned"]
    assert zoo.card("digits_nngp/tuned") == tmp_path / "digits_nngp" / "tuned"
    assert pizoo.verify("digits_nngp/tuned", quick=True).status == "verified"
    with pytest.raises(zoo.UnknownEntryError):
        zoo.card("digits_ntk/tuned")


def test_a_name_cannot_lead_out_of_the_cards_folder(tmp_path):
    with pytest.raises(zoo.UnknownEntryError):
        zoo.card("../recipes")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        pizoo.load(tmp_path)


# Cards and recipes


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_card_says_what_the_recipe_says(entry):
    config, recipe = zoo.config(entry), load_recipe(entry)
    if zoo.has_weights(entry):
        recipe = recipe.with_seed(json.loads((zoo.card(entry) / "results.json").read_text())["shipped_seed"])
    own = {key: value for key, value in config.items() if key != "pizoo"}
    assert own == json.loads(json.dumps(recipe.config(config["class_names"])))
    described = json.loads(json.dumps(describe(recipe.build_model())))
    if recipe.compact and zoo.has_weights(entry):  # it ships smaller than it trains
        described["rows_dtype"] = recipe.compact.dtype
    found = {key: config["pizoo"][key] for key in described}
    for description in (described, found):
        description["hparams"].pop("train_fingerprint", None)
    assert found == described
    assert len(config["class_names"]) == config["num_classes"] == recipe.data.classes


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_card_has_a_readme_that_names_the_entry_and_its_number(entry):
    text = (zoo.card(entry) / "README.md").read_text()
    assert text.startswith("---\n") and "license: mit" in text
    if zoo.has_weights(entry):
        assert f'pizoo.load("{entry}")' in text
        assert f"**{json.loads((zoo.card(entry) / 'results.json').read_text())['accuracy']:.2f}**" in text
    else:
        assert f"pizoo train {entry}" in text and "No weights yet" in text
        assert f'pizoo.load("{entry}", pretrained=False)' in text and "re-measures" not in text


@pytest.mark.parametrize("entry", SHIPPED)
def test_a_card_changed_in_what_decides_the_net_is_refused(entry, tmp_path):
    folder = Path(shutil.copytree(zoo.card(entry), tmp_path / entry))
    config = json.loads((folder / "config.json").read_text())
    for change in (
        lambda c: c["pizoo"]["hparams"].update(d_out=11),
        lambda c: c["recipe"]["data"].update(scale=c["recipe"]["data"]["scale"] + 1),
        lambda c: c["recipe"]["data"].update(mean=[0.5]),
    ):
        changed = copy.deepcopy(config)
        change(changed)
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="are not those it was written with"):
            pizoo.load(folder)


@pytest.mark.parametrize("entry", SHIPPED)
def test_shipped_files_are_small_and_are_the_ones_recorded(entry):
    folder, digests = zoo.card(entry), zoo.config(entry)["pizoo"]["files"]
    assert digests.keys() == {"model.safetensors", "probe.safetensors"}
    for name, digest in digests.items():
        assert sha256(folder / name) == digest
    largest = LARGER_AS_IT_IS.get(entry, LARGEST_FILE)
    assert all(path.stat().st_size <= largest for path in folder.rglob("*"))
    wanted = {
        "README.md",
        "config.json",
        "model.safetensors",
        "probe.safetensors",
        "results.json",
        "correct.safetensors",
    }
    recipe = load_recipe(entry)
    wanted |= {"curves.png"} if recipe.train else set()
    wanted |= {"sizes.png"} if recipe.compact else set()
    assert {path.name for path in folder.iterdir()} == wanted | ({"tuned"} if recipe.tune else set())


@pytest.mark.parametrize("entry", SHIPPED)
def test_recorded_numbers_hang_together(entry):
    results = json.loads((zoo.card(entry) / "results.json").read_text())
    recipe = load_recipe(entry)
    seeds = results["seeds"]
    assert [run["seed"] for run in seeds] == list(range(recipe.seeds))
    shipped = next(run for run in seeds if run["seed"] == results["shipped_seed"])
    # Of a compact net, the net it was made of. 16-bit weights compute in 16 bits while they train, in 32 once loaded.
    trained = results["compact"]["full_accuracy"] if "compact" in results else results["accuracy"]
    if recipe.transfer is not None:  # that compact net is compared by what it classifies itself
        trained = results["transfer"]["source"]["accuracy"]
        assert results["accuracy"] == results["transfer"]["accuracy"] == pytest.approx(shipped["accuracy"], abs=0.1)
    else:
        assert within(recipe.tolerance.verify, trained, shipped["accuracy"])
    assert results["entry"] == entry
    assert results["mean_accuracy"] == pytest.approx(sum(run["accuracy"] for run in seeds) / len(seeds))
    if recipe.train is not None:
        assert all(run["epochs"] == recipe.train.epochs for run in seeds)
        history = results["history"]
        assert len(history) == recipe.train.epochs
        if recipe.tasks is None:
            assert within(recipe.tolerance.verify, history[-1]["test_accuracy"], trained)
        if recipe.transfer is not None:
            tried = [max(epoch["transfer"]["validation_accuracies"]) for epoch in history if "transfer" in epoch]
            assert results["best_epoch"]["accuracy"] == results["transfer"]["validation_accuracy"] == max(tried)
        if recipe.tasks is not None:
            chosen = history[results["best_epoch"]["epoch"] - 1]["validation_accuracy"]
            assert chosen == results["best_epoch"]["accuracy"] == max(epoch["validation_accuracy"] for epoch in history)
            assert results["splits"][recipe.tasks.headline]["accuracy"] == results["accuracy"]


@pytest.mark.parametrize("entry", [entry for entry in SHIPPED if entry.startswith("digits_")])
def test_what_ships_verifies_and_classifies_digits(entry):
    report = pizoo.verify(entry, device="cpu")
    assert (report.status, report.reason) == ("verified", "")
    assert report.measured == pytest.approx(report.recorded, abs=0.05) and report.measured > 90
    assert pizoo.verify(entry, device="cpu", quick=True).status == "verified" or "ntk" in entry or "nngp" in entry


# Loading


@pytest.mark.parametrize("entry", NETS)
def test_a_net_loads_in_eval_mode_with_its_config(entry, digits):
    model = pizoo.load(entry)
    assert type(model) is CLASSES[entry.removeprefix("digits_")] and not model.training
    assert model.config == zoo.config(entry) and model.pretrained_cfg["input_size"] == [1, 8, 8]
    x, y = digits
    assert (model(x).argmax(1) == y).double().mean() > 0.9


@pytest.mark.parametrize("entry", ["digits_infpi", "cifar10_mu", "digits_ntk"])
def test_untrained_nets_need_no_weights(entry):
    model = pizoo.load(entry, pretrained=False)
    assert model.config == zoo.config(entry)
    if isinstance(model, KernelRegressor):
        assert len(model.dual) == 0
    else:
        hparams = zoo.config(entry)["pizoo"]["hparams"]
        assert model(torch.randn(2, hparams["d_in"])).shape == (2, hparams["d_out"])
        assert describe(model)["hparams"] == hparams


def test_a_loaded_net_refuses_images_whose_channels_come_last_and_takes_vectors():
    x = torch.rand(4, 3, 32, 32)
    told = (
        r"x holds items of shape \[32, 32, 3\]; this net takes images \[C, H, W\] of \[3, 32, 32\], .* vectors of 3072"
    )
    for entry in ("cifar10_infpi", "cifar10_finpi", "cifar10_mu"):
        model = pizoo.load(entry, pretrained=False)
        torch.testing.assert_close(model(x), model(x.flatten(1)))
        for call in (model, model.features, copy.deepcopy(model)):
            with pytest.raises(ValueError, match=told):
                call(x.permute(0, 2, 3, 1))
        with pytest.raises(ValueError, match=r"support_x holds items of shape \[32, 32, 3\]; this net takes"):
            model.adapt(x.permute(0, 2, 3, 1), torch.arange(4), 0.1)
        by_hand = type(model)(**model.hparams)
        by_hand.load_state_dict(model.state_dict())
        torch.testing.assert_close(by_hand(x.view(4, 32, 32, 3)), model(x))
    kernel = pizoo.load("cifar10_ntk", pretrained=False)
    with pytest.raises(ValueError, match=told):
        kernel.attach(x.permute(0, 2, 3, 1))
    grey = pizoo.load("digits_mu")  # one channel is first and last
    x = torch.rand(4, 1, 8, 8)
    for same in (x.flatten(1), x[:, 0], x.permute(0, 2, 3, 1)):
        assert torch.equal(grey(same), grey(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_a_loaded_net_compiles_whole_and_refuses_the_same_images():
    model = pizoo.load("cifar10_mu", pretrained=False)
    compiled, x = torch.compile(model, fullgraph=True), torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(ValueError, match="this net takes images"):
        model(x.permute(0, 2, 3, 1))


def test_dtype_and_device_reach_the_net():
    for entry in NETS:
        model = pizoo.load(entry, device=torch.device("cpu"), dtype=torch.float64)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {p.device.type for p in pizoo.load("digits_mu", pretrained=False, device="meta").parameters()} == {"meta"}


def test_an_entry_without_weights_says_how_to_get_them():
    (entry, *_) = [entry for entry in ENTRIES if entry not in SHIPPED] or [None]
    if entry is None:
        pytest.skip("every entry has weights")
    with pytest.raises(zoo.WeightsNotFoundError, match=rf"`pizoo train {entry}`.*pretrained=False"):
        pizoo.load(entry)


def test_a_training_loads_from_its_folder_at_any_epoch(tmp_path):
    overrides = ("model.r=8", "data.subset=40", "train.epochs=2")
    trained = pizoo.train("digits_infpi", tmp_path / "run", overrides=overrides, device="cpu")
    x = torch.randn(3, 1, 8, 8)
    for path in (tmp_path / "run", str(tmp_path / "run")):
        torch.testing.assert_close(pizoo.load(path)(x), trained.model(x))
        torch.testing.assert_close(pizoo.load(path, epoch=2)(x), trained.model(x))
        first = pizoo.load(path, epoch=1)
        assert first.output.count == trained.model.output.count - 40
        assert first.config["recipe"] == trained.recipe.to_dict()
    assert pizoo.evaluate(tmp_path / "run", epoch=1)["accuracy"] == trained.history[0]["test_accuracy"]


def test_a_regressor_whose_images_ship_predicts_at_once(digits):
    model = pizoo.load("digits_nngp")
    x, y = digits
    assert isinstance(model, NNGPRegressor) and (model(x).argmax(1) == y).double().mean() > 0.9


# timm


@pytest.mark.parametrize("entry", NETS)
def test_timm_creates_the_same_net(entry, digits):
    name = timm_name(entry)
    assert name.endswith(".digits")
    x = digits[0][:50]
    created = timm.create_model(name, pretrained=True)
    with torch.no_grad():
        assert torch.equal(created.eval()(x), pizoo.load(entry)(x))
    assert created.pretrained_cfg["mean"] == zoo.config(entry)["pretrained_cfg"]["mean"]


def test_timm_lists_every_network_and_which_have_weights_under_their_tags():
    names = [timm_name(entry) for entry in ENTRIES if zoo.config(entry)["architecture"]]
    for name in names:
        assert name.partition(".")[0] in timm.list_models("*pi_mlp_*") + timm.list_models("mu_mlp_*")
    for entry in NETS:
        assert timm_name(entry) in timm.list_models(pretrained=True)
    assert not timm.list_models("*nngp*") and not timm.list_models("*ntk*")


def test_timm_without_weights_or_with_something_it_does_not_take():
    name = timm_name("digits_infpi")
    assert timm.create_model(name.partition(".")[0]).output.count < pizoo.load("digits_infpi").output.count
    with pytest.raises(TypeError, match="takes pretrained and num_classes; got drop_rate"):
        timm.create_model(name, drop_rate=0.5)


@pytest.mark.parametrize("entry", NETS)
@pytest.mark.parametrize("k", [3, 12])
def test_another_number_of_classes_is_a_fresh_read_out_on_the_same_features(entry, k, digits):
    x = digits[0][:20]
    loaded = pizoo.load(entry)
    created = timm.create_model(timm_name(entry), pretrained=True, num_classes=k).eval()
    reset = pizoo.load(entry)
    reset.reset_classifier(k)
    for model in (created, reset):
        with torch.no_grad():
            assert model(x).shape == (20, k) and model.num_classes == model.hparams["d_out"] == k
            assert torch.equal(model.features(x), loaded.features(x))
        assert model.config["num_classes"] == len(model.config["class_names"]) == k
        assert model.config["recipe"] == loaded.config["recipe"] and zoo.config(entry)["num_classes"] == 10
    rebuilt = build(describe(reset))
    rebuilt.load_state_dict(reset.state_dict())


@pytest.mark.parametrize("entry", NETS)
def test_zero_classes_are_features_as_timm_has_it(entry, digits):
    x = digits[0][:20]
    created, loaded = timm.create_model(timm_name(entry), pretrained=True, num_classes=0).eval(), pizoo.load(entry)
    with torch.no_grad():
        assert torch.equal(created(x), loaded.forward_features(x)) and created(x).shape == (20, created.num_features)


# torch.hub


def test_torch_hub_lists_and_explains_every_entry(monkeypatch):
    # These two know GitHub only: let the clone that they would make be this one.
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: str(REPOSITORY))
    assert sorted(torch.hub.list("owner/pizoo")) == ENTRIES
    text = torch.hub.help("owner/pizoo", "digits_infpi")
    assert zoo.config("digits_infpi")["recipe"]["description"] in text and "pretrained" in text


def test_torch_hub_loads_the_same_nets(digits):
    x = digits[0][:20]
    images = torch.randn(3, 3, 32, 32)
    for entry, inputs in {**dict.fromkeys((*NETS, "digits_ntk"), x), "cifar10_infpi": images}.items():
        model = torch.hub.load(str(REPOSITORY), entry, source="local", pretrained=True)
        with torch.no_grad():
            assert torch.equal(model(inputs), pizoo.load(entry)(inputs))
    untrained = torch.hub.load(str(REPOSITORY), "cifar10_infpi", source="local", pretrained=False, dtype=torch.float64)
    assert untrained.input.A.dtype == torch.float64


def test_the_infinite_net_on_cifar10_is_compact_says_so_and_grows_on(caplog):
    probe = read_tensors(zoo.card("cifar10_infpi") / "probe.safetensors")
    x, y = probe["x"], probe["logits"].argsort(1)[:, -2]  # its second choice, to be learned as its first
    with caplog.at_level("INFO", logger="pizoo"):
        model = torch.hub.load(str(REPOSITORY), "cifar10_infpi", source="local")
    assert re.search(
        r"a compact net, 22,292 \+ 11,146 rows for the full net's 2,500,400 \+ 2,500,400, 6\d\.\d\d %", caplog.text
    )
    model.train()
    optimizer = PiSGD(param_groups(model, lr=0.01), lr=0.01)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model, 0.4, per_param=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    grown = {name: layer.count for name, layer in model.growing_layers.items()}
    assert grown == {"hidden.0": 22_292 + 5 * len(x), "output": 11_146 + 5 * len(x)}


def test_importing_pizoo_imports_nothing_that_only_recipes_training_or_plots_need():
    code = """
import sys, timm, huggingface_hub, safetensors, opt_einsum
before = set(sys.modules)
import pizoo, hubconf
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"yaml", "pydantic", "typer", "rich", "matplotlib", "sklearn"}))
print(sorted({"pydantic", "typer", "matplotlib", "sklearn"} & set(sys.modules)))
print([name for name in sys.modules if name.startswith(("pizoo.recipes", "pizoo.training", "pizoo.cli"))])
assert set(pizoo.__all__) <= set(dir(pizoo))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "[]"], done.stdout + done.stderr


# Features and fine-tuning


@pytest.mark.parametrize("entry", NETS)
def test_the_feature_kernel_is_symmetric_and_positive_and_what_its_formula_says(entry, digits):
    model, x, y = pizoo.load(entry), digits[0][:40], digits[0][40:70]
    K = pizoo.feature_kernel(model, x, batch_size=16)
    assert K.shape == (40, 40)
    torch.testing.assert_close(K, K.T)
    assert torch.linalg.eigvalsh(K.double()).min() > -1e-5
    torch.testing.assert_close(K.diagonal(), torch.full((40,), 0.5))
    with torch.no_grad():
        formula = (
            functional.feature_kernel_from_preactivations
            if isinstance(model, InfPiMLP)
            else functional.feature_kernel_from_postactivations
        )
        wanted = formula(model.features(x), model.features(y))
    torch.testing.assert_close(pizoo.feature_kernel(model, x, y), wanted)
    torch.testing.assert_close(pizoo.feature_kernel(model, x, y), pizoo.feature_kernel(model, y, x).T)


def test_the_feature_kernel_leaves_the_mode_and_refuses_what_has_no_features(digits):
    model = pizoo.load("digits_mu").train()
    pizoo.feature_kernel(model, digits[0][:4])
    assert model.training
    with pytest.raises(TypeError, match="NNGPRegressor"):
        pizoo.feature_kernel(pizoo.load("digits_nngp"), digits[0][:4])


@pytest.mark.parametrize("entry", NETS)
def test_fine_tuning_with_the_ordinary_loop_lowers_the_loss_and_appends_rows(entry):
    """Zeros against the rest: a new read-out, then a few steps on 64 digits."""
    dataset = load_dataset("digits", subset=64)
    model = pizoo.load(entry)
    torch.manual_seed(0)
    model.reset_classifier(2)
    x, y = zoo.preprocessing(model.config)(dataset.train_x), (dataset.train_y > 0).long()
    before = {name: layer.count for name, layer in growing_layers(model).items()}
    settings = model.config["recipe"]["train"]
    multipliers = {key: settings[key] for key in ("first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult")}
    optimizer = PiSGD(param_groups(model, lr=0.1, **multipliers), lr=0.1)
    with torch.no_grad():
        start = nn.functional.cross_entropy(model(x), y).item()
    model.train()
    for epoch in range(4):
        for batch in epoch_order(64, 0, epoch).split(16):
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            clip_grad_norm_(model, 0.4, per_param=True)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(x), y).item() < 0.9 * start
    assert {name: layer.count for name, layer in growing_layers(model).items()} == {
        name: count + 4 * 64 for name, count in before.items()
    }


def test_a_revision_of_what_lies_on_this_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"revision is 'main'.*no revisions"):
        pizoo.load("digits_mu", revision="main")


def test_a_device_is_the_cpu_or_a_gpu(monkeypatch):
    for device in ("gpu", "mps"):
        with pytest.raises(ValueError, match=f"device is '{device}'; it must be cpu or cuda"):
            pizoo.load("digits_infpi", device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(RuntimeWarning, match="device is 'cuda', but no GPU is in reach"):
        assert pizoo.load("digits_infpi", device="cuda").output.device.type == "cpu"
