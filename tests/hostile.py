"""Hostile files: pickles that run something when Python loads them, and files that ask for all the memory there is.

Each is made of a call (what runs), an instruction that calls it, a place in the pickle, and a kind of file.
"""

from __future__ import annotations

import io
import json
import marshal
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CALLS = 200
COMMAND = "open({!r}, 'w').close()"
SCRIPT = "script.py"  # beside the marker; makes it


class Attack(NamedTuple):
    """A hostile file: what it is, its bytes, and the pickle in it that makes the marker when Python loads it (None: a bomb)."""

    name: str
    content: bytes
    pickle: bytes | None


def number(n: int) -> bytes:
    return pickle.dumps(n, 2)[2:-1]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def given(value: Any) -> bytes:
    """Instructions that leave a plain value on the stack."""
    if isinstance(value, Made):
        return value.made
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bytes):
        return b"c_codecs\nencode\n(" + text(value.decode("latin1")) + text("latin1") + b"tR"
    if isinstance(value, tuple | list):
        return b"(" + b"".join(map(given, value)) + (b"t" if isinstance(value, tuple) else b"l")
    return number(value)


class Made(NamedTuple):
    """An argument that is itself made by instructions."""

    made: bytes


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: Any) -> bytes:
    return function + given(arguments) + b"R"


def calls(marker: str) -> dict[str, tuple[Any, ...]]:
    """Functions that make the marker when called with these arguments."""
    run, script = COMMAND.format(marker), str(Path(marker).with_name(SCRIPT))
    touch = f"touch '{marker}'"
    code = Made(call(name("marshal", "loads"), marshal.dumps(compile(run, "x", "exec"))))
    inner = b"\x80\x02" + call(name("builtins", "eval"), run) + b"."
    empty = Made(b"}")
    os_module = Made(call(name("builtins", "__import__"), "os"))
    return {
        "os.system": (touch,),
        "posix.system": (touch,),
        "os.makedirs": (marker,),
        "os.mkdir": (marker,),
        "os.symlink": (script, marker),
        "os.link": (script, marker),
        "os.mkfifo": (marker,),
        "builtins.eval": (run,),
        "builtins.exec": (run,),
        "_io.open": (marker, "w"),
        "builtins.open": (marker, "w"),
        "io.open": (marker, "w"),
        "io.FileIO": (marker, "w"),
        "_io.FileIO": (marker, "w"),
        "codecs.open": (marker, "w"),
        "gzip.open": (marker, "w"),
        "lzma.open": (marker, "w"),
        "subprocess.check_call": (["touch", marker],),
        "subprocess.getoutput": (touch,),
        "shutil.copy": (script, marker),
        "shutil.copyfile": (script, marker),
        "runpy.run_path": (script,),
        "timeit.timeit": (run, "pass", Made(name("time", "perf_counter")), 1),
        "logging.FileHandler": (marker,),
        "zipfile.ZipFile": (marker, "w"),
        "tarfile.open": (marker, "w"),
        "sqlite3.connect": (marker,),
        "pickle.loads": (inner,),
        "_pickle.loads": (inner,),
        "list of a map": (Made(call(name("builtins", "map"), Made(name("builtins", "eval")), [run])),),
        "operator.call": (Made(name("builtins", "eval")), run),
        "getattr by reduction": (Made(name("builtins", "getattr")), [os_module, "mkdir"]),
        "a function of bytecode": (code, empty),
        "torch.save": ([], marker),
        "torch.serialization.save": ([], marker),
        "torch.storage._load_from_bytes": (inner,),
        "a module's own imports": (inner,),
        "an allowed function's globals": (run,),
        "subprocess.call": (["touch", marker],),
        "numpy.memmap": (marker, "uint8", "w+", 0, 8),
    }


