"""The command line: what it prints, what it writes, and that exit codes and one-line errors can be relied on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import pizoo
from pizoo import functional, kernels, zoo
from pizoo.cli import console
from pizoo.config import read_config
from pizoo.data import load_dataset
from pizoo.files import CheckpointError, read_tensors, write_tensors
from pizoo.models import InfPiMLP
from pizoo.recipes import Compact, load_recipe
from pizoo.training.compact import compact_checkpoint
from pizoo.training.trial import step_seconds

README = Path(__file__).parent.parent / "README.md"
TINY = ("--set", "data.subset=200", "--set", "train.epochs=2")
TINY_NET = ("--set", "model.r=16", *TINY)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch, tmp_path):
    """No data but what is in the package, and nothing written where the tests run."""
    monkeypatch.setenv("PIZOO_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def card(tmp_path):
    """A copy of an entry's card, to be changed."""

    def copy(entry: str) -> Path:
        return Path(shutil.copytree(zoo.card(entry), tmp_path / "cards" / entry))

    return copy


def digit_file(path: Path, i: int) -> tuple[Path, int]:
    """Test image i of the digits as a grey PNG, and its label."""
    dataset = load_dataset("digits")
    pixels = (dataset.test_x[i, 0].double() * 255 / 16).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path, int(dataset.test_y[i])


def one_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


# list, train, evaluate, predict


def test_list_shows_every_entry_with_its_number(pizoo_command):
    shown = pizoo_command("list")
    assert shown.code == 0 and "accuracy" not in shown.out and "shipped net" in shown.out  # not the mean over seeds
    for entry in pizoo.list_entries():
        (line,) = [line for line in shown.out.splitlines() if line.split()[:1] == [entry]]
        if zoo.has_weights(entry):
            recorded = json.loads((zoo.card(entry) / "results.json").read_text())["accuracy"]
            assert f"{recorded:.2f}" in line and "here" in line
        else:
            assert "train it" in line
    some = pizoo_command("list", "digits_*").out
    assert "digits_mu" in some and "cifar10_mu" not in some


def test_train_writes_a_checkpoint_that_evaluate_measures_the_same(pizoo_command, tmp_path):
    trained = pizoo_command("train", "digits_infpi", *TINY_NET)
    assert trained.code == 0, trained.err
    results = json.loads((tmp_path / "runs" / "digits_infpi" / "results.json").read_text())
    assert f"{results['accuracy']:.2f}" in trained.out and "runs/digits_infpi" in trained.out
    recipe = zoo.checkpoint.read_config(tmp_path / "runs" / "digits_infpi")["recipe"]
    assert (recipe["model"]["r"], recipe["train"]["epochs"], recipe["data"]["subset"]) == (16, 2, 200)
    last = pizoo_command("evaluate", "runs/digits_infpi")
    assert last.code == 0 and f"{results['accuracy']:.2f}" in last.out and "449" in last.out
    first = pizoo_command("evaluate", "runs/digits_infpi", "--epoch", 1)
    assert f"{results['history'][0]['test_accuracy']:.2f}" in first.out


@pytest.fixture
def readme_example(tmp_path):
    """README's example of own data: writes its recipe and the images it speaks of, returns its commands."""
    text = README.read_text().partition("Your own data")[2]
    recipe, commands = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL).group(1) for kind in ("yaml", "sh"))
    (tmp_path / "mine.yaml").write_text(recipe)
    rng = np.random.RandomState(0)
    for part, n in (("train", 20), ("test", 5)):
        for brightness, name in ((90, "cat"), (170, "dog")):
            folder = tmp_path / "my_images" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = (brightness + 40 * rng.randn(36, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return [shlex.split(line, comments=True)[1:] for line in commands.splitlines()]


def test_the_readmes_example_of_own_images_does_what_it_says(pizoo_command, readme_example, tmp_path):
    train, evaluate, predict = [pizoo_command(*command) for command in readme_example]
    assert (train.code, evaluate.code, predict.code) == (0, 0, 0), train.err + evaluate.err + predict.err
    accuracy = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())["accuracy"]
    assert accuracy >= 90 and f"{accuracy:.2f}" in evaluate.out and "mine test" in evaluate.out
    (line,) = [line.split() for line in predict.out.splitlines() if "my_images/test/cat/0.png" in line]
    assert line[1] == "cat" and line[3] == "dog"
    assert pizoo_command("verify", "runs/mine").code == 0


def test_the_readmes_fine_tuning_beats_a_fresh_start_with_a_frozen_trunk_too(pizoo_command, tmp_path):
    text = README.read_text().partition("**Fine-tuning**")[2]
    recipe, commands = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL).group(1) for kind in ("yaml", "sh"))
    (tmp_path / "high.yaml").write_text(recipe)
    source, tuned, scratch = (shlex.split(line, comments=True)[1:] for line in commands.splitlines())
    accuracies = []
    for command in (source, tuned, scratch, (*tuned, "--freeze", "input,hidden", "--out", "runs/frozen")):
        assert (shown := pizoo_command(*command)).code == 0, shown.err
        folder = Path(command[command.index("--out") + 1] if "--out" in command else "runs/high")
        accuracies.append(json.loads((folder / "results.json").read_text())["accuracy"])
    _, tuned_accuracy, scratch_accuracy, frozen_accuracy = accuracies
    assert min(tuned_accuracy, frozen_accuracy) > scratch_accuracy + 3


