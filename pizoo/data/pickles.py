"""Pickles of plain containers and numpy arrays, read without executing anything in them.

A pickle is a program that may call whatever it names. Here it can name no more than what numpy writes for an array, and what
answers to these names are stand-ins of our own: an array is made of its shape, its dtype and its bytes by
:func:`numpy.frombuffer`, after both were checked.
"""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import numpy as np

_NUMBERS = re.compile(r"([<>|=]?)(b1|[iu][1248]|f[248])")  # dtypes without Python objects in them


def read_pickle(path: str | os.PathLike) -> Any:
    """What a pickle holds: dicts, lists, tuples, strings, bytes, numbers, booleans, None and numpy arrays of numbers.

    Raises:
        ValueError: a pickle that names anything else, by that name; a file that is no pickle.
    """
    with open(path, "rb") as file:
        try:
            return _plain(_Unpickler(file, encoding="latin1").load())
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # whatever a stream of wrong instructions leads to
            raise ValueError(
                f"{path} is not a pickle of plain containers and arrays: {type(error).__name__}: {error}"
            ) from None


class _Refused(Exception):
    """Something a pickle must not hold."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise _Refused(f"it asks for {module}.{name}; numpy arrays and plain containers alone are read")
        return found


class _Dtype:
    """In the place of ``numpy.dtype``."""

    def __init__(self, code: str, *flags: Any):
        self.code, self.order = code, ""

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def made(self) -> np.dtype:
        found = _NUMBERS.fullmatch(self.code) if isinstance(self.code, str) else None
        if not found or self.order not in ("", "<", ">", "|", "="):
            raise _Refused(f"it holds an array of dtype {self.code!r}; it must be of numbers")
        return np.dtype((self.order or found[1]) + found[2])


class _Array:
    """In the place of ``numpy.ndarray``: shape, dtype and bytes come with its state."""

    made: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.made = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    made = dtype.made()  # of an array of objects the data are a list of them
    return np.frombuffer(data, made).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.made = _array(data, dtype, shape, order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as old protocols write them."""
    if encoding != "latin1":
        raise _Refused(f"it holds bytes encoded as {encoding!r}; they must be latin1")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype.made())[0].item(),
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


def _plain(value: Any) -> Any:
    """A value with arrays in the place of their stand-ins; refuses what is neither an array nor plain."""
    if isinstance(value, _Array) and value.made is not None:
        return value.made
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if value is None or isinstance(value, str | bytes | bytearray | int | float | complex):
        return value
    raise _Refused(f"it holds a {type(value).__name__.lstrip('_').lower()} that is not whole")
