"""Checkpoints of the paper's code: each layout becomes the net it was, to the bit, and what is not understood is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import foreign
import pytest
import torch
from test_checkpoint import assert_same, flip_bit
from test_golden import Golden, files

import pizoo
from pizoo import convert, layouts, zoo
from pizoo.config import complete
from pizoo.convert import compare
from pizoo.files import CheckpointError, read_tensors, write_json
from pizoo.models import FinPiMLP, InfPiMLP, MuMLP
from pizoo.recipes import load_recipe
from pizoo.rows import growing_layers

ROOT = Path(__file__).parent.parent
INFINITE = {
    "plain": {"bias_alpha": 0.5, "first_layer_alpha": 2.0, "last_layer_alpha": 0.25},
    "deep, no bias at the read-out": {"bias_alpha": 1.414214, "last_bias_alpha": 0.0, "hidden_layers": 4},
    "no bias, layernorm": {"bias_alpha": 0.0, "layernorm": True},
    "one hidden layer": {"bias_alpha": 1.0, "hidden_layers": 1, "readout_zero_init": True},
}
FINITE = {
    "FinPiMLP": lambda: FinPiMLP(6, 3, width=9, r=4, bias_alpha=0.5, first_layer_alpha=2.0, last_layer_alpha=0.25),
    "no bias at the read-out": lambda: FinPiMLP(6, 3, width=9, r=4, last_bias_alpha=0.0),
    "MuMLP": lambda: MuMLP(6, 3, width=9, bias_alpha=4.0, hidden_layers=3),
}


def infinite(dtype: torch.dtype = torch.float16, rows: int = 20, **hparams) -> InfPiMLP:
    """A net of which every number is its own, with ``rows`` rows and more in each layer."""
    torch.manual_seed(0)
    model = InfPiMLP(6, 3, r=4, rows_dtype=dtype, **hparams)
    with torch.no_grad():
        for i, layer in enumerate(growing_layers(model).values()):
            B = torch.nn.functional.normalize(torch.randn(rows + i, 4), dim=1)
            layer.append(torch.randn(rows + i, layer.A.shape[1]), B, torch.randn(rows + i))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def entry_of(model, folder: Path) -> Path:
    """A folder whose config.json is that of an entry ``model`` is a net of."""
    config = {"recipe": {"published": {"accuracy": 50.0}}, "class_names": ["a", "b", "c"]}
    write_json(folder / "config.json", complete(config, type(model)(**model.hparams), {}))
    return folder


@pytest.fixture
def given(tmp_path):
    """A net, its entry, and a file with room for changes: a function of the dictionary of its converter."""
    model = infinite(bias_alpha=0.5)
    return model, entry_of(model, tmp_path / "entry"), tmp_path / "net.th"


def same_function(folder: Path, model) -> None:
    loaded = pizoo.load(folder)
    assert_same(loaded.state_dict(), model.state_dict())
    x = torch.randn(5, model.d_in)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-7)
    assert loaded.config["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", foreign.INFINITE)
@pytest.mark.parametrize("name", INFINITE)
def test_an_infinite_net_comes_over_to_the_bit(layout, name, legacy, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SEGMENT_BYTES", 200)
    model = infinite(**INFINITE[name])
    foreign.save(foreign.INFINITE[layout](model), tmp_path / "net.th", legacy)
    if layout == "newer_state" and INFINITE[name].get("layernorm"):
        assert "layernorm" not in layouts.understand(convert.read_pickled(tmp_path / "net.th"), tmp_path).stated
    done = convert.convert(tmp_path / "net.th", entry_of(model, tmp_path / "entry"), tmp_path / "made")
    same_function(tmp_path / "made", model)
    assert done.rows == {name: layer.count for name, layer in growing_layers(model).items()}
    assert len(list((tmp_path / "made").glob("rows-*"))) > len(done.rows)
    assert pizoo.load(tmp_path / "made").config["converted"] == {"file": "net.th", "layout": done.layout}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "made", "net.th"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", foreign.FINITE)
@pytest.mark.parametrize("name", FINITE)
def test_a_finite_net_comes_over_to_the_bit(layout, name, legacy, tmp_path):
    model = FINITE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    foreign.save(foreign.FINITE[layout](model), tmp_path / "net.th", legacy)
    convert.convert(tmp_path / "net.th", entry_of(model, tmp_path / "entry"), tmp_path / "made")
    same_function(tmp_path / "made", model)
    probe = read_tensors(tmp_path / "made" / "probe.safetensors")
    torch.testing.assert_close(pizoo.load(tmp_path / "made")(probe["x"]), probe["logits"])


def test_a_net_sampled_before_it_became_a_mu_net_leaves_its_samples_behind(tmp_path):
    source, model = FinPiMLP(6, 3, width=9, r=4), MuMLP(6, 3, width=9)
    saved = foreign.pickled_finite(model)
    saved.omegas = foreign.omegas(source)
    foreign.save(saved, tmp_path / "net.th")
    convert.convert(tmp_path / "net.th", entry_of(model, tmp_path / "entry"), tmp_path / "made")
    same_function(tmp_path / "made", model)


@files("infpi")
def test_states_of_the_papers_own_code_give_its_own_outputs(path, tmp_path):
    golden = Golden(path)
    model = golden.infinite_net("final")
    foreign.save(foreign.pickled(model), tmp_path / "net.th")
    convert.convert(tmp_path / "net.th", entry_of(model, tmp_path / "entry"), tmp_path / "made")
    golden.check("out_final", pizoo.load(tmp_path / "made", dtype=torch.float64)(golden["X_test"]))


def test_an_alpha_rounded_by_the_file_is_the_entrys_and_the_files_number_is_kept(tmp_path):
    model = infinite(bias_alpha=0.594604)
    found = foreign.newer_state(model)
    rounded = torch.tensor(0.594604).half()
    found |= {key: rounded for key in found if key.endswith("bias_alpha")}
    foreign.save(found, tmp_path / "net.th")
    convert.convert(tmp_path / "net.th", entry_of(model, tmp_path / "entry"), tmp_path / "made")
    assert pizoo.load(tmp_path / "made").hparams["bias_alpha"] == rounded.item() != 0.594604


# What is another net, or not understood


def refused(given, found, message: str) -> None:
    _, entry, file = given
    foreign.save(found, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert.convert(file, entry, file.parent / "made")
    assert "net.th" in str(caught.value)
    assert sorted(path.name for path in file.parent.iterdir()) == ["entry", "net.th"], "left something behind"


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"bias_alpha": 0.51}, r"bias_alpha is 0\.51 in the file, 0\.5 in the entry"),
        ({"last_bias_alpha": 0.0}, r"last_bias_alpha is 0\.0 in the file, 0\.5 in the entry"),
        ({"first_layer_alpha": 2.0}, r"first_layer_alpha is 2\.0"),
        ({"layernorm": True}, "layernorm is True in the file, False in the entry"),
        ({"hidden_layers": 3}, "hidden_layers is 3 in the file, 2 in the entry"),
    ],
)
def test_a_net_of_other_hyper_parameters_than_the_entrys_is_refused_with_both(given, hparams, message):
    refused(given, foreign.dictionary(infinite(**{"bias_alpha": 0.5, **hparams})), message)


def test_a_net_of_another_kind_than_the_entrys_is_refused(given):
    refused(
        given, foreign.pickled_finite(FINITE["FinPiMLP"]()), r"holds a finite net pickled whole .*; .* is a InfPiMLP"
    )
    with pytest.raises(CheckpointError, match="digits_ntk is a kernel"):
        convert.convert(given[2], "digits_ntk", given[2].parent / "made")
    with pytest.raises(ValueError, match="did you mean 'digits_mu'"):
        convert.convert(given[2], "digits_mo", given[2].parent / "made")


def change(found, key, value):
    *path, last = key if isinstance(key, tuple) else (key,)
    inner = found
    for part in path:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return found


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("Amult", None, "without 'Amult': a dictionary of .*: 'first_layer_alpha'"),
        ("layernorm", None, "without 'layernorm'"),
        ("layernorm", "no", "whose 'layernorm' is a str; wanted is a bool"),
        ("bias_alpha", float("nan"), "whose 'bias_alpha' is nan; wanted is a finite number"),
        ("As", [1, 2], "whose 'As' is a list; wanted is a dict"),
        (("As", 2), None, r"whose As is a dictionary of 2: 1, 3; wanted are layers 1, 2, \.\.\."),
        (("As", 2), [1.0], "whose 2 is a list; wanted is a StoredTensor or Inert"),
        (("As", 1), torch.zeros(6), "whose first A is a tensor of shape"),
        (("biases", 2), None, "with biases without 2"),
        (("Bs", 3), torch.ones(7, 4).half(), r"not whole: .*output\.B \[7, 4\].*one M"),
        (("Bs", 3), torch.ones(25, 5).half(), "not whole"),
        (("Amult", 2), torch.ones(3), "not whole"),
        (("biases", 1), torch.ones(3), r"input\.bias has shape \[3\]; it must be \[4\]"),
        (("As", 2), torch.ones(24, 4, dtype=torch.int64), "one floating-point dtype was wanted"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_with_what_was_found_and_wanted(given, key, value, message):
    refused(given, change(foreign.dictionary(given[0]), key, value), message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers.1.extra", torch.ones(1), r"with 'layers\.1\.extra', which is not known there"),
        (
            "layers.1.bias_alpha",
            torch.tensor(0.25),
            r"layers\.1 whose bias_alpha is 0\.25, though its bias_alpha is 0\.5",
        ),
        ("layers.1.A", None, "without 'A'"),
        ("layers.0.bias", None, "without 'bias'"),
        ("layers.7.A", torch.ones(1), r"with layers \[0, 1, 2, 7\]"),
        ("last_layer_alpha", None, "without 'last_layer_alpha'"),
        ("last_layer_alpha", torch.ones(2), "whose 'last_layer_alpha' is a tensor of shape"),
    ],
)
def test_a_state_dict_with_more_or_less_than_is_known_is_refused(given, key, value, message):
    refused(given, change(foreign.newer_state(given[0]), key, value), message)


def test_a_bias_that_the_newer_library_adds_though_its_alpha_is_zero_is_refused(tmp_path):
    model = infinite(bias_alpha=0.0)
    given = model, entry_of(model, tmp_path / "entry"), tmp_path / "net.th"
    refused(given, change(foreign.newer_state(model), "layers.2.bias", torch.ones(3)), "adds it all the same")


def test_growable_arrays_say_how_many_rows_are_in_use_and_no_others_are_believed(given):
    found = foreign.few_shot_state(given[0])
    found["As"][2].size = len(found["As"][2].arr) + 1
    refused(given, found, r"uses 52 rows of a tensor of shape \[51, 4\]|uses \d+ rows")
    found = foreign.few_shot_state(given[0])
    for part in ("As", "Bs", "Amult"):
        found[part][2].size += 1
    refused(given, found, "amult of hidden.0 is not finite in row 24")


def test_rows_that_cannot_be_rows_are_refused(given):
    found = foreign.dictionary(given[0])
    found["Bs"][2][5] *= 2
    refused(given, found, r"row 5 of B of hidden\.0 has norm 2; rows of B have norm 1")
    found = foreign.dictionary(given[0])
    found["As"][3][7, 1] = torch.inf
    refused(given, found, r"A of output is not finite in row 7")


@pytest.mark.parametrize("value", [{}, [1], 5, {"model": {"layers.0.A": torch.ones(2, 2)}}, torch.ones(3)])
def test_what_is_no_network_is_refused_with_what_is_known(given, value):
    refused(given, value, "known are a pickled InfPiMLP or FinPiMLP, dictionaries As, Bs, Amult and biases")


def test_a_folder_that_is_there_is_left_alone(given):
    foreign.save(foreign.dictionary(given[0]), given[2])
    with pytest.raises(FileExistsError, match="entry is there already"):
        convert.convert(given[2], given[1], given[1])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(given, legacy):
    foreign.save(foreign.dictionary(given[0]), given[2], legacy)
    content = given[2].read_bytes()
    for length in range(0, len(content), 97):
        given[2].write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"net\.th"):
            convert.convert(given[2], given[1], given[2].parent / "made")


def test_a_flipped_bit_of_a_number_is_seen_by_the_archives_check_sum(given):
    foreign.save(foreign.dictionary(given[0]), given[2])
    with zipfile.ZipFile(given[2]) as archive:
        entries = [entry for entry in archive.infolist() if re.search(r"/data/\d+$", entry.filename)]
    assert len(entries) == 10
    content = given[2].read_bytes()
    for entry in entries:
        name, extra = (int.from_bytes(content[entry.header_offset + at :][:2], "little") for at in (26, 28))
        flip_bit(given[2], entry.header_offset + 30 + name + extra)
        with pytest.raises(CheckpointError, match=r"net\.th is truncated or damaged: Bad CRC-32|not finite|has norm"):
            convert.convert(given[2], given[1], given[2].parent / "made")
        given[2].write_bytes(content)
    convert.convert(given[2], given[1], given[2].parent / "made")


# What becomes of it


def test_a_converted_net_is_no_training_to_go_on_with(tmp_path):
    model = zoo.load("digits_infpi")
    foreign.save(foreign.pickled(model), tmp_path / "net.th")
    convert.convert(tmp_path / "net.th", "digits_infpi", tmp_path / "made")
    with pytest.raises(CheckpointError, match="holds a converted net, not a training"):
        pizoo.train(load_recipe("digits_infpi"), tmp_path / "made", device="cpu")


@pytest.mark.parametrize("entry", ["digits_infpi", "digits_finpi", "digits_mu"])
def test_a_converted_net_is_measured_on_its_entrys_data(entry, tmp_path):
    model = zoo.load(entry)
    saved = foreign.pickled(model) if entry == "digits_infpi" else foreign.pickled_finite(model)
    foreign.save(saved, tmp_path / "net.th")
    convert.convert(tmp_path / "net.th", entry, tmp_path / "made")
    results = json.loads((zoo.card(entry) / "results.json").read_text())
    found = compare(tmp_path / "made", entry)
    measured = pytest.approx(results["accuracy"], abs=1e-9)  # the same images
    assert (found.measured, found.recorded, found.reason) == (measured, results["mean_accuracy"], "")


LARGE = """
import sys
from memory import forget_peak, peak
from pizoo import convert

convert.SEGMENT_BYTES = 1 << 22
before = forget_peak()
convert.convert(*sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted as Linux does")
def test_a_file_larger_than_the_memory_it_takes(tmp_path):
    """300 MB of rows, converted in a third of that."""
    model, rows = zoo.load("digits_infpi"), 750_000
    found = foreign.dictionary(model)
    for layer, width in ((2, 64), (3, 10)):
        found["As"][layer] = torch.ones(rows, width, dtype=torch.float16)
        found["Bs"][layer] = torch.full((rows, 64), 1 / 8, dtype=torch.float16)
        found["Amult"][layer] = torch.ones(rows)
    foreign.save(found, tmp_path / "net.th")
    del found
    assert (size := (tmp_path / "net.th").stat().st_size) > 300e6
    arguments = [tmp_path / "net.th", "digits_infpi", tmp_path / "made"]
    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]!r}\n{LARGE}"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < size / 3, f"{size} bytes took {done.stdout}"
    assert sum(path.stat().st_size for path in (tmp_path / "made").glob("rows-*")) > 0.9 * size