@pytest.mark.parametrize(
    ("shape", "stated"), [((32, 32, 3), {}), ((16,), {"input_size": [16], "scale": 1.0, "mean": None, "std": None})]
)
def test_the_readmes_example_takes_an_npz_of_images_or_vectors(pizoo_command, readme_example, tmp_path, shape, stated):
    rng, labels = np.random.RandomState(0), np.arange(40) % 2
    images = rng.randn(40, *shape) + np.where(labels, 2, -2).reshape(-1, *[1] * len(shape))
    images = (127 + 20 * images).clip(0, 255).astype(np.uint8) if len(shape) == 3 else images
    parts = {"train_images": images, "train_labels": labels, "test_images": images[:10], "test_labels": labels[:10]}
    np.savez(tmp_path / "my.npz", **parts)
    changes = [f"data.{key}={json.dumps(value)}" for key, value in {"path": "my.npz", **stated}.items()]
    train, evaluate, _ = readme_example
    shown = pizoo_command(*train, *(word for change in changes for word in ("--set", change)))
    assert shown.code == 0, shown.err
    assert "100.00" in pizoo_command(*evaluate).out


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_path_goes_on_in_the_next_line_and_no_column_is_cut(pizoo_command, card, monkeypatch, width):
    monkeypatch.setattr(console, "out", Console(width=width))
    long = card("digits_mu").rename(card("digits_infpi").parent / "_".join(12 * ["a[long]name"]))
    shown = pizoo_command("verify", "--quick", long)
    assert shown.code == 0 and "…" not in shown.out
    table = re.search(r"─ ?\n(.*)accuracies in percent", shown.out, re.DOTALL).group(1).splitlines()
    assert all(len(line) <= width for line in table) and len(table) > 3
    assert "".join(line.split()[0] for line in table if line.strip()) == str(long)
    assert table[0].split()[1:3] == ["verified", "probe"]


def test_a_line_keeps_a_path_whole_with_brackets_in_it(pizoo_command, card, monkeypatch):
    monkeypatch.setattr(console, "out", Console(width=80))
    cards = card("digits_nngp").parent
    cards = cards.rename(cards.with_name("[old] " + "_".join(20 * ["cards"])))
    assert f"card in {cards / 'digits_nngp'}\n" in pizoo_command("card", "digits_nngp", "--cards", cards).out


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("verify", "--quick", "digits_*", "imagenet32_mu"), ("train", "imagenet32_infpi_r200", "--dry-run")],
)
def test_in_80_columns_no_word_is_broken_and_what_is_left_out_is_named(pizoo_command, monkeypatch, arguments):
    def lines(width):
        monkeypatch.setattr(console, "out", Console(width=width))
        shown = pizoo_command(*arguments).out
        return shown, [line for line in shown.splitlines() if re.match(r"[a-z0-9]+_\w+  ", line)]

    wide, narrow = lines(200), lines(80)
    measured = re.compile(r"[\d.]+ (s|min|hours|days|GiB)\b")  # anew each time

    def cells(line):
        return set(re.split(r"\s{2,}", measured.sub("MEASURED", line).strip()))

    assert all(len(line) <= 80 for line in narrow[1]) and len(narrow[1]) == len(wide[1]) > 0
    for cut, whole in zip(narrow[1], wide[1], strict=True):
        assert cells(cut) <= cells(whole)
    left_out = re.search(r"no room here for: (.*)", narrow[0])[1].split(", ")
    assert "no room" not in wide[0] and all(f"  {column}" in wide[0] for column in left_out)


def test_help_says_what_quick_checks(pizoo_command):
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", pizoo_command("verify", "--help").out).split())
    assert "Of kernel entries it checks what a few training images contribute" in shown
    assert "a GPU if there is one" in shown  # in square brackets it would be taken for markup, and vanish


def test_several_seeds_are_trained_side_by_side_and_summed_up(pizoo_command, tmp_path):
    shown = pizoo_command("train", "digits_infpi", *TINY_NET, "--seeds", "0,2")
    assert shown.code == 0, shown.err
    results = json.loads((tmp_path / "runs" / "digits_infpi" / "results.json").read_text())
    assert [run["seed"] for run in results["seeds"]] == [0, 2]
    for run in results["seeds"]:
        (line,) = [line for line in shown.out.splitlines() if f"seed {run['seed']}" in line]
        assert f"{run['accuracy']:.2f}" in line and f"(epoch {run['best_epoch']['epoch']})" in line
    assert f"{results['mean_accuracy']:.2f} ± {results['standard_error']:.2f} %, 2 runs from" in shown.out
    alone = pizoo_command("evaluate", "runs/digits_infpi/seed-2")
    assert f"{results['seeds'][1]['accuracy']:.2f}" in alone.out
    refused = pizoo_command("train", "digits_infpi", "--seeds", "2-0")
    assert refused.code == 2 and one_line(refused.err)


def test_verify_says_what_it_measured_on_fewer_images(pizoo_command):
    shown = pizoo_command("verify", "digits_mu", "digits_ntk", "--images", 20)
    assert shown.code == 0 and "of the first 20 test images" in shown.out
    assert pizoo_command("verify", "digits_mu", "--images", 20, "--quick").code == 2
    assert "of the first 449 test images, as" in pizoo_command("verify", "digits_mu", "--images", 449).out
    more = pizoo_command("verify", "digits_mu", "--images", 100_000)
    assert more.code == 0 and "of the first 449 test images, all there are, as recorded" in more.out


