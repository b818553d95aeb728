"""The machine that runs a pickle: a few instructions, on values that do nothing."""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pizoo.pickles.messages import Refused, shown
from pizoo.pickles.tensors import Storage, StoredTensor

LARGEST_NDIM = 8
LARGEST_COUNT = 1 << 48  # of numbers in a storage: more than any disk holds
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


class _Global(NamedTuple):
    """A name that a pickle would import; here it stays a name."""

    name: str


class Machine:
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
                    raise Refused("is damaged: its pickle ends in the middle")
                break
            self._step(opcode.name, argument, position)
        (value,) = self.stack
        return value

    def _step(self, opcode: str, argument: Any, position: int) -> None:
        match opcode:
            case "PROTO":
                if argument != 2:
                    raise Refused(f"is a pickle of protocol {argument}; torch.save writes protocol 2")
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
                raise Refused(
                    f"has the instruction {opcode} at byte {position} of its pickle, which torch.save never writes"
                )

    def _pop(self) -> Any:
        if not self.stack:
            raise Refused("is damaged: its pickle takes what is not there")
        return self.stack.pop()

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Refused(f"is damaged: its pickle wants a {kind.__name__} where there is none")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        if not self.marked:
            raise Refused("is damaged: its pickle goes back to a mark that is not there")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        # Other keys would be hashed, tuples of tuples of tuples for as long as they like.
        if len(items) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise Refused("has a dictionary whose keys are not strings or integers")
        self._top(dict).update(zip(keys, items[1::2], strict=True))

    def _known(self, name: str) -> _Global:
        module, _, last = name.rpartition(".")
        if name in FUNCTIONS or (module == "torch" and last in DTYPES) or self.knows(name):
            return _Global(name)
        raise Refused(f"names {shown(name)}, which is no part of a network that can be read here")

    def _persistent(self, described: Any) -> Storage | _Global:
        length = 6 if self.legacy else 5
        match described:
            case ("module", _Global() as kind, _, _) if (
                self.legacy
            ):  # the older format keeps source code beside classes
                return kind
        if not isinstance(described, tuple) or len(described) != length or described[0] != "storage":
            raise Refused("is damaged: it refers to something that is not a storage")
        _, kind, key, _, count, *view = described
        dtype = DTYPES.get(kind.name.rpartition(".")[2]) if isinstance(kind, _Global) else None
        counts = isinstance(count, int) and 0 <= count <= LARGEST_COUNT
        if dtype is None or not isinstance(key, str) or not counts or any(part is not None for part in view):
            raise Refused("is damaged: it describes a storage by other than its dtype, key and length")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise Refused(f"is damaged: it describes storage {shown(key)} in two ways")
        return storage

    def _new(self, kind: Any, arguments: Any) -> Inert:
        if not isinstance(kind, _Global) or not self.knows(kind.name) or arguments != ():
            raise Refused("makes an object other than torch.save does")
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
        raise Refused(f"calls {shown(name)} with other than torch.save gives it")

    def _tensor(self, storage: Storage, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> StoredTensor:
        numbers = (offset, *shape[: LARGEST_NDIM + 1], *stride[: LARGEST_NDIM + 1])
        plain = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= LARGEST_COUNT for n in numbers)
        if not plain or len(shape) > LARGEST_NDIM or len(shape) != len(stride):
            raise Refused("is damaged: it has a tensor whose shape is none")
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else 0
        if offset + extent > storage.count:
            raise Refused(
                f"is damaged: a tensor of shape {list(shape)} lies beyond the {storage.count} numbers it is in"
            )
        expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        row_major = all(n == 1 or a == b for n, a, b in zip(shape, stride, expected, strict=True))
        return StoredTensor(self.path, storage, offset, shape, row_major or not extent)

    def _build(self, state: Any) -> None:
        """Attributes of the object on the stack. An OrderedDict's own (torch's ``_metadata``) say nothing of numbers."""
        built = self._top(object)
        if not isinstance(state, dict) or not isinstance(built, Inert | dict):
            raise Refused("sets the state of something that has none")
        if isinstance(built, Inert):
            if built.state is not None:
                raise Refused("sets the state of one object twice")
            built.state = state
