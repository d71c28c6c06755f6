"""Reads pickled dictionaries of arrays without executing them: the model zoo's, ``np.save``'s.

A pickle is a program: its opcodes may call any importable function. Here only the opcodes and names
that arrays need are allowed, and each name is replaced by a function of this file; NumPy gets only
plain numeric types, and shapes and bytes that match. Keys, which are hashed, must be strings or
whole numbers. The number of values is limited, so that small files cannot take much time.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

import numpy as np
import torch

NUMERIC_KINDS = "biufc"  # NumPy's letters for bool, signed, unsigned, float and complex
MOST_AXES = 32  # of an array
MOST_VALUES = 100_000  # of a file; published ones have some hundreds
_PLAIN = (type(None), bool, int, float, str, bytes, np.generic, np.ndarray)
_OPCODES = """
    PROTO FRAME STOP MARK POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL
""".split()


class UnsafePickleError(pickle.UnpicklingError):
    """The file contains something other than dictionaries of arrays, or is damaged."""


def load_arrays(file: IO[bytes]) -> Any:
    """Read dictionaries, lists and tuples of numbers, strings and arrays from a pickle.

    Python 2's files are read as latin1. Arrays have native byte order and are writable; tensors
    become arrays; an array of one Python object (as ``np.save`` writes a dictionary) becomes the
    object.

    Raises:
        UnsafePickleError: if the file contains or calls anything else, or is truncated.
        pickle.UnpicklingError, EOFError: if it is not a pickle.
    """
    try:
        value = _Unpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError):
        raise
    except Exception as error:  # of any kind: the unpickler checks little
        raise UnsafePickleError(f"its opcodes do not fit together ({error})") from error
    left, count = [value], 0
    while left:
        item = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise UnsafePickleError(f"it holds more than {MOST_VALUES:,} values")
        if isinstance(item, dict | list | tuple):
            left += item.values() if isinstance(item, dict) else item
        elif not isinstance(item, _PLAIN):
            raise UnsafePickleError(f"it holds a {type(item).__name__}")
    return value


def _bytes(raw: str | bytes | bytearray) -> bytes:
    """Accept str too, as Python 2's bytes are read as str."""
    return raw.encode("latin1") if isinstance(raw, str) else bytes(memoryview(raw))


def _dtype(code: str | bytes, *_flags: Any) -> np.dtype:
    text = _bytes(code).decode("latin1")
    dtype = np.dtype(text, False, True)  # a copy, whose byte order may be set
    if dtype.kind not in NUMERIC_KINDS and not dtype.hasobject:
        raise UnsafePickleError(f"an array of type '{text}' is not plain numbers")
    return dtype


def _dtype_state(state: tuple) -> tuple:
    order = _bytes(state[1]).decode("latin1")
    if order not in ("<", ">", "=", "|"):
        raise UnsafePickleError("a dtype with an unknown byte order")
    return 3, order, None, None, None, -1, -1, 0


def _empty(*_ignored: Any) -> np.ndarray:
    return np.empty(0, np.uint8)


def _array_state(state: tuple) -> tuple:
    _version, shape, dtype, fortran, raw = state
    if (
        not isinstance(dtype, np.dtype)
        or dtype.hasobject
        or not isinstance(shape, tuple)
        or len(shape) > MOST_AXES
        or not all(isinstance(n, int) and 0 <= n <= sys.maxsize for n in shape)
    ):
        raise UnsafePickleError("an array whose description is not a shape, a type and bytes")
    raw = _bytes(raw)
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise UnsafePickleError(f"an array of shape {shape} and {len(raw)} bytes")
    return 1, shape, dtype, bool(fortran), raw


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    array = _empty()
    array.__setstate__(_array_state((1, shape, dtype, order == "F", raw)))
    return array


def _scalar(dtype: Any, raw: Any) -> Any:
    return _from_buffer(raw, dtype, (), "C")[()]


def _storage(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_ignored: Any) -> np.ndarray:
    values = torch.empty(0, dtype=storage.dtype).set_(storage)
    tensor = values.as_strided(size, stride, offset)  # which refuses to go beyond them
    if tensor.numel() > len(values):
        raise UnsafePickleError(f"a tensor of shape {size} and {len(values)} values")
    return tensor.numpy().copy()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how Python 3 writes bytes in protocols 0 to 2
        raise UnsafePickleError("bytes in another encoding than latin1")
    return text.encode("latin1")


def _dict(pairs: Iterable = ()) -> dict:
    pairs = list(pairs)
    if not all(isinstance(key, str | int | np.integer) for key, _ in pairs):
        raise UnsafePickleError("a dictionary whose keys are not all strings or whole numbers")
    return dict(pairs)


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _empty,
    ("numpy", "dtype"): _dtype,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): _dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how Python 3 writes empty ones there
}
for _package in ("numpy.core", "numpy._core"):
    for _module in ("multiarray", "numeric"):
        _ALLOWED[f"{_package}.{_module}", "_reconstruct"] = _empty
        _ALLOWED[f"{_package}.{_module}", "scalar"] = _scalar
        _ALLOWED[f"{_package}.{_module}", "_frombuffer"] = _from_buffer


_PythonsOwn: Any = pickle._Unpickler  # written in Python, unlike pickle.Unpickler


class _Unpickler(_PythonsOwn):
    """Accepts the opcodes above; those that call or change something are overridden."""

    dispatch = {
        ord(op.code): _PythonsOwn.dispatch[ord(op.code)]
        for op in pickletools.opcodes
        if op.name in _OPCODES
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not any(function is known for known in _ALLOWED.values()):
            raise UnsafePickleError(f"it calls a {type(function).__name__}")
        self.stack.append(function(*args))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            if not target.hasobject:
                target.__setstate__(_dtype_state(state))  # type: ignore[attr-defined]
        elif not isinstance(target, np.ndarray):
            raise UnsafePickleError(f"it sets the state of a {type(target).__name__}")
        elif state[1] == () and isinstance(state[2], np.dtype) and state[2].hasobject:
            (self.stack[-1],) = state[4]
        else:
            target.__setstate__(_array_state(state))

    def _new_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append(_dict(zip(items[::2], items[1::2], strict=True)))

    def _update(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnsafePickleError(f"it sets items of a {type(target).__name__}")
        target.update(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch |= {
        ord(pickle.REDUCE): _reduce,
        ord(pickle.BUILD): _build,
        ord(pickle.DICT): _new_dict,
        ord(pickle.SETITEM): lambda self: self._update([self.stack.pop(-2), self.stack.pop()]),
        ord(pickle.SETITEMS): lambda self: self._update(self.pop_mark()),
    }