def test_train_goes_on_after_an_interruption_as_it_says(pizoo_command, tmp_path, monkeypatch):
    from pizoo.training import supervised

    with monkeypatch.context() as patch:
        real = supervised.Training._step

        def interrupted(self, step, *args):
            if step == 14:
                raise KeyboardInterrupt
            return real(self, step, *args)

        patch.setattr(supervised.Training, "_step", interrupted)
        stopped = pizoo_command("train", "digits_infpi", *TINY_NET, "--out", tmp_path / "run")
    assert stopped.code == 130 and "the same command goes on" in stopped.err
    assert pizoo_command("train", "digits_infpi", *TINY_NET, "--out", tmp_path / "run").code == 0
    pizoo_command("train", "digits_infpi", *TINY_NET, "--out", tmp_path / "whole")
    resumed, whole = (pizoo.load(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_predict_names_the_digit_in_an_image_file(pizoo_command, tmp_path):
    labels = {}
    for i in range(6):
        _, labels[i] = digit_file(tmp_path / f"image[{i}].png", i)
    shown = pizoo_command("predict", "digits_infpi", *sorted(tmp_path.glob("*.png")), "--top", 1)
    assert shown.code == 0, shown.err
    lines = [line.split() for line in shown.out.splitlines() if "image[" in line or "].png" in line]
    right = sum(line[1] == str(labels[i]) for i, line in enumerate(lines))
    assert len(lines) == 6 and right >= 5
    # A file counts its pixels from 0 to 255, the data set from 0 to 16: the net must see the same.
    model, dataset = pizoo.load("digits_infpi"), load_dataset("digits")
    with torch.no_grad():
        wanted = model(zoo.preprocessing(model.config)(dataset.test_x[:6])).softmax(1).amax(1)
    assert [float(line[2]) for line in lines] == pytest.approx(wanted.tolist(), abs=0.01)


def test_predict_by_a_kernel_takes_its_training_images_or_says_which_it_needs(pizoo_command, tmp_path):
    own_run(tmp_path, "nngp, depth: 1, ridge: 0.1", size=(1, 4, 4))
    assert pizoo_command("train", tmp_path / "mine.yaml", "--out", tmp_path / "run").code == 0
    left = np.repeat([[255, 255, 0, 0]], 4, 0).astype(np.uint8)
    for name, pixels in (("left", left), ("right", left[:, ::-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    shown = pizoo_command("predict", tmp_path / "run", tmp_path / "left.png", tmp_path / "right.png", "--top", 1)
    assert shown.code == 0, shown.err
    images = torch.from_numpy(np.load(tmp_path / "mine.npz")["train_images"])
    scores = pizoo.load(tmp_path / "run").attach(images)(torch.tensor(np.stack([left, left[:, ::-1]]) / 255))
    said = re.findall(r"(?:left|right)\.png +(\d) +(\S+)", shown.out)
    assert [(int(label), float(score)) for label, score in said] == [
        (int(row.argmax()), pytest.approx(row.max().item(), rel=0.01)) for row in scores
    ]
    (tmp_path / "mine.npz").unlink()
    missing = {
        tmp_path / "run": "mine.npz is not there",
        "cifar10_nngp": "Make the file with `pizoo data prepare cifar10`",
    }
    for entry, told in missing.items():
        shown = pizoo_command("predict", entry, tmp_path / "left.png", "--data", tmp_path / "nowhere")
        assert shown.code == 2 and one_line(shown.err) and told in shown.err
        assert f"{entry} is a kernel, which predicts from its training images: " in shown.err


# verify


def test_verified_is_exit_code_0_and_the_json_says_what_the_table_says(pizoo_command, tmp_path):
    shown = pizoo_command("verify", "digits_[im]*", "--json", tmp_path / "reports.json")
    assert shown.code == 0, shown.out + shown.err
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert [report["entry"] for report in reports] == ["digits_infpi", "digits_mu"]
    for report in reports:
        recorded = json.loads((zoo.card(report["entry"]) / "results.json").read_text())
        assert report["status"] == "verified" and report["reason"] == "" and report["check"] == "test accuracy"
        assert report["recorded"] == recorded["accuracy"] == pytest.approx(report["measured"], abs=0.05)
        assert report["mean"] == recorded["mean_accuracy"] and report["seeds"] == len(recorded["seeds"])
        assert report["reproduction"] == "no published number" and report["published"] is None
        assert f"{report['measured']:.2f}" in shown.out
    assert shown.out.count("verified") == 2


def test_a_number_that_was_not_measured_is_a_mismatch(pizoo_command, card, tmp_path):
    folder = card("digits_mu")
    results = json.loads((folder / "results.json").read_text())
    results["accuracy"] -= 0.1  # less than one test image
    del results["correct_sha256"]  # which would tell on it before anything is measured
    (folder / "results.json").write_text(json.dumps(results))
    shown = pizoo_command("verify", folder, "--json", tmp_path / "reports.json")
    assert shown.code == 1 and "further apart than 0.05 points" in shown.out
    (report,) = json.loads((tmp_path / "reports.json").read_text())
    assert report["status"] == "mismatch" and report["measured"] == pytest.approx(report["recorded"] + 0.1)


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_a_flipped_bit_is_a_mismatch(pizoo_command, card, quick):
    folder = card("digits_infpi")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "model.safetensors").write_bytes(content)
    shown = pizoo_command("verify", folder, *quick)
    assert shown.code == 1 and "model.safetensors has SHA-256" in shown.out


def test_other_weights_with_a_digest_made_to_fit_are_a_mismatch(pizoo_command, card):
    """The probe is what finds a net that is intact, and another."""
    folder = card("digits_mu")
    state = read_tensors(folder / "model.safetensors")
    state["layers.0.weight"] = state["layers.0.weight"] + 0.01
    config = json.loads((folder / "config.json").read_text())
    config["pizoo"]["files"]["model.safetensors"] = write_tensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    shown = pizoo_command("verify", folder, "--quick")
    assert shown.code == 1 and "the probe's logits are off by" in shown.out


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_an_unknown_entry_is_wrong_usage_and_the_nearest_is_offered(pizoo_command, command):
    shown = pizoo_command(command, "digits_infpy")
    assert shown.code == 2 and one_line(shown.err)
    assert "no entry is called 'digits_infpy'; did you mean 'digits_infpi'?" in shown.err


@pytest.mark.parametrize(
    "arguments", [("verify",), ("verify", "digits_mu", "--fast"), ("nonsense",), ("predict", "digits_mu", "none.png")]
)
def test_what_the_command_does_not_take_is_wrong_usage(pizoo_command, arguments):
    shown = pizoo_command(*arguments)
    assert shown.code == 2 and "Traceback" not in shown.err


def untrained(entry: str) -> bool:
    return entry in pizoo.list_entries() and not zoo.has_weights(entry)


def test_no_weights_is_not_run(pizoo_command, tmp_path):
    entry = next(filter(untrained, pizoo.list_entries()), None)
    if entry is None:
        pytest.skip("every entry has weights")
    shown = pizoo_command("verify", entry, "digits_mu", "--json", tmp_path / "reports.json")
    assert shown.code == 3
    reports = {report["entry"]: report for report in json.loads((tmp_path / "reports.json").read_text())}
    assert reports[entry]["status"] == "not run" and reports[entry]["measured"] is None
    assert reports["digits_mu"]["status"] == "verified"


def test_what_several_entries_lack_is_told_once(pizoo_command, tmp_path):
    without = list(filter(untrained, pizoo.list_entries("imagenet32_*")))
    assert len(without) > 1
    for quick in ((), ("--quick",)):
        shown = pizoo_command("verify", "imagenet32_*", "digits_mu", "--json", tmp_path / "reports.json", *quick)
        told = [line for line in shown.out.splitlines() if "weights" in line]
        assert shown.code == 3 and len(told) == 1
        assert told[0].startswith(f"{', '.join(without)}: no weights of 'ENTRY' exist: ")
        assert "`pizoo train ENTRY`" in told[0] and "take 'tinyENTRY'" in told[0]
        reports = json.loads((tmp_path / "reports.json").read_text())
        assert all(f"no weights of '{report['entry']}' exist" in report["reason"] for report in reports[:-1])
    shown = pizoo_command("verify", "cifar10_finpi", "cifar10_mu")
    assert shown.code == 3 and shown.out.count("Make the file with") == 1
    assert "\ncifar10_finpi, cifar10_mu: cifar10 is not at " in shown.out


def own_run(tmp_path: Path, model: str = "mu, width: 8", size: tuple[int, ...] = (5,)) -> Path:
    """A recipe on somebody's own data, ``mine.yaml``; returns the folder to train it in, ``run``."""
    rng = np.random.RandomState(0)
    labels = np.arange(20) % 2
    shape = size[-2:]  # grey images have no channels in the file
    images = (rng.randn(20, *shape) + np.where(labels, 4, -4).reshape(-1, *[1] * len(shape))).astype(np.float32)
    parts = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "mine.npz", **parts)
    (tmp_path / "mine.yaml").write_text(
        f"entry: mine\ndescription: my own\nmodel: {{kind: {model}}}\n"
        f"data: {{name: mine, path: '{tmp_path / 'mine.npz'}', classes: 2, input_size: {list(size)}, scale: 1.0}}\n"
        + ("train: {epochs: 3, batch_size: 4, lr: 0.1}\n" if model.startswith("mu") else "")
    )
    return tmp_path / "run"


def test_no_data_is_not_run_and_a_mismatch_outweighs_it(pizoo_command, card, tmp_path):
    run = own_run(tmp_path)
    assert pizoo_command("train", tmp_path / "mine.yaml", "--out", run).code == 0
    assert pizoo_command("verify", run).code == 0
    (tmp_path / "mine.npz").unlink()
    shown = pizoo_command("verify", run)
    assert shown.code == 3 and "mine.npz is not there" in shown.out
    folder = card("digits_mu")
    (folder / "probe.safetensors").write_bytes(b"")
    assert pizoo_command("verify", run, folder, "--quick").code == 1


def test_data_that_cannot_be_read_is_not_run_either(pizoo_command, tmp_path):
    run = own_run(tmp_path)
    pizoo_command("train", tmp_path / "mine.yaml", "--out", run)
    (tmp_path / "mine.npz").write_bytes(b"not an archive")
    shown = pizoo_command("verify", run.name, "digits_mu")
    assert shown.code == 3 and "mine.npz is not an .npz" in shown.out and "verified" in shown.out


def test_a_regressor_on_other_images_than_its_own_is_a_mismatch(pizoo_command, tmp_path):
    own_run(tmp_path, "nngp, depth: 1, ridge: 0.1")
    assert pizoo_command("train", tmp_path / "mine.yaml", "--out", tmp_path / "kernel").code == 0
    assert pizoo_command("verify", tmp_path / "kernel").code == 0
    with np.load(tmp_path / "mine.npz") as arrays:
        changed = {**arrays, "train_images": arrays["train_images"] + 1}
    np.savez(tmp_path / "mine.npz", **changed)
    shown = pizoo_command("verify", tmp_path / "kernel")
    assert shown.code == 1 and "fingerprint" in shown.out


def test_a_training_has_no_probe_so_quick_is_not_run(pizoo_command, tmp_path):
    run = own_run(tmp_path)
    pizoo_command("train", tmp_path / "mine.yaml", "--out", run)
    shown = pizoo_command("verify", run, "--quick")
    assert shown.code == 3 and "no probe" in shown.out


def test_a_training_without_a_test_part_is_not_run(pizoo_command, tmp_path):
    run = own_run(tmp_path)
    with np.load(tmp_path / "mine.npz") as arrays:
        kept = {key: arrays[key] for key in ("train_images", "train_labels")}
    np.savez(tmp_path / "mine.npz", **kept)
    assert pizoo_command("train", tmp_path / "mine.yaml", "--out", run).code == 0
    shown = pizoo_command("verify", run)
    assert shown.code == 3 and "accuracy" in shown.out


def test_quick_needs_no_data(pizoo_command, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a data set was read")

    monkeypatch.setattr("pizoo.zoo.load_dataset", refuse)
    shown = pizoo_command("verify", "--quick", "digits_infpi", "digits_finpi", "digits_mu")
    assert shown.code == 0, shown.out
    assert shown.out.count("verified") == 3 and shown.out.count("probe") == 3


@pytest.mark.parametrize(
    ("published", "said", "plain", "strict"),
    [(99.99, "below", 0, 1), (0.5, "above", 0, 0), (None, "reproduced", 0, 0)],
)
def test_strict_also_fails_on_a_training_below_the_published_number(
    pizoo_command, card, tmp_path, published, said, plain, strict
):
    """The two questions are kept apart: the checkpoint is what it claims whatever the paper says."""
    folder = card("digits_mu")
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    accuracy = results["mean_accuracy"] + 0.9 if published is None else published
    config["recipe"]["published"] = {"accuracy": accuracy, "source": "a paper", "protocol": "a test part"}
    if said == "below":
        results["mean_accuracy"] = 90.0
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))
    shown = pizoo_command("verify", folder, "--quick", "--json", tmp_path / "reports.json")
    (report,) = json.loads((tmp_path / "reports.json").read_text())
    assert (shown.code, report["status"], report["reproduction"]) == (plain, "verified", said)
    assert pizoo_command("verify", folder, "--quick", "--strict").code == strict


# reproduce


def test_reproduce_makes_a_card_that_verifies(pizoo_command, tmp_path, monkeypatch):
    from pizoo import recipes

    recipe = recipes.load_recipe("digits_infpi", ("model.r=8", "data.subset=100", "train.epochs=2"))
    monkeypatch.setattr(recipes, "load_recipe", lambda entry, overrides: recipe)
    arguments = ("reproduce", "digits_infpi", "--seeds", "0-1", "--cards", "cards", "--runs", "trainings")
    made = pizoo_command(*arguments)
    assert made.code == 0, made.err
    card = tmp_path / "cards" / "digits_infpi"
    results = json.loads((card / "results.json").read_text())
    assert f"{results['mean_accuracy']:.2f} ± {results['standard_error']:.2f} %, 2 runs" in made.out
    assert "; verified; " in made.out
    assert [run["seed"] for run in results["seeds"]] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "trainings" / "digits_infpi").iterdir()) == ["seed-0", "seed-1"]
    assert pizoo_command("verify", card).code == 0
    assert pizoo_command("verify", card, "--quick").code == 0
    assert pizoo.load(card).r == 8
    before = {path.name: path.read_bytes() for path in card.iterdir()}
    assert pizoo_command(*arguments).code == 0
    assert before == {path.name: path.read_bytes() for path in card.iterdir()}
    unsaid = pizoo_command("reproduce", "digits_infpi", "--add")
    assert unsaid.code == 2 and "say which, --seeds 2" in unsaid.err
    added = pizoo_command("reproduce", "digits_infpi", "--seeds", "2", "--add", "--cards", "cards", "--runs", "later")
    assert added.code == 0 and " %, 3 runs" in added.out and "; verified; " in added.out
    assert before["model.safetensors"] == (card / "model.safetensors").read_bytes()