def function_of(key: str, arguments: tuple[Any, ...], marker: str) -> tuple[bytes, tuple[Any, ...]]:
    """The instructions that leave the function on the stack, and its arguments."""
    getattr_ = name("builtins", "getattr")
    match key:
        case "getattr by reduction":  # os.mkdir
            return call(name("functools", "reduce"), *arguments), (marker,)
        case "a function of bytecode":
            return call(name("types", "FunctionType"), *arguments), ()
        case "list of a map":
            return name("builtins", "list"), arguments
        case "a module's own imports":
            module = Made(call(getattr_, Made(name("torch", "serialization")), "pickle"))
            return call(getattr_, module, "loads"), arguments
        case "an allowed function's globals":
            found = call(getattr_, Made(name("torch._utils", "_rebuild_tensor_v2")), "__globals__")
            builtins = call(call(getattr_, Made(found), "get"), "__builtins__")
            return call(call(getattr_, Made(builtins), "get"), "eval"), arguments
    module, _, attribute = key.rpartition(".")
    return name(module, attribute), arguments


def instruction(kind: str, function: bytes, arguments: tuple[Any, ...]) -> bytes:
    """The call by one of pickle's ways to call."""
    match kind:
        case "OBJ":
            return b"(" + function + b"".join(map(given, arguments)) + b"o"
        case "INST" if function.startswith(b"c") and function.count(b"\n") == 2:
            return b"(" + b"".join(map(given, arguments)) + b"i" + function[1:]
        case "STACK_GLOBAL" if function.startswith(b"c") and function.count(b"\n") == 2:
            module, attribute = function[1:-1].decode().split("\n")
            return text(module) + text(attribute) + b"\x93" + given(arguments) + b"R"
    return function + given(arguments) + b"R"


INSTRUCTIONS = ("REDUCE", "INST", "OBJ", "STACK_GLOBAL")
NET, ARRAY = name("inf.pimlp", "InfPiMLP") + b")\x81", name("inf.dynamicarray", "DynArr") + b")\x81"
PLACES = {
    "alone": lambda p: p,
    "in a list": lambda p: b"]" + p + b"a",
    "in lists of lists": lambda p: b"]" * 50 + p + b"a" * 50,
    "as a value": lambda p: b"}" + text("As") + p + b"s",
    "as a key": lambda p: b"}" + p + text("As") + b"s",
    "among items": lambda p: b"}(" + text("As") + b"}" + text("Bs") + p + b"u",
    "in an OrderedDict": lambda p: name("collections", "OrderedDict") + b")R" + text("layers.0.A") + p + b"s",
    "as an OrderedDict's state": lambda p: name("collections", "OrderedDict") + b")R" + p + b"b",
    "as a net's attribute": lambda p: NET + b"}" + text("device") + p + b"sb",
    "as a growable array": lambda p: NET + b"}" + text("As") + b"}" + number(2) + p + b"ssb",
    "as an array's storage": lambda p: ARRAY + b"}" + text("arr") + p + b"sb",
    "as a net's state": lambda p: NET + p + b"b",
    "as a tensor's hooks": lambda p: name("torch._utils", "_rebuild_tensor_v2") + b"(" + b"N" * 5 + p + b"tR",
    "as a tensor's storage": lambda p: name("torch._utils", "_rebuild_tensor") + b"(" + p + b"NNNtR",
    "as a persistent id": lambda p: p + b"Q",
    "in a persistent id": lambda p: b"(" + text("storage") + p + b"NNNtQ",
    "dropped": lambda p: p + b"0}",
    "dropped with a mark": lambda p: b"(" + p + b"1}",
    "remembered": lambda p: p + b"q\x050h\x05",
    "before a net": lambda p: p + b"0" + NET,
}


