"""Files of ``torch.save``, read without executing anything in them.

A pickle is a program for a small stack machine, and the machine of Python's standard library imports and calls what the
program names. The one here knows the few instructions that ``torch.save`` writes, imports nothing and calls nothing: tensors
become :class:`StoredTensor` (where their numbers lie in the file), objects of the classes it is told of become
:class:`Inert` (their name and attributes), and everything else is refused by name. Numbers are read later, in blocks, so that a
file may be larger than memory.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pizoo.files import CheckpointError, check_file

# A pickled net is a few kB, its numbers lie apart; the machine's memory is at most some hundred times its program.
LARGEST_PICKLE = 1 << 20
AT_ONCE = 1 << 23  # bytes that are read at once; no index of a zip file may be longer
LARGEST_NDIM = 8
LARGEST_COUNT = 1 << 48  # of numbers in a storage: more than any disk holds
TOLD = 80  # characters of a name from the file that messages repeat
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what older versions of torch.save begin with
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
FUNCTIONS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "torch.device",
    "__builtin__.set",
    "builtins.set",
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")


@dataclass(eq=False, repr=False)
class Inert:
    """An object of a known class, of which nothing was executed: the class's full name, and its attributes."""

    name: str
    state: dict[str, Any] | None = None


@dataclass(eq=False, repr=False)
class Storage:
    """``count`` numbers of a dtype that lie one after the other in a file."""

    key: str
    dtype: torch.dtype
    count: int
    open: Callable[[], BinaryIO] = field(init=False)  # a reader that stands at the first of them

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, eq=False, repr=False)
class StoredTensor:
    """A tensor whose numbers are still in the file, from ``offset`` (in numbers) of a storage on.

    Only what lies there in row-major order can be read.
    """

    path: Path
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    row_major: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def first(self, count: int) -> StoredTensor:
        """Its first ``count`` rows."""
        return replace(self, shape=(count, *self.shape[1:]))

    def read(self) -> Tensor:
        """All of it."""
        rows = self if self.shape else replace(self, shape=(1,))
        (whole,) = rows.blocks(max(1, rows.shape[0])) if rows.shape[0] else (torch.empty(self.shape, dtype=self.dtype),)
        return whole.reshape(self.shape)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Its rows in order, ``rows`` at once (the last block may be shorter).

        Raises:
            CheckpointError: the file ends before, or its check sum does not fit; numbers that lie in another order.
        """
        if not self.row_major:
            raise CheckpointError(f"{self.path} has a tensor of shape {list(self.shape)} that is not contiguous")
        row = math.prod(self.shape[1:])
        with _told(self.path), self.storage.open() as file:
            _skip(file, self.offset * self.dtype.itemsize)
            for start in range(0, self.shape[0], rows):
                block = torch.empty(min(rows, self.shape[0] - start), *self.shape[1:], dtype=self.dtype)
                _fill(file, block.flatten())
                yield block
            # What lies behind is read too: a zip file checks its sum at the end.
            _skip(file, (self.storage.count - self.offset - self.shape[0] * row) * self.dtype.itemsize)
            file.read(1)


def read_pickled(path: str | os.PathLike, knows: Callable[[str], bool] = lambda name: False) -> Any:
    """What ``torch.save`` wrote into a file: dicts, lists, tuples, numbers and strings, with tensors and objects as above.

    Both of its formats are read: the zip archive, and the one before torch 1.6.

    Args:
        knows: whether a class, by its full name, may stand in the file, as an :class:`Inert`.

    Raises:
        CheckpointError: the file is not one of torch.save, is damaged, or names anything else; nothing was executed.
    """
    path = check_file(Path(path))
    with _told(path):
        with open(path, "rb") as file:
            archive = file.read(4) == b"PK\3\4"
        return (_read_archive if archive else _read_legacy)(path, knows)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell whatever is wrong with a file as a CheckpointError that names it."""
    try:
        yield
    except _Refused as error:
        raise CheckpointError(f"{path} {error}; nothing in it was executed") from None
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError, LookupError, RuntimeError, ValueError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {ascii(str(error))[1:-1][:200]}") from None
    except (struct.error, zlib.error) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from None


class _Refused(Exception):
    """What a file holds and no file of torch.save that is read here does; the message goes on after the file's name."""


def _name(text: object) -> str:
    """A name from the file as a message may repeat it."""
    shown = ascii(text)
    return shown if len(shown) <= TOLD else f"{shown[:TOLD]}…"


# ---------------------------------------------------------------------------------------------------- the two formats


class _Pieces(io.FileIO):
    """A file that is read in pieces only: the index of a zip file, by its own word of any length, is no exception."""

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > AT_ONCE:
            raise _Refused(f"is a zip archive that has {size} bytes where a few thousand were expected")
        return super().read(size) or b""