def test_reproduce_of_a_changed_recipe_stays_out_of_the_zoos_cards(pizoo_command, tmp_path):
    changed = ("reproduce", "digits_nngp", "digits_ntk", "--seeds", 3, "--set", "data.subset=100")
    for folders in ((), ("--cards", "cards"), ("--runs", "trainings")):
        refused = pizoo_command(*changed, *folders)
        assert refused.code == 2 and "give --cards and --runs of their own" in refused.err
    made = pizoo_command(*changed, "--cards", "cards", "--runs", "trainings")
    assert made.code == 0 and made.out.count("; verified; ") == 2 and "all: " in made.out
    config = read_config(tmp_path / "cards" / "digits_ntk")
    assert (config["recipe"]["data"]["subset"], config["recipe"]["data"]["split"]) == (100, 3)


def test_a_card_that_does_not_verify_fails_the_reproduction(pizoo_command, monkeypatch):
    from pizoo.training import reproduce

    real = reproduce.percent
    monkeypatch.setattr(reproduce, "percent", lambda right: real(right) + 1)
    arguments = ("reproduce", "digits_nngp", "--seeds", "0", "--cards", "cards", "--runs", "trainings")
    made = pizoo_command(*arguments)
    assert made.code == 1 and "; mismatch; " in made.out


