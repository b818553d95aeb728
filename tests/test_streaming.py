"""Rows that stay in host memory: the same function, trained and evaluated, in the memory that was promised.

What needs no GPU is tested without: the walk over chunks, where layers keep their rows, plans, and running out of memory.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_cli import one_line
from test_ops import CUDA, OPS, TOLERANCE, Case, brain, byte, call, error, half, rows, single
from torch import nn

import pizoo
from pizoo import checkpoint, memory, ops, segments, stored
from pizoo.memory import HEADROOM, NotEnoughMemory, empty_on_host, explained, free_memory, to_host
from pizoo.models import InfPiMLP
from pizoo.nn import InfPiLinear
from pizoo.ops import streamed
from pizoo.optim import PiSGD, clip_grad_norm_, param_groups
from pizoo.recipes import RecipeError, load_recipe
from pizoo.rows import growing_layers
from pizoo.training import plan as planning
from pizoo.training import supervised
from pizoo.training.plan import plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")
N = 40
TINY = (
    "model.r=8",
    "train.epochs=3",
    f"data.subset={N}",
    "train.batch_size=16",
    "train.lr=0.1",
    "train.weight_decay=0.01",
)
MOMENTUM = ("train.momentum=0.9", "train.apply_lr_mult_to_wd=true")


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA device")(test))


def tiny(*more: str):
    return load_recipe("digits_infpi", (*TINY, *more))


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


# The walk over chunks

# Rows in a chunk, then M: fewer than a chunk, exactly one, one row more, many and a rest; chunks of a single row.
WALKS = [(64, 1), (64, 63), (64, 64), (64, 65), (64, 1000), (1, 5)]


def chunks_of(monkeypatch, size: int, case: Case) -> None:
    multipliers = 2 if case.dtype == byte else 1
    row_bytes = case.dtype.itemsize * (case.r + case.r_out) + multipliers * max(4, case.dtype.itemsize)
    monkeypatch.setattr(streamed, "CHUNK_BYTES", size * row_bytes)


@pytest.mark.parametrize("dtype", [byte, half, brain, single, torch.float64], ids=str)
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_streamed_ops_match_the_definition(monkeypatch, walk, dtype):
    size, M = walk
    case = Case(M, 7, 5, 3, dtype, unused=70, stride=16)
    chunks_of(monkeypatch, size, case)
    inputs = rows(case, CPU)
    for op in OPS:
        result = call(streamed, op, *inputs)
        assert error(result, op, *inputs) <= TOLERANCE[torch.float64 if dtype == torch.float64 else single]
        assert all(torch.equal(x, y) for x, y in zip(result, call(streamed, op, *inputs), strict=True))


def test_every_row_in_use_crosses_once_through_two_buffers(monkeypatch):
    case = Case(1000, 7, 5, 3, unused=70)
    chunks_of(monkeypatch, 64, case)
    _, A, B, amult, _, count, _ = rows(case, CPU)
    crossed, places = [], set()
    for chunk in streamed.chunks(CPU, count, A, B, amult):
        crossed.append([part.clone() for part in chunk])
        places.add(chunk[0].data_ptr())
    assert [len(chunk[0]) for chunk in crossed] == [64] * 15 + [40] and len(places) == streamed.BUFFERS
    for part, pieces in zip((A, B, amult), zip(*crossed, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), part[:1000])


def test_rows_on_another_device_than_the_inputs_are_streamed():
    """On "meta", which has shapes and no values; the results' device is the inputs'."""
    gbar, A, B, amult, delta, *_ = rows(Case(20, 5, 3, 4, single), CPU)
    gbar, delta = gbar.to("meta"), delta.to("meta")
    out, grad = ops.growing_forward(gbar, A, B, amult), ops.growing_backward(gbar, A, B, amult, delta)
    assert (out.device.type, out.shape, grad.device.type, grad.shape) == ("meta", (4, 3), "meta", (4, 5))


# Where a layer keeps its rows


def layer_pair(dtype: torch.dtype = half) -> tuple[InfPiLinear, InfPiLinear]:
    """The same layer twice, the second one's rows kept on the host, both with room reserved."""
    torch.manual_seed(0)
    ordinary = InfPiLinear(4, 3, role="readout", dtype=half)
    ordinary.to_rows_dtype(dtype)
    ordinary.reserve(20)
    kept = copy.deepcopy(ordinary).keep_rows_on("host")
    kept.reserve(20)
    return ordinary, kept