def _read_archive(path: Path, knows: Callable[[str], bool]) -> Any:
    with _Pieces(path) as file, zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(programs) != 1 or len(entries) != len(archive.infolist()):
            raise _Refused("is a zip archive, but not one of torch.save: it must hold one data.pkl, and no name twice")
        folder = programs[0].removesuffix("data.pkl")
        if (order := f"{folder}byteorder") in entries and _stored(archive, entries[order], 16) != b"little":
            raise _Refused("was written on a big-endian machine, whose numbers are not read here")
        machine = _Machine(path, knows, legacy=False)
        value = machine.run(io.BytesIO(_stored(archive, entries[programs[0]], LARGEST_PICKLE)))
        for storage in machine.storages.values():
            entry = entries.get(f"{folder}data/{storage.key}")
            whole = entry is not None and entry.compress_size == entry.file_size == storage.nbytes
            if not whole or entry.header_offset + storage.nbytes > path.stat().st_size:
                found = "is missing" if entry is None else f"has {entry.compress_size} bytes"
                raise _Refused(f"is damaged: storage {_name(storage.key)} of {storage.nbytes} bytes {found}")
            storage.open = _in_archive(path, entry)
    return value


def _stored(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """The bytes of a small file in an archive."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
        raise _Refused(f"has {_name(entry.filename)} compressed or of {entry.file_size} bytes, more than {most}")
    return archive.read(entry)


def _in_archive(path: Path, entry: zipfile.ZipInfo) -> Callable[[], BinaryIO]:
    @contextmanager
    def open_entry():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"has {_name(entry.filename)} compressed")
        with _Pieces(path) as file, zipfile.ZipFile(file) as archive, archive.open(entry) as reader:
            yield reader

    return open_entry


def _read_legacy(path: Path, knows: Callable[[str], bool]) -> Any:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(LARGEST_PICKLE))  # all pickles stand before the numbers
        machine = _Machine(path, knows, legacy=True)
        if machine.run(head) != MAGIC or machine.run(head) != PROTOCOL:
            raise _Refused("is not a file of torch.save")
        system = machine.run(head)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise _Refused("was written on a big-endian machine, whose numbers are not read here")
        value, keys = machine.run(head), machine.run(head)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise _Refused("is damaged: it has no list of its storages")
        begin = head.tell()
        for key in keys:
            file.seek(begin)
            (count,) = struct.unpack("<q", file.read(8))
            storage = machine.storages.pop(key, None)
            if storage is None or storage.count != count or begin + 8 + storage.nbytes > size:
                raise _Refused(f"is truncated or damaged at storage {_name(key)} of {count} numbers")
            storage.open = _in_file(path, begin + 8)
            begin += 8 + storage.nbytes
    if machine.storages:
        raise _Refused(f"is damaged: storage {_name(next(iter(machine.storages)))} is missing")
    return value


def _in_file(path: Path, begin: int) -> Callable[[], BinaryIO]:
    @contextmanager
    def open_file():
        with open(path, "rb") as file:
            file.seek(begin)
            yield file

    return open_file


def _fill(file: BinaryIO, block: Tensor) -> None:
    """Read a 1-d tensor's bytes."""
    into = memoryview(block.view(torch.uint8).numpy()) if len(block) else memoryview(bytearray())
    for start in range(0, len(into), AT_ONCE):
        piece = into[start : start + AT_ONCE]
        while piece:
            if not (got := file.readinto(piece)):
                raise EOFError("it ends within a tensor")
            piece = piece[got:]


def _skip(file: BinaryIO, count: int) -> None:
    if isinstance(file, io.BufferedReader):  # no check sum: nothing to read it for
        file.seek(count, io.SEEK_CUR)
        return
    while count:
        got = len(file.read(min(count, AT_ONCE)))
        if not got:
            raise EOFError("it ends within a tensor")
        count -= got


# ---------------------------------------------------------------------------------------------------- the machine


class _Global(NamedTuple):
    """A name that a pickle would import; here it stays a name."""

    name: str


class _Machine:
    """Runs pickles of protocol 2 on inert values. Every instruction takes time and memory bounded by its own length."""

    def __init__(self, path: Path, knows: Callable[[str], bool], legacy: bool):
        self.path, self.knows, self.legacy = path, knows, legacy
        self.storages: dict[str, Storage] = {}

    def run(self, file: io.BytesIO) -> Any:
        """Run the pickle that begins where ``file`` stands; returns its value and leaves ``file`` behind it."""
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        for opcode, argument, position in pickletools.genops(file):
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.marked:
                    raise _Refused("is damaged: its pickle ends in the middle")
                break
            self._step(opcode.name, argument, position)
        (value,) = self.stack
        return value

    def _step(self, opcode: str, argument: Any, position: int) -> None:
        match opcode:
            case "PROTO":
                if argument != 2:
                    raise _Refused(f"is a pickle of protocol {argument}; torch.save writes protocol 2")
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "EMPTY_DICT" | "EMPTY_LIST":
                self.stack.append({} if opcode == "EMPTY_DICT" else [])
            case "TUPLE":
                items = self._since_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(int(opcode[-1]))]
                self.stack.append(tuple(reversed(items)))
            case "APPEND" | "APPENDS":
                items = [self._pop()] if opcode == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self._pop(), self._pop()][::-1] if opcode == "SETITEM" else self._since_mark()
                self._set_items(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(self._known(".".join(argument.split(" ", 1))))
            case "BINPERSID":
                self.stack.append(self._persistent(self._pop()))
            case "NEWOBJ":
                self.stack.append(self._new(*reversed((self._pop(), self._pop()))))
            case "REDUCE":
                self.stack.append(self._call(*reversed((self._pop(), self._pop()))))
            case "BUILD":
                self._build(self._pop())
            case _ if opcode in CONSTANTS:
                self.stack.append(CONSTANTS[opcode])
            case _ if opcode in VALUES:
                self.stack.append(argument)
            case _:
                raise _Refused(
                    f"has the instruction {opcode} at byte {position} of its pickle, which torch.save never writes"
                )

    def _pop(self) -> Any:
        if not self.stack:
            raise _Refused("is damaged: its pickle takes what is not there")
        return self.stack.pop()

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _Refused(f"is damaged: its pickle wants a {kind.__name__} where there is none")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        if not self.marked:
            raise _Refused("is damaged: its pickle goes back to a mark that is not there")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        # Other keys would be hashed, tuples of tuples of tuples for as long as they like.
        if len(items) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise _Refused("has a dictionary whose keys are not strings or integers")
        self._top(dict).update(zip(keys, items[1::2], strict=True))

    def _known(self, name: str) -> _Global:
        module, _, last = name.rpartition(".")
        if name in FUNCTIONS or (module == "torch" and last in DTYPES) or self.knows(name):
            return _Global(name)
        raise _Refused(f"names {_name(name)}, which is no part of a network that can be read here")

    def _persistent(self, described: Any) -> Storage | _Global:
        length = 6 if self.legacy else 5
        match described:
            case ("module", _Global() as kind, _, _) if (
                self.legacy
            ):  # the older format keeps source code beside classes
                return kind
        if not isinstance(described, tuple) or len(described) != length or described[0] != "storage":
            raise _Refused("is damaged: it refers to something that is not a storage")
        _, kind, key, _, count, *view = described
        dtype = DTYPES.get(kind.name.rpartition(".")[2]) if isinstance(kind, _Global) else None
        counts = isinstance(count, int) and 0 <= count <= LARGEST_COUNT
        if dtype is None or not isinstance(key, str) or not counts or any(part is not None for part in view):
            raise _Refused("is damaged: it describes a storage by other than its dtype, key and length")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise _Refused(f"is damaged: it describes storage {_name(key)} in two ways")
        return storage

    def _new(self, kind: Any, arguments: Any) -> Inert:
        if not isinstance(kind, _Global) or not self.knows(kind.name) or arguments != ():
            raise _Refused("makes an object other than torch.save does")
        return Inert(kind.name)

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else None
        if isinstance(arguments, tuple):
            match name, arguments:
                case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (
                    Storage() as storage,
                    int(offset),
                    tuple(shape),
                    tuple(stride),
                    *_,
                ):
                    return self._tensor(storage, offset, shape, stride)
                case "torch._utils._rebuild_parameter", (StoredTensor() as data, _, _):
                    return data
                case "collections.OrderedDict", ():
                    return {}
                case "torch.device", (str(kind), *_):
                    return kind
                case "__builtin__.set" | "builtins.set", (list(items),):
                    return items
        raise _Refused(f"calls {_name(name)} with other than torch.save gives it")

    def _tensor(self, storage: Storage, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> StoredTensor:
        numbers = (offset, *shape[: LARGEST_NDIM + 1], *stride[: LARGEST_NDIM + 1])
        plain = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= LARGEST_COUNT for n in numbers)
        if not plain or len(shape) > LARGEST_NDIM or len(shape) != len(stride):
            raise _Refused("is damaged: it has a tensor whose shape is none")
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else 0
        if offset + extent > storage.count:
            raise _Refused(
                f"is damaged: a tensor of shape {list(shape)} lies beyond the {storage.count} numbers it is in"
            )
        expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        row_major = all(n == 1 or a == b for n, a, b in zip(shape, stride, expected, strict=True))
        return StoredTensor(self.path, storage, offset, shape, row_major or not extent)

    def _build(self, state: Any) -> None:
        """Attributes of the object on the stack. An OrderedDict's own (torch's ``_metadata``) say nothing of numbers."""
        built = self._top(object)
        if not isinstance(state, dict) or not isinstance(built, Inert | dict):
            raise _Refused("sets the state of something that has none")
        if isinstance(built, Inert):
            if built.state is not None:
                raise _Refused("sets the state of one object twice")
            built.state = state