def test_card_writes_a_card_again_from_what_it_records(pizoo_command, card):
    folder = card("digits_nngp")
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text("")
    assert pizoo_command("card", "digits_nngp", "--cards", folder.parent).code == 0
    assert (folder / "README.md").read_text() == text


# Errors


def test_errors_are_one_line(pizoo_command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "note.png").write_text("not an image")
    pizoo_command("train", "digits_mu", *TINY, "--out", tmp_path / "run")
    wrong = {
        ("train", "digits_infpy"): 2,
        ("train", "no/such.yaml"): 2,
        ("train", "digits_mu", "--set", "train.epoch=1"): 2,
        ("train", "digits_mu", "--set", "data.input_size=[8, 8]"): 2,
        ("train", "digits_mu", "--set", "data.input_size=[d]"): 2,
        ("train", "cifar10_mu"): 2,
        ("train", "digits_mu", *TINY, "--out", tmp_path / "file"): 2,
        ("train", "digits_mu", *TINY, "--set", "train.lr=0.375", "--out", tmp_path / "run"): 1,
        ("train", "digits_mu", *TINY, "--device", "toaster"): 2,
        ("evaluate", tmp_path / "run", "--epoch", 9): 1,
        ("evaluate", tmp_path): 1,
        ("predict", "digits_mu", tmp_path / "note.png"): 2,
        ("data", "prepare", "cifar11"): 2,
    }
    for arguments, code in wrong.items():
        shown = pizoo_command(*arguments)
        assert (shown.code, one_line(shown.err)) == (code, True), (arguments, shown.code, shown.err)


def test_errors_keep_the_brackets_of_shapes_and_paths(pizoo_command, tmp_path):
    """Brackets are markup to the library that prints."""
    folder = tmp_path / "[red]" / "[d]"
    folder.mkdir(parents=True)
    shown = pizoo_command("evaluate", folder)
    assert str(folder) in shown.err and one_line(shown.err)