def through_pickle(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    pickle.dump(layer, buffer)
    return pickle.loads(buffer.getvalue())


def reloaded(layer: InfPiLinear) -> InfPiLinear:
    other = InfPiLinear(4, 3, role="readout", dtype=half).keep_rows_on(layer.rows_on)
    other.to_rows_dtype(layer.A.dtype)
    other.load_state_dict(layer.state_dict())
    return other


CHANGES = {
    "float64": lambda layer: layer.double(),
    "device": lambda layer: layer.to("cpu"),
    "copy": copy.deepcopy,
    "pickle": through_pickle,
    "state": reloaded,
    "folded": lambda layer: layer.fold_decay() or layer,
    "cast": lambda layer: layer.to_rows_dtype(single) or layer,
    "cast to int8": lambda layer: layer.to_rows_dtype(byte) or layer,
    "back and forth": lambda layer: layer.keep_rows_on("device").keep_rows_on("host"),
}


@pytest.mark.parametrize("dtype", [half, byte], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_with_its_rows_on_the_host_is_the_same_layer(change, dtype):
    for layer in (pair := layer_pair(dtype)):
        layer.append(torch.ones(5, 3), torch.eye(5, 4), torch.arange(5.0))
        layer.decay = 0.5
    ordinary, kept = (CHANGES[change](layer) for layer in pair)
    for layer in (ordinary, kept):
        layer.append(torch.full((2, 3), 1e-6), torch.eye(2, 4), 3.0)
    assert kept.rows_on == "host"
    assert_same(kept.state_dict(), ordinary.state_dict())
    assert {name: t.dtype for name, t in kept.state_dict().items()} == {
        n: t.dtype for n, t in ordinary.state_dict().items()
    }
    g = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(kept(g), ordinary(g))


def test_rows_on_the_host_stay_there_when_the_net_is_moved():
    torch.manual_seed(0)
    net = InfPiMLP(d_in=6, d_out=3, r=4, rows_dtype=byte).keep_rows_on("host")
    places = {name: layer.A.data_ptr() for name, layer in net.growing_layers.items()}
    net.to("meta")
    for name, layer in net.growing_layers.items():
        assert {str(part.device) for part in (layer.A, layer.B)} == {"cpu"} and layer.A.data_ptr() == places[name]
        on_the_device = (layer.amult, layer.bmult, layer.bias)
        assert {str(part.device) for part in on_the_device} == {"meta"} and layer.device.type == "meta"
    assert [name for name, _ in net.output.named_parameters()] == ["A", "B", "bias"]


def test_room_reserved_moves_with_the_rows():
    ordinary, kept = layer_pair()
    assert kept.capacity == ordinary.capacity == 20
    storage = kept.storages[0].data_ptr()
    kept.append(torch.ones(16, 3), torch.ones(16, 4), 1.0)
    assert kept.storages[0].data_ptr() == storage and kept.count == 20
    assert kept.double().capacity == 20 and kept.keep_rows_on("device").capacity == 20


def test_a_new_readout_keeps_its_rows_where_and_as_the_old_one_did():
    net = InfPiMLP(d_in=6, d_out=3, r=4, rows_dtype=byte).keep_rows_on("host")
    net.reset_classifier(5)
    assert net.output.rows_on == "host" and net.output.A.dtype == byte
    with pytest.raises(ValueError, match=r"rows_on is 'disk'; it must be one of 'device', 'host'$"):
        net.keep_rows_on("disk")


def test_samples_of_a_net_do_not_depend_on_where_its_rows_are():
    torch.manual_seed(0)
    net = InfPiMLP(d_in=6, d_out=3, r=4, rows_dtype=half)
    omegas = [torch.randn(9, 4) for _ in range(2)]
    wanted = net.sample(9, omegas).state_dict()
    assert_same(net.keep_rows_on("host").sample(9, omegas).state_dict(), wanted)


# Page-locked memory


class FakeCuda:
    """CUDA's calls to page-lock memory, noted; ``refuses`` makes it fail as CUDA does."""

    def __init__(self, monkeypatch, refuses: bool = False):
        self.locked, self.events, self.refuses = {}, [], refuses
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "check_error", self.check)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.events.append("synchronize"))

    def cudaHostRegister(self, address: int, size: int, flags: int) -> bool:
        if not self.refuses:
            self.locked[address] = size
        return self.refuses

    def cudaHostUnregister(self, address: int) -> None:
        self.events.append("unlock")
        del self.locked[address]

    @staticmethod
    def check(failed: bool) -> None:
        if failed:
            raise RuntimeError("CUDA error: out of memory (2)")


