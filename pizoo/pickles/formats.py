"""The two formats of ``torch.save``, a pickle and numbers each: the zip archive, and the one before torch 1.6."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pizoo.files import check_file
from pizoo.pickles.machine import Machine
from pizoo.pickles.messages import Refused, shown, told
from pizoo.pickles.tensors import AT_ONCE

# A pickled net is a few kB, its numbers lie apart; the machine's memory is at most some hundred times its program.
LARGEST_PICKLE = 1 << 20
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what older versions of torch.save begin with


def read_pickled(path: str | os.PathLike, knows: Callable[[str], bool] = lambda name: False) -> Any:
    """What ``torch.save`` wrote into a file: dicts, lists, tuples, numbers and strings, with tensors and objects as above.

    Both of its formats are read: the zip archive, and the one before torch 1.6.

    Args:
        knows: whether a class, by its full name, may stand in the file, as an :class:`Inert`.

    Raises:
        CheckpointError: the file is not one of torch.save, is damaged, or names anything else; nothing was executed.
    """
    path = check_file(Path(path))
    with told(path):
        with open(path, "rb") as file:
            archive = file.read(4) == b"PK\3\4"
        return (_read_archive if archive else _read_legacy)(path, knows)


class _Pieces(io.FileIO):
    """A file that is read in pieces only: the index of a zip file, by its own word of any length, is no exception."""

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > AT_ONCE:
            raise Refused(f"is a zip archive that has {size} bytes where a few thousand were expected")
        return super().read(size) or b""


def _read_archive(path: Path, knows: Callable[[str], bool]) -> Any:
    with _Pieces(path) as file, zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(programs) != 1 or len(entries) != len(archive.infolist()):
            raise Refused("is a zip archive, but not one of torch.save: it must hold one data.pkl, and no name twice")
        folder = programs[0].removesuffix("data.pkl")
        if (order := f"{folder}byteorder") in entries and _stored(archive, entries[order], 16) != b"little":
            raise Refused("was written on a big-endian machine, whose numbers are not read here")
        machine = Machine(path, knows, legacy=False)
        value = machine.run(io.BytesIO(_stored(archive, entries[programs[0]], LARGEST_PICKLE)))
        for storage in machine.storages.values():
            entry = entries.get(f"{folder}data/{storage.key}")
            whole = entry is not None and entry.compress_size == entry.file_size == storage.nbytes
            if not whole or entry.header_offset + storage.nbytes > path.stat().st_size:
                found = "is missing" if entry is None else f"has {entry.compress_size} bytes"
                raise Refused(f"is damaged: storage {shown(storage.key)} of {storage.nbytes} bytes {found}")
            storage.open = _in_archive(path, entry)
    return value


def _stored(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """The bytes of a small file in an archive."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
        raise Refused(f"has {shown(entry.filename)} compressed or of {entry.file_size} bytes, more than {most}")
    return archive.read(entry)


def _in_archive(path: Path, entry: zipfile.ZipInfo) -> Callable[[], BinaryIO]:
    @contextmanager
    def open_entry():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"has {shown(entry.filename)} compressed")
        with _Pieces(path) as file, zipfile.ZipFile(file) as archive, archive.open(entry) as reader:
            yield reader

    return open_entry


def _read_legacy(path: Path, knows: Callable[[str], bool]) -> Any:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(LARGEST_PICKLE))  # all pickles stand before the numbers
        machine = Machine(path, knows, legacy=True)
        if machine.run(head) != MAGIC or machine.run(head) != PROTOCOL:
            raise Refused("is not a file of torch.save")
        system = machine.run(head)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Refused("was written on a big-endian machine, whose numbers are not read here")
        value, keys = machine.run(head), machine.run(head)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Refused("is damaged: it has no list of its storages")
        begin = head.tell()
        for key in keys:
            file.seek(begin)
            (count,) = struct.unpack("<q", file.read(8))
            storage = machine.storages.pop(key, None)
            if storage is None or storage.count != count or begin + 8 + storage.nbytes > size:
                raise Refused(f"is truncated or damaged at storage {shown(key)} of {count} numbers")
            storage.open = _in_file(path, begin + 8)
            begin += 8 + storage.nbytes
    if machine.storages:
        raise Refused(f"is damaged: storage {shown(next(iter(machine.storages)))} is missing")
    return value


def _in_file(path: Path, begin: int) -> Callable[[], BinaryIO]:
    @contextmanager
    def open_file():
        with open(path, "rb") as file:
            file.seek(begin)
            yield file

    return open_file