def test_a_training_that_diverges_says_so_in_one_line(pizoo_command, tmp_path):
    diverging = ("--set", "train.lr=1000.0", "--set", "train.clip.max_norm=null", "--set", "train.loss=mse")
    shown = pizoo_command("train", "digits_mu", *TINY, *diverging, "--out", tmp_path / "run")
    assert shown.code == 1 and one_line(shown.err) and "not finite" in shown.err


def test_a_download_that_fails_says_so_in_one_line(pizoo_command, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    shown = pizoo_command("data", "prepare", "cifar10")
    assert shown.code == 1 and one_line(shown.err) and "no network" in shown.err


def test_a_data_set_that_is_there_is_not_said_to_be_written(pizoo_command, monkeypatch, tmp_path):
    arrays = {"train_images": np.zeros((1, 32, 32, 3), np.uint8)}
    monkeypatch.setitem(
        pizoo.data.known._KNOWN, "cifar10", replace(pizoo.data.known._KNOWN["cifar10"], download=lambda scratch: arrays)
    )
    for told in (f"wrote {tmp_path / 'cifar10.npz'}\n", f"{tmp_path / 'cifar10.npz'} is there already\n"):
        assert pizoo_command("data", "prepare", "cifar10", "--data", tmp_path).out == told
    assert pizoo_command("data", "prepare", "digits").out.endswith("digits.npz is there already\n")


@pytest.mark.parametrize("module", ["pizoo", "pizoo.cli"])
def test_it_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "verify", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and one_line(done.stderr)


def test_the_version_is_the_packages(pizoo_command):
    shown = pizoo_command("--version")
    assert (shown.code, shown.out.strip()) == (0, f"pizoo {pizoo.__version__}")


def test_what_is_wrong_is_told_with_what_to_do_instead(pizoo_command, tmp_path):
    (tmp_path / "runs" / "k").mkdir(parents=True)
    own_run(tmp_path)  # which makes a data set of vectors, and no run yet
    own = tmp_path / "mine.npz"
    wrong = {
        ("overview",): f"model_cards is not in {tmp_path}: run this at the top of a clone",
        ("card", "digits_mu"): "model_cards is not in",
        ("overview", "--cards", "runs"): "run this at the top of a clone of pizoo, or give --readme FILE",
        ("train", "runs/k"): "runs/k is a folder; a recipe is an entry's name or a .yaml file.",
        ("train", "nosuch.yaml"): "there is no recipe nosuch.yaml; `pizoo list` shows the entries",
        ("train", "digits_my.yaml"): "there is no recipe digits_my.yaml; did you mean 'digits_mu'?",
        ("train", "zzz"): "no recipe is called 'zzz'; `pizoo list` shows the entries",
        ("verify", "zzz"): "no entry is called 'zzz'; `pizoo list`, or pizoo.list_entries(), gives their names",
        (
            "verify",
            "cifar11_*",
        ): "no entry matches 'cifar11_*'; did you mean 'cifar10_*'? there are cifar10_*, digits_*, ",
        (
            "list",
            "zzz[0-9]?",
        ): "no entry matches 'zzz[0-9]?'; there are cifar10_*, digits_*, imagenet32_*, omniglot_*, ",
        ("verify", "runs/*"): "'runs/*' is neither an entry nor a folder",
        ("evaluate", "infpi_mlp_r64.digits"): "timm calls 'digits_infpi' so",
        ("predict", "digits_mu", "runs"): "runs is a folder; name the image files in it: runs/*.png",
        ("kernel", "digits_mu", "--ridge", 1, "--on", own): "has items of size [5]; the net takes [1, 8, 8]",
    }
    for arguments, message in wrong.items():
        shown = pizoo_command(*arguments)
        assert shown.code == 2 and one_line(shown.err) and message in shown.err, (arguments, shown.err)
    for entry in filter(untrained, pizoo.list_entries()):
        shown = pizoo_command("verify", entry)
        assert shown.code == 3 and f"`pizoo train {entry}`" in shown.out


@pytest.mark.parametrize(
    "reason",
    [("train.freeze=[input, readout]", "model.hidden_layers=1"), ("train.init_from=digits_mu", "model.width=64")],
)
def test_a_training_that_is_refused_leaves_nothing_behind(pizoo_command, tmp_path, reason):
    command = ("train", "digits_mu", *TINY, *(word for override in reason for word in ("--set", override)))
    shown = pizoo_command(*command)
    assert shown.code == 2 and one_line(shown.err) and not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.log").write_text("of mine\n")
    pizoo_command(*command, "--out", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["train.log"]
    assert (tmp_path / "mine" / "train.log").read_text().startswith("of mine\n")
    (tmp_path / "mine" / "train.log").unlink()
    pizoo_command("train", "digits_mu", *TINY, "--out", tmp_path / "mine" / "run")
    assert {"train.log", "train.lock"} <= {path.name for path in (tmp_path / "mine" / "run").iterdir()}


# convert


def test_convert_writes_a_checkpoint_and_says_how_its_numbers_compare(pizoo_command, tmp_path):
    model, results = pizoo.load("digits_infpi"), json.loads((zoo.card("digits_infpi") / "results.json").read_text())
    foreign.save(foreign.pickled(model), tmp_path / "epoch50.th")
    shown = pizoo_command("convert", "epoch50.th", "--entry", "digits_infpi", "--out", "mine")
    assert shown.code == 0, shown.err
    assert "an infinite net pickled whole (inf.pimlp.InfPiMLP); written to mine" in shown.out
    assert f"{model.hidden[0].count:,} rows in hidden.0" in shown.out
    (line,) = [line.split() for line in shown.out.splitlines() if line.split()[:1] == ["mine"]]
    assert line == ["mine", f"{results['accuracy']:.2f}", f"{results['mean_accuracy']:.2f}", "–"]
    again = pizoo_command("convert", "epoch50.th", "--entry", "digits_infpi", "--out", "mine")
    assert again.code == 2 and one_line(again.err) and "mine is there already" in again.err
    other = pizoo_command("convert", "epoch50.th", "--entry", "cifar10_infpi", "--out", "other")
    assert other.code == 1 and one_line(other.err) and "d_in is 64 in the file, 3072 in the entry" in other.err


def test_convert_of_a_net_whose_data_are_not_here_says_so(pizoo_command, tmp_path):
    foreign.save(foreign.pickled_finite(pizoo.load("cifar10_mu", pretrained=False)), tmp_path / "epoch50.th")
    shown = pizoo_command("convert", "epoch50.th", "--entry", "cifar10_mu")
    assert shown.code == 0, shown.err
    assert "written to runs/epoch50" in shown.out and "61.31" in shown.out
    assert "not measured:" in shown.out and "cifar10.npz" in shown.out


def test_a_plan_needs_no_data(pizoo_command, tmp_path):
    found = pizoo_command("train", "imagenet32_infpi_r200", "--dry-run", "--data", tmp_path, "--set", "train.epochs=26")
    assert "imagenet32 is not here; planned for 320,000 training images" in found.out
    assert "8,320,200" in found.out and "520,000" in found.out  # rows a layer; steps
    assert "measuring transfer takes 37.3 GiB beside: a kernel of 50,000 images of cifar10" in found.out
    missing = pizoo_command(
        "train", "cifar10_mu", "--dry-run", "--data", tmp_path, "--set", "data.keep=[1, 2]", "--set", "data.classes=2"
    )
    assert missing.code == 2 and "cifar10 is not at" in missing.err


def test_a_plan_says_how_long_a_finite_net_will_take(pizoo_command, tmp_path):
    command = ("train", "digits_mu", "--set", "train.epochs=3", "--out", tmp_path / "run")
    assert pizoo_command(*command).code == 0
    took = json.loads((tmp_path / "run" / "results.json").read_text())["train_seconds"]
    recipe = load_recipe("digits_mu")
    said = step_seconds(recipe, 1348, torch.device("cpu")) * 3 * 169
    assert took / 5 < said < 5 * took  # other processes may have come or gone
    planned = pizoo_command("train", "digits_mu", "--dry-run", "--out", tmp_path / "none")
    assert planned.code == 0 and re.search(r"about [\d.]+ s", planned.out) and not (tmp_path / "none").exists()


def test_a_plan_of_huge_batches_takes_no_more_images_than_there_are():
    assert 0 < step_seconds(load_recipe("digits_mu", ["train.batch_size=1000"]), 1348, torch.device("cpu")) < 5


def test_more_tasks_a_step_are_seen_to_take_longer():
    few, many = (["model.width=64", f"train.batch_size={size}"] for size in (2, 128))
    short, long = (step_seconds(load_recipe("omniglot_mu", s), 0, torch.device("cpu")) for s in (few, many))
    assert 0 < short < long


@pytest.mark.parametrize(
    ("entry", "why"), [("digits_infpi", "in host memory as it is, on a CPU"), ("digits_mu", "of this kind has no rows")]
)
def test_rows_on_the_host_where_that_changes_nothing_is_said(pizoo_command, entry, why):
    for arguments in ((*TINY, "--device", "cpu"), ("--dry-run", "--device", "cpu")):
        found = pizoo_command("train", entry, *arguments, "--rows-on", "host")
        assert (
            found.code == 0 and f"{entry}: rows_on is 'host', which changes nothing" in found.err and why in found.err
        )
    assert pizoo_command("train", entry, "--dry-run", "--device", "cpu").err == ""


def test_a_kernel_goes_to_a_file_or_into_a_regression(pizoo_command, tmp_path):
    net, digits = pizoo.load("digits_infpi"), load_dataset("digits")
    x = pizoo.zoo.preprocessing(net.config)(torch.cat([digits.train_x, digits.test_x]))
    found = pizoo_command("kernel", "digits_infpi", "--out", tmp_path / "K.npy", "--ridge", "0.01")
    assert found.code == 0 and "1,797 x 1,797, 1,348 training images, then 449 test images" in found.out
    K = torch.from_numpy(np.load(tmp_path / "K.npy"))
    torch.testing.assert_close(K, pizoo.feature_kernel(net, x))
    dual = functional.solve_ridge(K[:1348, :1348].double(), functional.centred_one_hot(digits.train_y, 10), 0.01)
    accuracy = 100 * ((K[1348:, :1348].double() @ dual).argmax(1) == digits.test_y).double().mean().item()
    assert f"{accuracy:.2f}" in found.out
    small = pizoo_command("kernel", "digits_mu", "--ridge", "1", "--ridge", "0.01", "--subset", "300", "--iterative")
    assert small.code == 0 and "300 / 449" in small.out and small.out.count("on held-out training images") == 2
    own = {"train_images": digits.train_x[:, 0].numpy(), "train_labels": digits.train_y.numpy()}
    np.savez(tmp_path / "own.npz", **own, test_images=digits.test_x[:, 0].numpy(), test_labels=digits.test_y.numpy())
    mine = pizoo_command("kernel", "digits_infpi", "--on", tmp_path / "own.npz", "--ridge", "0.01")
    assert mine.code == 0 and "own" in mine.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits_infpi"], "give --out FILE.npy, --ridge 1e-4, or both"),
        (["digits_infpi", "--ridge", "0"], "ridge is 0.0; it must be positive"),
        (["digits_infpi", "--out", "K.txt"], "out is 'K.txt'; it must end in .npy"),
        (["nowhere", "--out", "K.txt"], "out is 'K.txt'; it must end in .npy"),  # before anything is loaded
        (["nowhere", "--ridge", "1", "--tolerance", "1e-3"], "tolerance is 0.001; it is one of iterative solutions"),
        (["nowhere", "--ridge", "1", "--iterative", "--tolerance", "0"], "tolerance is 0.0; it must be positive"),
        (["nowhere", "--ridge", "1", "--iterative", "--tolerance", "inf"], "tolerance is inf; it must be positive"),
        (["digits_nngp", "--ridge", "1"], "model is a NNGPRegressor; the feature kernel is of an InfPiMLP"),
        (["digits_infpi", "--ridge", "1", "--on", "nowhere"], "'nowhere' is neither a data set (cifar10, digits"),
        (["digits_infpi", "--ridge", "1", "--subset", "9999"], "subset is 9999; it must be 1 to 1348"),
        (["imagenet32_mu", "--ridge", "1"], "no weights of 'imagenet32_mu' exist"),
    ],
)
def test_a_kernel_that_cannot_be_made_is_refused(pizoo_command, arguments, message):
    found = pizoo_command("kernel", *arguments)
    assert found.code in (1, 2) and message in found.err.replace("\n", " ")