def test_host_memory_is_locked_to_the_byte_and_until_its_last_view_is_gone(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    tensor = empty_on_host((1000, 3), half)
    assert tensor.shape == (1000, 3) and tensor.dtype == half
    assert cuda.locked == {tensor.data_ptr(): 6000}
    view = tensor[:10].fill_(2)
    del tensor
    gc.collect()
    assert len(cuda.locked) == 1 and view.sum() == 60
    del view
    gc.collect()
    assert cuda.locked == {} and cuda.events == ["synchronize", "unlock"], "copies may still read it"
    assert empty_on_host((0, 3), half).shape == (0, 3)


def test_memory_that_cannot_be_locked_is_used_as_it_is_after_a_warning(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuses=True)
    with pytest.warns(RuntimeWarning, match=r"could not page-lock 0.00 GiB .*out of memory.*several times slower"):
        tensor = empty_on_host((10, 3), half)
    assert tensor.zero_().sum() == 0
    del tensor
    gc.collect()
    assert cuda.events == []


def test_host_memory_beyond_what_there_is_is_a_memory_error(monkeypatch):
    FakeCuda(monkeypatch)
    with pytest.raises(MemoryError, match=r"no host memory for 1048576\.00 GiB"):
        empty_on_host((1 << 50,), torch.uint8)


def test_what_a_container_allows_counts_as_free(monkeypatch, tmp_path):
    without = free_memory(CPU)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 700\n")
    (tmp_path / "memory.current").write_text("1900\n")
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    for limit, free in (("2000\n", 800), ("1000\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_memory(CPU) == free
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 0.5 * without


# Plans


def on_a_machine(monkeypatch, gpu: float, host: float) -> None:
    """A GPU and a host with this many bytes free beyond what every training sets aside."""
    free = {"cuda": int(HEADROOM + gpu), "cpu": int(HEADROOM + host)}
    monkeypatch.setattr(planning, "free_memory", lambda device: free[device.type])


CIFAR, IMAGES = "cifar10_infpi", 50_000
ROWS = 2_500_400
ROW_BYTES = ROWS * (2 * (800 + 410) + 2 * 4)
DATA = IMAGES * 3072 * 5


@pytest.mark.parametrize(
    ("gpu", "host", "rows_on", "wanted"),
    [
        (ROW_BYTES + DATA, 0, "auto", "device"),
        (ROW_BYTES + DATA - 1, 1e10, "auto", "host"),
        (ROW_BYTES + DATA - 1, 1e9, "auto", None),
        (ROW_BYTES + DATA - 1, 1e10, "device", None),
        (1e11, 1e10, "host", "host"),
        (1e11, 1e9, "host", None),
        (DATA, 1e10, "auto", None),
    ],
)
def test_a_plan_says_where_rows_go_or_refuses(monkeypatch, gpu, host, rows_on, wanted):
    on_a_machine(monkeypatch, gpu, host)
    planned = plan(load_recipe(CIFAR), IMAGES, GPU, rows_on=rows_on)
    assert (planned.rows, planned.row_bytes) == (ROWS, ROW_BYTES)
    if wanted is None:
        with pytest.raises(NotEnoughMemory, match=rf"{CIFAR} needs .* GiB .* are free"):
            planned.check(CIFAR)
        return
    planned.check(CIFAR)
    assert planned.rows_on == wanted
    if wanted == "host":
        assert planned.host_needed == HEADROOM + ROWS * 2 * (800 + 410)
        assert planned.needed < HEADROOM + DATA + 0.05 * ROW_BYTES
    measured = plan(load_recipe(CIFAR), IMAGES, GPU, rows_on=rows_on, tested=10_000)
    assert measured.needed == planned.needed + 10_000 * 3072 * 4


def test_int8_rows_are_planned_at_half_the_bytes(monkeypatch):
    on_a_machine(monkeypatch, 1e11, 1e10)
    planned = plan(load_recipe(CIFAR, ["train.dtype=int8"]), IMAGES, GPU)
    assert planned.row_bytes == ROWS * ((800 + 410) + 2 * 8) < 0.51 * ROW_BYTES
    net = tiny("train.dtype=int8").build_model()
    held = sum(part.nbytes for layer in net.growing_layers.values() for part in layer.storages)
    assert plan(tiny("train.dtype=int8", "train.epochs=1"), 0, GPU).row_bytes == held


@pytest.mark.parametrize("host", [0, 1e10])
def test_a_refusal_names_a_number_of_rows_that_fits_and_the_way_out(monkeypatch, host):
    on_a_machine(monkeypatch, ROW_BYTES / 2 + DATA, host)
    with pytest.raises(NotEnoughMemory) as refused:
        plan(load_recipe(CIFAR), IMAGES, GPU, rows_on="device").check(CIFAR)
    message = str(refused.value)
    assert ("rows fit there (--rows-on host, rows_on='host')" in message) == bool(host)
    fitting = int(message.split("About ")[1].split(" rows")[0].replace(",", ""))
    assert fitting == ROWS // 2
    epochs = (fitting - 400) // IMAGES
    plan(load_recipe(CIFAR, [f"train.epochs={epochs}"]), IMAGES, GPU, rows_on="device").check(CIFAR)


def test_finite_nets_and_cpus_have_nothing_to_stream(monkeypatch):
    on_a_machine(monkeypatch, 1e9, 1e10)
    for entry, device in (("cifar10_mu", GPU), (CIFAR, CPU)):
        with pytest.warns(RuntimeWarning, match="rows_on is 'host', which changes nothing"):
            assert plan(load_recipe(entry), IMAGES, device, rows_on="host").rows_on == "device"
    with pytest.raises(ValueError, match="rows_on is 'disk'; it must be one of 'device', 'host', 'auto'"):
        plan(load_recipe(CIFAR), IMAGES, CPU, rows_on="disk")


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_plan_times_the_ops_that_the_training_will_use(monkeypatch, dtype):
    """Where kernels give a read-out's Jacobian with its output, rows of any dtype are read once."""
    used = []

    def counted(name):
        real = getattr(planning, name)

        def run(*args, **options):
            used.append(name.removeprefix("growing_"))
            return real(*args, **options)

        monkeypatch.setattr(planning, name, run)

    for op in ("forward", "backward", "forward_jacobian"):
        counted(f"growing_{op}")
    monkeypatch.setattr(planning, "fused", lambda b, A, B, op: A.shape[1] <= 10)
    assert plan(load_recipe(CIFAR, [f"train.dtype={dtype}", "model.r=32"]), 20, CPU, estimate_time=True).seconds > 0
    assert set(used) == {"forward", "backward", "forward_jacobian"}
    assert used.count("forward") == used.count("backward") == used.count("forward_jacobian")


def test_dry_run_says_what_is_needed_and_what_there_is(pizoo_command, monkeypatch):
    overrides = [argument for override in TINY for argument in ("--set", override)]
    shown = pizoo_command("train", "digits_infpi", *overrides, "--dry-run")
    assert shown.code == 0 and {"128", "device", "1.00"} <= set(shown.out.split())
    shown = pizoo_command("train", "digits_infpi", *overrides, "--dry-run", "--rows-on", "disk")
    assert shown.code == 2 and one_line(shown.err)
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**29)
    shown = pizoo_command("train", "digits_infpi", *overrides, "--dry-run")
    assert shown.code == 1 and "0.5 GiB are free" in shown.err and shown.err.count("\n") == 1


# Training and loading with rows on the host


@pytest.fixture
def as_if_streaming(monkeypatch):
    """Trainings on the CPU go the way of those whose rows do not fit a GPU."""
    monkeypatch.setattr(supervised, "plan", lambda *args, **options: replace(plan(*args), rows_on="host", seconds=1.0))


@pytest.mark.parametrize("more", [(), MOMENTUM, ("train.dtype=int8",)], ids=["plain", "momentum", "int8"])
def test_a_training_with_rows_on_the_host_is_the_same_training(as_if_streaming, tmp_path, more):
    with pytest.warns(RuntimeWarning, match=r"digits_infpi: .* stream to cpu, about 111 ms a step") as told:
        streaming = pizoo.train(tiny(*more), tmp_path, device="cpu")
    log = (tmp_path / "train.log").read_text()
    assert re.search(r"digits_infpi needs 1\.0 GiB of memory on cpu; \d+\.\d GiB are free\n.* stream to cpu", log)
    assert sum("stream" in str(warning.message) for warning in told) == 1
    assert all(layer.rows_on == "host" for layer in streaming.model.growing_layers.values())
    supervised.plan = plan
    resident = pizoo.train(tiny(*more), device="cpu")
    assert_same(streaming.model.state_dict(), resident.model.state_dict())
    loaded = pizoo.load(tmp_path, epoch=2, rows_on="host")
    assert all(layer.rows_on == "host" for layer in loaded.growing_layers.values())
    assert_same(loaded.state_dict(), pizoo.load(tmp_path, epoch=2).state_dict())
    assert pizoo.evaluate(tmp_path, device="cpu", rows_on="host")["accuracy"] == resident.results["accuracy"]


def test_the_engine_is_for_rows_on_the_device(as_if_streaming):
    with (
        pytest.warns(RuntimeWarning, match="stream"),
        pytest.raises(RecipeError, match=r"engine cannot .* stream from the host"),
    ):
        pizoo.train(tiny(), device="cpu", engine=True)


def test_loading_puts_rows_where_there_is_room(monkeypatch, tmp_path):
    pizoo.train(tiny(), tmp_path, device="cpu")
    state = segments.read_epoch(tmp_path).state
    layers = growing_layers(tiny().build_model())
    assert checkpoint._roomy_place(layers, state, "net") == "device"
    for layer in layers.values():
        layer.keep_rows_on("host").to("meta")  # stands for a GPU: not the host
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1 << 30 if device.type == "cpu" else 10)
    with pytest.warns(RuntimeWarning, match=r"net: 0\.0 GiB of rows do not fit the GPU"):
        assert checkpoint._roomy_place(layers, state, "net") == "host"
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 10)
    with pytest.raises(NotEnoughMemory, match=r"net needs 0\.0 GiB for its rows"):
        checkpoint._roomy_place(layers, state, "net")
    with pytest.raises(ValueError, match="rows_on is 'disk'"):
        pizoo.load(tmp_path, rows_on="disk")


