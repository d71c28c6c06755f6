"""Reads the model zoo's ``.pkl`` files (dictionaries of NumPy arrays) without running them.

A pickle is a program: its opcodes may call any importable function. Here every name that it asks
for is answered from a table of our own constructors, which only note what they were given; any
other name is refused. Arrays are then made from the noted bytes, of plain numeric types only, so
not even NumPy's own unpickling code sees the file's content.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, Literal

import numpy as np

NUMERIC_KINDS = "biufc"  # NumPy's letters for bool, signed, unsigned, float and complex


class UnsafePickleError(pickle.UnpicklingError):
    """The file asks for something that a dictionary of arrays does not need."""


class _Dtype:
    """What a pickle says about a dtype; becomes the dtype once its byte order is known."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str, *_flags: Any) -> None:
        if np.dtype(_text(code)).kind not in NUMERIC_KINDS:
            raise UnsafePickleError(f"an array of type {_text(code)!r} is not plain numbers")
        self._code = _text(code)
        self._order: Any = "="

    def __setstate__(self, state: tuple) -> None:
        if _text(state[1]) not in ("<", ">", "=", "|"):
            raise UnsafePickleError("a dtype with an unknown byte order")
        self._order = _text(state[1])

    def dtype(self) -> np.dtype:
        return np.dtype(self._code).newbyteorder(self._order)


class _Array:
    """What a pickle says about an array; ``array()`` builds it."""

    __slots__ = ("_dtype", "_order", "_raw", "_shape")

    def __init__(self, *_ignored: Any) -> None:
        self._shape: tuple = (0,)
        self._dtype = _Dtype("u1")
        self._order: Literal["C", "F"] = "C"
        self._raw: bytes | str = b""

    def __setstate__(self, state: tuple) -> None:
        _version, self._shape, self._dtype, fortran, raw = state
        self._order = "F" if fortran else "C"
        self._raw = raw

    @classmethod
    def from_buffer(cls, raw: bytes | str, dtype: _Dtype, shape: tuple, order: str) -> _Array:
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", raw))
        return array

    def array(self) -> np.ndarray:
        raw = self._raw.encode("latin1") if isinstance(self._raw, str) else self._raw
        shape = self._shape
        if (
            not isinstance(raw, bytes | bytearray)
            or not isinstance(self._dtype, _Dtype)
            or not isinstance(shape, tuple)
            or not all(isinstance(n, int) and n >= 0 for n in shape)
        ):
            raise UnsafePickleError("an array whose description is not a shape, a type and bytes")
        dtype = self._dtype.dtype()
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise UnsafePickleError(f"an array of shape {shape} and {len(raw)} bytes")
        flat = np.frombuffer(raw, dtype)
        native = flat.astype(dtype.newbyteorder("="))  # a copy: PyTorch wants native, writable data
        return native.reshape(shape, order=self._order)


class _Constructor:
    """A callable that a pickle can call but neither change nor look into."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable) -> None:
        self._build = build

    def __call__(self, *args: Any) -> Any:
        return self._build(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("an attempt to change a constructor")


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return _Array.from_buffer(raw, dtype, (), "C").array()[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how Python 3 writes bytes in protocols 0 to 2
        raise UnsafePickleError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # how Python 3 writes empty bytes in protocols 0 to 2


def _ordered_dict(*items: Any) -> dict:
    return OrderedDict(*items)


_NUMPY: dict[str, Callable] = {
    "_reconstruct": _Array,
    "scalar": _scalar,
    "_frombuffer": _Array.from_buffer,
}
_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{
        (f"numpy.{package}.{module}", name): build
        for package in ("core", "_core")
        for module in ("multiarray", "numeric")
        for name, build in _NUMPY.items()
    },
}


# What the standard unpickler and the constructors raise on opcodes that make no sense.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"it asks for {module}.{name}")
        return _Constructor(_ALLOWED[module, name])


def load_arrays(file: IO[bytes]) -> Any:
    """The dictionaries, lists and tuples of numbers, strings and arrays in a pickle.

    Python 2's files are read as latin1. Arrays come out in native byte order, writable.

    Raises:
        UnsafePickleError: if the file holds or calls anything else.
        pickle.UnpicklingError, EOFError: if it ends early or is no pickle.
    """
    try:
        return _materialized(_Unpickler(file, encoding="latin1").load())
    except _MALFORMED as error:
        raise UnsafePickleError(f"its opcodes do not fit together ({error})") from error


def _materialized(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array()
    if isinstance(value, dict):
        return {_materialized(k): _materialized(v) for k, v in dict.items(value)}
    if isinstance(value, list | tuple):
        return type(value)(_materialized(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
        return value
    raise UnsafePickleError(f"it holds a {type(value).__name__}")