def archive(program: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A zip file of torch.save with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("net/data.pkl", program)
        made.writestr("net/version", b"3\n")
        for entry, content in more.items():
            made.writestr(f"net/{entry}", content)
    return file.getvalue()


def older(program: bytes) -> bytes:
    """A file of torch.save in the format before torch 1.6."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2)


FILES = {"zip": archive, "legacy": older, "plain": lambda program: program}


def executing(marker: str) -> Iterator[Attack]:
    """Files that make the marker, of every call, instruction, place and kind of file."""
    rng, functions = random.Random(0), calls(marker)
    keys = [key for _ in range(CALLS // len(functions) + 1) for key in functions][:CALLS]
    places = [place for _ in range(CALLS // len(PLACES) + 1) for place in PLACES][:CALLS]
    rng.shuffle(places)
    for key, place in zip(keys, places, strict=True):
        kind, file = rng.choice(INSTRUCTIONS), rng.choice(list(FILES))
        function, arguments = function_of(key, functions[key], marker)
        program = b"\x80\x04" if kind == "STACK_GLOBAL" else b"\x80\x02"
        program += PLACES[place](instruction(kind, function, arguments)) + b"."
        yield Attack(f"{key} by {kind}, {place}, {file}", FILES[file](program), program)


def storage(count: int = 4, key: str = "0") -> bytes:
    return b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(offset: int, shape: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> bytes:
    parts = (
        storage(count)
        + given(offset)
        + given(shape)
        + given(stride)
        + b"\x89"
        + name("collections", "OrderedDict")
        + b")R"
    )
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"tR"


def bombs() -> Iterator[Attack]:
    """Files that would take memory or time without bound, or be trusted with numbers that are none."""
    many = 250_000
    double = b")" + b"q\x00" + b"h\x00\x86q\x00" * 200  # each pair holds the one before twice
    shared = b"}(" + b"".join(number(k) + b"N" for k in range(50_000)) + b"uq\x01"
    programs = {
        "bytes of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62),
        "bytes of 2^40": b"\x8e" + struct.pack("<Q", 1 << 40),
        "string of 2^62": b"\x8d" + struct.pack("<Q", 1 << 62),
        "string of 2^32": b"X" + b"\xff" * 4,
        "bytes of 2^32": b"B" + b"\xff" * 4,
        "bytearray of 2^40": b"\x96" + struct.pack("<Q", 1 << 40),
        "string of length -1": b"T" + b"\xff" * 4,
        "integer of 2 GB": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\x01",
        "integer of length -1": b"\x8b" + struct.pack("<i", -1),
        "integer of many digits": b"I" + b"9" * 900_000 + b"\n",
        "long of many digits": b"L" + b"9" * 900_000 + b"L\n",
        "frame of 2^60": b"\x95" + struct.pack("<Q", 1 << 60),
        "memo far away": b"Nr" + b"\xff\xff\xff\x7f",
        "memo as far as can be": b"Nr" + b"\xff" * 4,
        "memo in words": b"Np99999999999\n",
        "memo that was never made": b"h\x07",
        "marks": b"(" * many,
        "lists": b"]" * many,
        "dictionaries": b"}" * many,
        "tuples": b")" * many,
        "nested lists": b"]" * many + b"a" * (many - 1),
        "nested tuples": b")" + b"\x85" * many,
        "nested nets": (NET + b"}" + text("a")) * 20_000 + b"N" + b"sb" * 20_000,
        "a tuple of 2^200": double,
        "a tuple of 2^200 as a key": b"}" + double + b"Ns",
        "a tuple of 2^200 in a net": NET + b"}" + text("As") + double + b"sb",
        "one state for many nets": shared + b"0" + (NET + b"h\x01b0") * 3000 + b"N",
        "one list for many OrderedDicts": b"]q\x01" + name("collections", "OrderedDict") + b"(h\x01tR" * 3000,
        "a net of itself": NET + b"q\x01}" + text("As") + b"h\x01sb",
        "a list of itself": b"]q\x01h\x01a",
        "built twice": NET + b"}b}b",
        "pops of nothing": b"0" * 10,
        "nothing": b"",
        "two values": b"NN",
        "a negative shape": tensor(0, (-2, 3), (3, 1)),
        "a negative offset": tensor(-1, (2,), (1,)),
        "a huge offset": tensor(1 << 62, (2,), (1,)),
        "a huge shape": tensor(0, (1 << 40, 1 << 40), (1 << 40, 1)),
        "a shape of 2^2000": tensor(0, (1 << 2000,), (1,)),
        "a shape of many dimensions": tensor(0, (1,) * 50_000, (1,) * 50_000),
        "a shape of words": tensor(0, ("a",), (1,)),
        "strides that come back": tensor(0, (1 << 40,), (0,)),
        "a storage of 2^62": storage(1 << 62),
        "a storage of -1": storage(-1),
        "a storage that is missing": storage(4, "9"),
        "a storage outside": storage(4, "../../data.pkl"),
        "a storage twice": storage(4) + b"0" + storage(5),
        "torch.empty of 2^45": call(name("torch", "empty"), 1 << 45),
        "bytes by call": call(name("builtins", "bytearray"), 1 << 40),
        "a set of many": name("builtins", "set") + b"(" + b"]" + b"tR" + b"b",
    }
    for key, program in programs.items():
        whole = b"\x80\x02" + program + b"."
        yield Attack(key, archive(whole, **{"data/0": bytes(16)}), None)
        if key.startswith(("bytes of", "memo", "integer of 2", "nested", "a storage of")):
            yield Attack(f"{key}, legacy", older(whole), None)
    none = b"\x80\x02N."
    large = archive(none + bytes(2 << 20))
    end = archive(none)
    directory = bytearray(end)
    directory[-10:-6] = b"\xff\xff\xff\x7f"  # the length of the index, by its own word
    yield Attack("a compressed pickle", archive(none + bytes(1 << 28), zipfile.ZIP_DEFLATED), None)
    stored = b"\x80\x02" + tensor(0, (1 << 26,), (1,), 1 << 26) + b"."
    yield Attack("a compressed storage", archive(stored, zipfile.ZIP_DEFLATED, **{"data/0": bytes(1 << 28)}), None)
    yield Attack("a pickle of 2 MB", large, None)
    yield Attack("an index of 2 GB", bytes(directory), None)
    yield Attack("no pickle", archive(none).replace(b"data.pkl", b"data.pkk"), None)
    yield Attack("an empty file", b"", None)
    yield Attack("the end of a zip file alone", end[-22:], None)
    yield Attack("another machine's", archive(none, byteorder=b"big"), None)


def attacks(marker: str) -> list[Attack]:
    return [*executing(marker), *bombs()]


# ---------------------------------------------------------------------------------------------------- what comes of them

PYTHONS = """
import io, json, pickle, sys
from contextlib import suppress
from pathlib import Path

import foreign

folder, made = Path(sys.argv[1]), []

class Unpickler(pickle.Unpickler):
    def persistent_load(self, described):
        return described

with foreign.paper_modules():
    for path in sorted(folder.glob("*.pkl")):
        with suppress(BaseException):
            Unpickler(io.BytesIO(path.read_bytes())).load()
        marker = folder / "marker"
        if marker.is_symlink() or marker.exists():
            made.append(path.stem)
            marker.rmdir() if marker.is_dir() and not marker.is_symlink() else marker.unlink()
print(json.dumps(made), flush=True)
"""

OURS = """
import json, sys, time
from pathlib import Path
from memory import forget_peak, peak
from pizoo import convert
from pizoo.files import CheckpointError

folder, outcomes = Path(sys.argv[1]), {}
before = forget_peak()
for path in sorted(folder.glob("*.th")):
    begin = time.perf_counter()
    try:
        convert.convert(path, "digits_infpi", folder / "made")
        outcome = "converted"
    except CheckpointError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = f"raised {type(error).__name__}: {error}"[:200]
    outcomes[path.stem] = outcome, time.perf_counter() - begin
print(json.dumps([outcomes, peak() - before]))
"""


def write(folder: Path) -> dict[str, Attack]:
    """Write all of them into a folder, as NUMBER.th, and the pickles in them as NUMBER.pkl."""
    marker = folder / "marker"
    (folder / SCRIPT).write_text(COMMAND.format(str(marker)))
    found = {f"{i:03d}": attack for i, attack in enumerate(attacks(str(marker)))}
    for stem, attack in found.items():
        (folder / f"{stem}.th").write_bytes(attack.content)
        if attack.pickle is not None:
            (folder / f"{stem}.pkl").write_bytes(attack.pickle)
    return found


def executed_by_python(folder: Path) -> list[str]:
    """Numbers of the pickles that make the marker when Python loads them."""
    return _run(PYTHONS, folder)


def converted_by_pizoo(folder: Path) -> tuple[dict[str, tuple[str, float]], int]:
    """By number what converting each file comes to, with the seconds it took; and the memory all took at most, in bytes."""
    return _run(OURS, folder)


def _run(program: str, folder: Path) -> Any:
    """What a program prints at last, in a process of its own: whatever it allocates or executes, it is not here."""
    here = Path(__file__).parent
    program = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}\n{program}"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])