# Resuming reads rows once, into their place


def test_a_resumed_training_reads_rows_into_the_room_reserved_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "READ_BYTES", 100)  # a few rows at once
    wanted = pizoo.train(tiny(), tmp_path / "whole", device="cpu").model.state_dict()
    step = supervised.Training._step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised.Training, "_step", lambda self, i, *xy: step(self, i, *xy) if i < 7 else interrupt())
        pizoo.train(tiny(), tmp_path / "run", device="cpu")
    places = []
    restore = supervised.restore

    def noting(model, *args):
        layers = growing_layers(model).values()
        places.append([part.data_ptr() for layer in layers for part in layer.storages])
        restore(model, *args)
        places.append([part.data_ptr() for layer in layers for part in layer.storages])
        assert [layer.count for layer in layers] == [8 + 2 * N] * 2
        assert [layer.capacity for layer in layers] == [8 + 3 * N] * 2

    monkeypatch.setattr(supervised, "restore", noting)
    assert_same(pizoo.train(tiny(), tmp_path / "run", device="cpu").model.state_dict(), wanted)
    assert places[0] == places[1]


def interrupt():
    raise KeyboardInterrupt


LOADS = """
import gc, resource, sys, torch, pizoo
from pathlib import Path
from pizoo.recipes import load_recipe
from pizoo.segments import save_epoch, start_training

folder, rows, segments = Path(sys.argv[1]), 12_000, 8
recipe = load_recipe("digits_infpi", ["model.r=250", "train.dtype=float32"])
net = recipe.build_model()
start_training(folder, net, recipe.config([str(i) for i in range(10)]))
for epoch in range(1, segments + 1):
    for layer in net.growing_layers.values():
        new = torch.randn(rows // segments, 250)
        layer.append(new[:, : layer.A.shape[1]], new, 1.0)
    save_epoch(folder, net, {"epoch": epoch}, {})
size = sum(part.nbytes for layer in net.growing_layers.values() for part in (layer.A, layer.B))
pizoo.load(folder, epoch=1)

for share in (1.33, 0.8):
    gc.collect()  # layer and parameter refer to each other
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(share * size), -1))
    try:
        print(pizoo.load(folder).hidden[0].count)
    except RuntimeError as error:
        print("can't allocate memory" in str(error))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_loading_takes_memory_for_the_rows_once(tmp_path):
    """A process that may take a third more than its rows loads them, twice the rows would not fit; with a fifth less, none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOADS, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["12250", "True"], done.stderr


