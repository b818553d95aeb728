"""Files of torch.save are read without executing anything: hostile ones do nothing but be refused, in little memory."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict

import foreign
import hostile
import pytest
import torch
from test_checkpoint import flip_bit

from pizoo import layouts
from pizoo.files import CheckpointError
from pizoo.pickles import Inert, StoredTensor, read_pickled


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A folder of hostile files, and what is in each by its number."""
    folder = tmp_path_factory.mktemp("attacks")
    return folder, hostile.write(folder)


def test_the_hostile_pickles_are_hostile(attacked):
    """A control: Python's own loading executes what is in each of them."""
    folder, attacks = attacked
    made = hostile.executed_by_python(folder)
    harmless = [attacks[stem].name for stem in attacks if attacks[stem].pickle is not None and stem not in made]
    assert harmless == [] and len(made) == hostile.CALLS >= 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted as Linux does")
def test_no_hostile_file_executes_or_loads_and_each_is_refused_with_a_message_in_little_memory_and_time(attacked):
    folder, attacks = attacked
    assert len(attacks) >= 250 and not (folder / "marker").exists()
    outcomes, grown = hostile.converted_by_pizoo(folder)
    assert not (folder / "marker").is_symlink() and not (folder / "marker").exists(), "something was executed"
    assert not (folder / "made").exists(), "something was loaded"
    for stem, attack in attacks.items():
        outcome, seconds = outcomes[stem]
        assert outcome.startswith(str(folder / f"{stem}.th")), f"{attack.name}: {outcome}"
        assert len(outcome) < 600 and "\n" not in outcome, f"{attack.name}: {outcome[:1000]}"
        assert seconds < 5, f"{attack.name}: {seconds:.1f} s"
    assert 0 < grown < 200e6, f"{grown} bytes"


def test_what_is_refused_is_refused_by_its_name(tmp_path):
    for program, named in (
        (hostile.call(hostile.name("os", "system"), "true"), r"names 'os\.system', which is no part of a network"),
        (hostile.name("torch._utils", "_import_dotted_name"), r"names 'torch\._utils\._import_dotted_name'"),
        (hostile.name("torch", "load"), r"names 'torch\.load'"),
        (hostile.name("inf.pimlp", "np"), r"names 'inf\.pimlp\.np'"),
        (hostile.name("inf.pimlp", "InfPiMLP.__init__"), "names 'inf.pimlp.InfPiMLP.__init__'"),
        (hostile.name("x", "\x1b[2J" + "y" * 500), r"names 'x\.\\x1b\[2Jyyy"),
        (hostile.name("collections", "OrderedDict") + b"]\x85R", r"calls 'collections\.OrderedDict' with other"),
        (b"(N" + b"i" + b"os\nsystem\n", "has the instruction INST at byte 4"),
    ):
        (tmp_path / "net.th").write_bytes(hostile.archive(b"\x80\x02" + program + b"."))
        with pytest.raises(CheckpointError, match=named) as caught:
            read_pickled(tmp_path / "net.th", layouts.knows)
        assert "nothing in it was executed" in str(caught.value)


def test_a_storage_that_says_it_is_longer_than_the_file_is_refused_before_it_has_memory(tmp_path):
    count = 0x3FFFFFFC
    program = b"\x80\x02" + hostile.tensor(0, (count,), (1,), count) + b"."
    content = bytearray(hostile.archive(program, **{"data/0": bytes(16)}))
    entry = content.rindex(b"PK\1\2")  # its line in the index: the sizes stand 20 bytes behind
    content[entry + 20 : entry + 28] = 2 * (4 * count).to_bytes(4, "little")
    (tmp_path / "net.th").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"storage '0' of {4 * count} bytes has"):
        read_pickled(tmp_path / "net.th")


# What is read


def values():
    base = torch.randn(7, 5)
    yield {"a": base, 3: [base[2:5], (base[1], base.half()), None, True, 2**70, -1, 0.5, "ä"]}
    yield OrderedDict(x=torch.nn.Parameter(torch.ones(2, 3)), y=torch.tensor(3), z=torch.empty(0, 4))
    yield [torch.arange(5), torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bfloat16), torch.device("cpu")]


def same(found, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, StoredTensor) and torch.equal(found.read(), wanted) and found.dtype == wanted.dtype
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return type(found) is type(wanted) and all(map(same, found, wanted)) and len(found) == len(wanted)
    return str(wanted) == str(found)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_plain_values_and_tensors_come_back_as_they_were(tmp_path, legacy):
    for value in values():
        foreign.save(value, tmp_path / "value.th", legacy)
        assert same(read_pickled(tmp_path / "value.th"), value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_rows_are_read_in_blocks_of_any_size(tmp_path, legacy):
    rows = torch.randn(23, 3)
    foreign.save(rows[2:22], tmp_path / "rows.th", legacy)
    stored = read_pickled(tmp_path / "rows.th")
    for count in (1, 3, 20, 100):
        blocks = list(stored.blocks(count))
        assert [len(block) for block in blocks[:-1]] == [count] * (len(blocks) - 1)
        assert torch.equal(torch.cat(blocks), rows[2:22])
    assert torch.equal(stored.first(4).read(), rows[2:6])


def test_a_view_in_another_order_is_refused_only_when_it_is_read(tmp_path):
    torch.save(torch.ones(3, 4).T, tmp_path / "net.th")
    stored = read_pickled(tmp_path / "net.th")
    assert stored.shape == (4, 3)
    with pytest.raises(CheckpointError, match=r"shape \[4, 3\] that is not contiguous"):
        stored.read()


def test_an_object_becomes_its_name_and_attributes_and_only_when_it_is_known(tmp_path):
    foreign.save(foreign.growable(torch.ones(4, 2)), tmp_path / "net.th")
    found = read_pickled(tmp_path / "net.th", lambda name: name == "inf.dynamicarray.DynArr")
    assert isinstance(found, Inert) and found.name == "inf.dynamicarray.DynArr" and found.state["size"] == 4
    with pytest.raises(CheckpointError, match=r"names 'inf\.dynamicarray\.DynArr'"):
        read_pickled(tmp_path / "net.th")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_whatever_is_done_to_a_files_bytes_it_is_refused_or_read(tmp_path, legacy):
    """Bits flipped, bytes cut out and put in: nothing but a CheckpointError comes out, and no net that cannot be."""
    rng, path = random.Random(0), tmp_path / "net.th"
    foreign.save(foreign.few_shot_state(_net()), path, legacy)
    content, refused = path.read_bytes(), 0
    for case in range(250):
        at = rng.randrange(min(len(content), 4000) if case % 2 else len(content))
        if case % 3:
            flip_bit(path, at, rng.randrange(8))
        else:
            path.write_bytes(content[:at] + rng.randbytes(rng.randrange(8)) + content[at + rng.randrange(8) :])
        try:
            found = read_pickled(path, layouts.knows)
            tensors = layouts.understand(found, path).tensors
            for tensor in tensors.values():
                tensor.read()
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
        path.write_bytes(content)
    assert refused > 80


def _net():
    from test_convert import infinite

    return infinite(bias_alpha=0.5)