def test_a_regression_without_test_images_is_refused_before_features_are_computed(pizoo_command, tmp_path, monkeypatch):
    digits = load_dataset("digits")
    own = {"train_images": digits.train_x[:, 0].numpy(), "train_labels": digits.train_y.numpy()}
    np.savez(tmp_path / "own.npz", **own)
    command = ("kernel", "digits_mu", "--on", tmp_path / "own.npz", "--out", tmp_path / "K.npy")
    with monkeypatch.context() as patch:
        patch.setattr("pizoo.evaluation.kernel.featured", lambda *args: pytest.fail("computed features"))
        refused = pizoo_command(*command, "--ridge", "1")
    assert refused.code == 2 and "'own' has no test part" in refused.err
    assert pizoo_command(*command).code == 0 and (tmp_path / "K.npy").exists()


@pytest.mark.parametrize("ridges", [1, 2, 25])
def test_a_kernel_that_does_not_fit_is_refused_before_features_are_computed(pizoo_command, monkeypatch, ridges):
    command = ("kernel", "digits_infpi", *(word for k in range(ridges) for word in ("--ridge", 0.1 + k)))
    features = 12 * 64 * 1797  # in float32 and float64
    factored, decomposed = (
        kernels.kernel_bytes(n, n, 8, torch.device("cpu"), copies)
        for n, copies in ((1348, kernels.FACTORED), (1078, kernels.DECOMPOSED))
    )
    needed = features + (decomposed if ridges == 25 else factored)
    monkeypatch.setattr(kernels, "free_memory", lambda device: needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr("pizoo.evaluation.kernel.featured", lambda *args: pytest.fail("computed features"))
        refused = pizoo_command(*command)
        assert refused.code == 1 and one_line(refused.err)
        assert "would fit; or take fewer training images (--subset), or solve iteratively (--iterative)" in refused.err
    assert pizoo_command(*command, "--subset", 300).code == 0
    monkeypatch.setattr(kernels, "free_memory", lambda device: needed)
    assert pizoo_command(*command).code == 0
    if ridges < 25:
        monkeypatch.setattr(kernels, "free_memory", lambda device: 0)
        assert pizoo_command(*command, "--subset", 300, "--iterative").code == 0


def test_ridges_are_not_told_apart_by_images_that_the_net_was_trained_on(pizoo_command, tmp_path):
    digits, told = (
        load_dataset("digits"),
        "was trained on these images, the held-out ones too, which do not tell ridges apart",
    )
    own = {"train_images": digits.train_x[:, 0].numpy(), "train_labels": digits.train_y.numpy()}
    np.savez(tmp_path / "own.npz", **own, test_images=digits.test_x[:, 0].numpy(), test_labels=digits.test_y.numpy())
    small = ("--subset", 100, "--ridge", 1)
    for data, trained_on in (((), True), (("--on", "digits"), True), (("--on", tmp_path / "own.npz"), False)):
        two = pizoo_command("kernel", "digits_mu", *small, "--ridge", 0.1, *data)
        assert two.code == 0 and (f"digits_mu {told}: choose on other data, --on\n" in two.out) == trained_on
        assert told not in pizoo_command("kernel", "digits_mu", *small, *data).out
    own_run(tmp_path)
    pizoo_command("train", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    for data, trained_on in ((tmp_path / "mine.npz", True), ("mine.npz", True), (tmp_path / "copy.npz", False)):
        shutil.copy(tmp_path / "mine.npz", tmp_path / "copy.npz")
        mine = pizoo_command("kernel", tmp_path / "run", "--ridge", 1, "--ridge", 0.1, "--on", data)
        assert mine.code == 0 and (told in mine.out) == trained_on


def test_what_needs_data_says_that_a_net_saved_without_a_recipe_records_none(pizoo_command, tmp_path):
    model, image = InfPiMLP(64, 10, r=4), digit_file(tmp_path / "image.png", 0)[0]
    model.save_pretrained(tmp_path / "mine")
    commands = [("evaluate",), ("kernel", "--ridge", 1), ("kernel", "--ridge", 1, "--on", "digits"), ("predict", image)]
    for command, *more in commands:
        found = pizoo_command(command, tmp_path / "mine", *more)
        assert found.code == 1 and one_line(found.err)
        assert f"{tmp_path / 'mine'} records no data and no preprocessing: save_pretrained" in found.err
    with pytest.raises(CheckpointError, match="records no data and no preprocessing"):
        pizoo.evaluate(pizoo.load(tmp_path / "mine"))
    with pytest.raises(CheckpointError, match="records no data and no preprocessing"):
        compact_checkpoint(tmp_path / "mine", tmp_path / "compact", Compact())


def test_probabilities_are_not_called_accuracies(pizoo_command, tmp_path):
    digit_file(tmp_path / "image.png", 0)
    assert "accuracies" not in pizoo_command("predict", "digits_mu", tmp_path / "image.png").out