# Out of memory

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.00 GiB is free. See "
    "documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
)


def no_gpu_memory():
    raise torch.OutOfMemoryError(TORCH_SAYS)


def no_host_memory():
    torch.empty(1 << 60, dtype=torch.uint8)  # torch's own error, and its own words


def no_python_memory():
    bytearray(1 << 62)


SHORTAGES = {
    no_gpu_memory: "CUDA out of memory. Tried to allocate 2.00 GiB",
    no_host_memory: "you tried to allocate 1152921504606846976 bytes",
    no_python_memory: "no memory left",
}


@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("where", ["step", "save"])
def test_out_of_memory_in_an_epoch_keeps_those_before_and_says_what_to_do(
    pizoo_command,
    monkeypatch,
    tmp_path,
    shortage,
    where,
):
    overrides = [argument for override in TINY for argument in ("--set", override)]
    command = ("train", "digits_infpi", *overrides, "--device", "cpu", "--out", tmp_path)
    wanted = pizoo.train(tiny(), device="cpu").model.state_dict()
    module, name, last = (pizoo.nn, "growing_backward", 2 * 5) if where == "step" else (segments, "write_tensors", 3)
    real, calls = getattr(module, name), 0

    def runs_out(*args, **kwargs):
        nonlocal calls
        calls += 1
        return shortage() if calls > last else real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, runs_out)
        shown = pizoo_command(*command)
    assert shown.code == 1 and one_line(shown.err), shown.err
    assert re.search(
        rf"digits_infpi ran out of memory \(.*{SHORTAGES[shortage]}.*\); .* GiB can be had on cpu", shown.err
    )
    assert "; the net of epoch 1 stands in" in shown.err
    assert "train.batch_size" in shown.err or "rows would fit" in shown.err
    assert [epoch["epoch"] for epoch in segments.read_manifest(tmp_path)["epochs"]] == [1]
    assert checkpoint.load(tmp_path)[0].output.count == 8 + N
    assert pizoo_command(*command).code == 0
    assert_same(checkpoint.load(tmp_path)[0].state_dict(), wanted)


def test_out_of_memory_when_a_training_is_resumed_is_no_damage_to_its_checkpoint(monkeypatch, tmp_path):
    wanted = pizoo.train(tiny(), tmp_path, device="cpu").model.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_read_rows", lambda *args: no_gpu_memory())
        with pytest.raises(NotEnoughMemory, match=r"ran out of memory .*; the net of epoch 3 stands in"):
            pizoo.train(tiny(), tmp_path, device="cpu")
        with pytest.raises(torch.OutOfMemoryError):
            pizoo.load(tmp_path)
    assert_same(pizoo.load(tmp_path).state_dict(), wanted)


@pytest.mark.parametrize(
    ("gpu", "rows_on", "remedy"),
    [
        (
            ROW_BYTES / 2 + DATA,
            "device",
            r"on the host: rows fit there \(--rows-on host.*About 1,250,200 rows would fit",
        ),
        (1e11, "device", "The rows fit, what a step needs beside them did not: a smaller train.batch_size"),
        (1e11, "host", "What a step needs beside rows did not fit: a smaller train.batch_size"),
    ],
)
def test_what_would_have_fit_is_told_from_what_is_free_then(monkeypatch, gpu, rows_on, remedy):
    """A plan made when there was room; then another process takes most of the GPU, or the step needs more than foreseen."""
    on_a_machine(monkeypatch, 1e12, 1e10)
    planned = plan(load_recipe(CIFAR), IMAGES, GPU, rows_on=rows_on)
    planned.check(CIFAR)
    on_a_machine(monkeypatch, gpu, 1e10)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(planning, "peak_memory", lambda device: 0)
    told = planned.ran_out(CIFAR, TORCH_SAYS.split(" GPU 0")[0])
    assert re.search(remedy, told), told


def test_only_a_lack_of_memory_is_explained_as_one():
    for other in (
        RuntimeError("no"),
        OSError(28, "No space left"),
        ValueError("allocate"),
        NotEnoughMemory("CUDA error"),
    ):
        with pytest.raises(type(other), match=str(other.args[-1])), explained(lambda reported: "mine"):
            raise other
    for error_ in (OSError(12, "Cannot allocate memory"), RuntimeError("CUDA error: out of memory\nCompile with")):
        with pytest.raises(NotEnoughMemory, match=r"^told: .*memory$"), explained(lambda reported: f"told: {reported}"):
            raise error_


def test_evaluation_that_runs_out_of_memory_says_what_to_do(monkeypatch):
    monkeypatch.setattr(pizoo.nn, "growing_forward", lambda *args, **options: no_gpu_memory())
    with pytest.raises(NotEnoughMemory, match=r"Tried to allocate 2\.00 GiB. Rows kept off the GPU"):
        pizoo.evaluate("digits_infpi", device="cpu")


# No GPU


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_warning_and_the_cpus_result(pizoo_command, tmp_path):
    wanted = pizoo.evaluate("digits_infpi", device="cpu")["accuracy"]
    with pytest.warns(RuntimeWarning, match="device is 'cuda', but no GPU is in reach") as told:
        assert pizoo.evaluate("digits_infpi", device="cuda")["accuracy"] == wanted
    assert len(told) == 1
    shown = pizoo_command("evaluate", "digits_infpi", "--device", "cuda")
    assert shown.code == 0 and shown.err.startswith("warning: device is 'cuda'") and shown.err.count("\n") == 1


# On a GPU


def on_host(inputs: tuple, locked: bool = True) -> tuple:
    """The inputs of an op with A and B in host memory."""
    gbar, A, B, *rest = inputs
    return (gbar, *(to_host(part, part.dtype) if locked else part.cpu() for part in (A, B)), *rest)


@on_a_gpu
def test_rows_for_a_gpu_are_page_locked_to_the_byte():
    tensor = empty_on_host((1 << 20, 3), half)
    assert tensor.is_pinned() and tensor.untyped_storage().nbytes() == 6 << 20
    copied = tensor.fill_(3).to(GPU, non_blocking=True)
    del tensor
    gc.collect()
    assert copied.sum(dtype=torch.float64) == 9 << 20
    assert to_host(copied, half).is_pinned()


GPU_CASES = [
    Case(100_000, 400, 400, 8, half, unused=100),
    Case(100_000, 400, 10, 8, half, amult=1e-6),
    Case(30_000, 400, 10, 80, brain),
    Case(30_000, 100, 250, 33, single, unused=1),
    Case(5_000, 50, 10, 8, torch.float64),
    Case(100_000, 400, 10, 8, byte, unused=100),
    Case(1, 7, 3, 1, half),
]


@pytest.mark.parametrize("locked", [True, False], ids=["page-locked", "pageable"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@on_a_gpu
def test_streamed_ops_match_the_definition_on_a_gpu(monkeypatch, case, locked):
    inputs = rows(case, GPU)
    for size in (1000, 1 << 20):
        chunks_of(monkeypatch, size, case)
        for op in OPS if case.r_out <= 16 else OPS[:2]:
            result = call(ops, op, *on_host(inputs, locked))
            assert all(part.is_cuda for part in result)
            assert error(result, op, *inputs) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("r_out", [10, 400])
@on_a_gpu
def test_streaming_overwrites_no_chunk_that_is_still_needed(monkeypatch, r_out):
    """Bit for bit the sum over chunks of rows on the GPU, again and again, and nothing is written where buffers were."""
    case = Case(60_000, 400, r_out, 8, half)
    chunks_of(monkeypatch, 2_500, case)
    gbar, A, B, amult, delta, *_ = rows(case, GPU)
    pieces = list(zip(*(part.split(2_500) for part in (A, B, amult)), strict=True))

    def added(parts):
        total = next(parts).clone()
        for part in parts:
            total += part
        return total

    out = added(ops.growing_forward(gbar, *piece) for piece in pieces)
    grad = added(ops.growing_backward(gbar, *piece, delta) for piece in pieces)
    A_host, B_host = to_host(A, half), to_host(B, half)
    noise, after = torch.randn(4096, 4096, device=GPU), []
    for i in range(30):
        if i % 3 == 0:
            noise @ noise  # keeps this stream busy: copies must not run ahead of it
        results = (
            ops.growing_forward(gbar, A_host, B_host, amult),
            ops.growing_backward(gbar, A_host, B_host, amult, delta),
        )
        assert all(part.isnan().all() for part in after), i
        after = [
            torch.full((1 << (17 + j),), torch.nan, device=GPU) for j in range(5)
        ]  # takes the memory of the buffers
        assert torch.equal(results[0], out) and torch.equal(results[1], grad), i


@on_a_gpu
def test_rows_appended_on_a_gpu_are_there_for_the_next_pass(monkeypatch):
    monkeypatch.setattr("pizoo.nn.FEW_ROWS", 0)
    torch.manual_seed(0)
    resident = InfPiLinear(64, 10, role="readout", dtype=half, device=GPU)
    resident.reserve(64 + 50 * 8)
    kept = copy.deepcopy(resident).keep_rows_on("host")
    kept.reserve(resident.capacity)
    for _ in range(50):
        g = torch.randn(8, 64, device=GPU)
        new = torch.randn(8, 10, device=GPU), g / g.norm(dim=1, keepdim=True)
        for layer in (resident, kept):
            layer.append(*new, -0.1)
        assert torch.equal(kept(g), resident(g))
    assert kept.A.is_pinned() and kept.amult.is_cuda
    assert_same(kept.state_dict(), resident.state_dict())


STEPS = ("model.r=64", "data.subset=600", "train.epochs=2", "train.batch_size=16")


@pytest.mark.parametrize("chunk", [1 << 26, 1 << 13], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize(
    "more, close",
    [
        (("train.dtype=float32",), 1e-3),
        (("train.dtype=float32", *MOMENTUM), 1e-3),
        (("train.dtype=float16",), 2e-2),
        (("train.dtype=int8", "data.subset=32"), 2e-2),  # sums in another order soon round to other rows: four steps
    ],
    ids=["plain", "momentum", "float16", "int8"],
)
@on_a_gpu
def test_on_a_gpu_a_training_with_rows_on_the_host_is_the_same_training(monkeypatch, tmp_path, more, close, chunk):
    monkeypatch.setattr(streamed, "CHUNK_BYTES", chunk)
    monkeypatch.setattr("pizoo.nn.FEW_ROWS", 0)  # so few rows are computed with in float32 where they are resident
    recipe = load_recipe("digits_infpi", (*STEPS, *more))
    resident = pizoo.train(recipe, device="cuda", engine=False)
    with pytest.warns(RuntimeWarning, match=r"stream to cuda, about .* ms a step"):
        streaming = pizoo.train(recipe, tmp_path, device="cuda", rows_on="host")
    for layer in streaming.model.growing_layers.values():
        assert layer.A.is_pinned() and layer.B.is_pinned() and layer.amult.is_cuda
    if chunk == 1 << 26:  # the same sums
        assert_same(streaming.model.state_dict(), resident.model.state_dict())
    x = recipe.data.normalize(recipe.data.load().test_x.cuda())
    with torch.no_grad():
        wanted = resident.model(x)
        assert (streaming.model(x) - wanted).norm() <= close * wanted.norm()
        loaded = pizoo.load(tmp_path, device="cuda", rows_on="host")
        assert torch.equal(loaded(x), streaming.model(x))
        assert loaded.cuda().output.A.device == CPU and loaded.cpu().keep_rows_on("device").cuda().output.A.is_cuda


@pytest.mark.parametrize("rows_on", ["host", "device"])
@on_a_gpu
def test_clipping_and_norms_do_not_depend_on_where_rows_are(rows_on):
    torch.manual_seed(0)
    net = InfPiMLP(d_in=6, d_out=3, r=4, rows_dtype=half)
    twin = copy.deepcopy(net)
    net.keep_rows_on(rows_on).cuda()
    x, y = torch.randn(5, 6), torch.arange(5) % 3
    norms = []
    for model, device in ((net, "cuda"), (twin, "cpu")):
        optimizer = PiSGD(param_groups(model, lr=0.1), lr=0.1)
        for per_param in (True, False):
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            found = clip_grad_norm_(model, 0.01, per_param)
            norms.append(torch.stack(list(found.values()) if per_param else [found]).cpu())
            optimizer.step()
            optimizer.zero_grad()
    for found, wanted in zip(norms[:2], norms[2:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=0)
    torch.testing.assert_close(net(x.cuda()).cpu(), twin(x), rtol=1e-2, atol=1e-3)


@on_a_gpu
def test_a_net_too_large_for_the_gpu_streams_of_itself(monkeypatch, tmp_path):
    recipe = load_recipe("digits_infpi", STEPS)
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 1 << 15)  # else the buffers outweigh the rows
    on_a_machine(monkeypatch, plan(recipe, 600, GPU, rows_on="device").needed - HEADROOM - 1, 1e10)
    with pytest.warns(RuntimeWarning, match="stream to cuda"):
        model = pizoo.train(recipe, tmp_path, device="cuda").model
    assert all(layer.rows_on == "host" for layer in model.growing_layers.values())
    size = sum(part.nbytes for layer in model.growing_layers.values() for part in (layer.A, layer.B))
    free = {"cuda": HEADROOM + size - 1, "cpu": 1e10}
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: free[device.type])
    with pytest.warns(RuntimeWarning, match="do not fit the GPU"):
        assert pizoo.load(tmp_path, device="cuda").output.rows_on == "host"
    free["cuda"] += 1
    assert pizoo.load(tmp_path, device="cuda").output.rows_on == "device"


@on_a_gpu
def test_a_gpu_that_is_really_full_is_told_and_training_goes_on(pizoo_command, monkeypatch, tmp_path):
    overrides = [argument for override in STEPS for argument in ("--set", override)]
    command = ("train", "digits_infpi", *overrides, "--device", "cuda", "--rows-on", "host", "--out", tmp_path)
    wanted = pizoo.train(load_recipe("digits_infpi", STEPS), device="cuda", rows_on="host").model.state_dict()
    step = supervised.Training._step

    def fills_up(self, number, *args):
        if number == self.steps_per_epoch + 3:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return step(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(supervised.Training, "_step", fills_up)
        shown = pizoo_command(*command)
    told = shown.err.splitlines()[-1]
    assert shown.code == 1 and "Traceback" not in shown.err and "ran out of memory (CUDA out of memory. Tried" in told
    assert "; the net of epoch 1 stands in" in told and "train.batch_size" in told
    assert pizoo_command(*command).code == 0
    assert_same(checkpoint.load(tmp_path)[0].state_dict(), wanted)


KILLED = """
import os, signal, sys, time
from pathlib import Path
import pizoo
from pizoo import segments
from pizoo.recipes import load_recipe
from pizoo.training import supervised
from pizoo.training.engine import Engine

folder, rows_on, point, *overrides = sys.argv[1:]
manifest = Path(folder) / segments.MANIFEST
saved = lambda: manifest.exists() and segments.read_manifest(manifest.parent)["epochs"]
recipe = load_recipe("digits_infpi", overrides)
steps = 0

def counted(step):
    def run(*args):
        global steps
        steps += 1
        if point == "step" and steps == 38 + 9:
            while not saved():  # the first epoch is being written while the next one trains
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)
    return run

step_of, fsync = Engine._step_of, os.fsync
supervised.Training._step = counted(supervised.Training._step)
Engine._step_of = lambda self, size: counted(step_of(self, size))

def killing(fd):
    if point == "write" and os.path.exists(os.path.join(folder, ".state-00002.safetensors.tmp")):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)

os.fsync = killing
pizoo.train(recipe, folder, device="cuda", rows_on=rows_on)
"""


@pytest.mark.parametrize("rows_on", ["device", "host"])
@on_a_gpu
def test_killed_and_resumed_on_a_gpu_a_training_ends_with_the_same_bits(tmp_path, rows_on):
    """600 images in batches of 16: an epoch has 38 steps; the kill comes in the second of three."""
    overrides = (*STEPS, "train.epochs=3", "train.weight_decay=0.01")

    def train(folder: str, point: str) -> int:
        arguments = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / folder), rows_on, point, *overrides]
        return subprocess.run(arguments, capture_output=True).returncode

    assert train("whole", "never") == 0
    for point in ("step", "write"):
        assert train(point, point) == -signal.SIGKILL
        assert [epoch["epoch"] for epoch in segments.read_manifest(tmp_path / point)["epochs"]] == [1]
        assert train(point, "never") == 0
        for epoch in (1, 2, 3):
            found, wanted = (checkpoint.load(tmp_path / name, epoch)[0].state_dict() for name in (point, "whole"))
            assert_same(found, wanted)
