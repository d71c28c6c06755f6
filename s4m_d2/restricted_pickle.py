"""Reads pickled dictionaries of arrays without executing them: the model zoo's, ``np.save``'s.

A pickle may call whatever it names. Here it can name only what is in ``_ALLOWED``, and gets a
stand-in of this file. NumPy gets plain numeric types, and shapes that match the bytes. A small file
cannot take much time: keys, which are hashed, are plain, and the number of values is limited.
"""

import io
import pickle
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import torch

_KINDS = "biufc"  # NumPy's letters for bool, signed, unsigned, float and complex
_MOST_VALUES = 100_000  # of a file; published ones have some hundreds


class UnsafePickleError(pickle.UnpicklingError):
    """The file contains something other than dictionaries of arrays, or is damaged."""


def load_arrays(file: IO[bytes]) -> Any:
    """Read dictionaries, lists and tuples of numbers, strings and arrays from a pickle.

    Python 2's files are read as latin1. Arrays have native byte order and are writable; tensors
    become arrays; an array of one Python object (as ``np.save`` writes a dictionary) becomes the
    object.

    Raises:
        UnsafePickleError: if the file names anything else, or an array is malformed.
        pickle.UnpicklingError, EOFError: if it is truncated or not a pickle.
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
        if count > _MOST_VALUES:
            raise UnsafePickleError(f"it holds more than {_MOST_VALUES:,} values")
        if isinstance(item, dict | list | tuple):
            left += item.values() if isinstance(item, dict) else item
    return value.item() if isinstance(value, _Array) and value.dtype.hasobject else value


class _DType:
    """A plain numeric type, or that of Python objects; its state is the byte order."""

    def __init__(self, code: str, *_flags: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in _KINDS and self.dtype != object:
            raise UnsafePickleError(f"an array of type '{code}' is not plain numbers")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that gets its content as state: bytes, or a list of one object."""

    def __setstate__(self, state: tuple) -> None:
        _version, shape, kind, is_fortran, raw = state
        dtype = kind.dtype
        if dtype.hasobject:  # whose bytes would be pointers
            is_whole = shape == () and isinstance(raw, list) and len(raw) == 1
        else:
            raw = raw.encode("latin1") if isinstance(raw, str) else bytes(memoryview(raw))
            is_whole = np.broadcast_to(np.empty((), dtype), shape).nbytes == len(raw)
        if not is_whole:
            raise UnsafePickleError(f"an array of shape {shape} and {len(raw)} bytes")
        content: Any = 1, shape, dtype, bool(is_fortran), raw
        super().__setstate__(content)


def _empty(*_ignored: Any) -> _Array:
    return _Array(0)


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _empty()
    array.__setstate__((1, shape, kind, order == "F", raw))
    return array


def _storage(raw: bytes) -> np.ndarray:
    storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=storage.dtype).set_(storage).numpy()


def _tensor(values: np.ndarray, offset: Any, size: Any, stride: Any, *_ignored: Any) -> np.ndarray:
    tensor = torch.from_numpy(values).as_strided(size, stride, offset)  # refuses to go beyond them
    if tensor.numel() > len(values):
        raise UnsafePickleError(f"a tensor of shape {size} and {len(values)} values")
    return tensor.numpy().copy()


def _dict(pairs: Iterable = ()) -> dict:
    pairs = list(pairs)
    if not all(isinstance(key, str | int | np.integer) for key, _ in pairs):
        raise UnsafePickleError("a dictionary whose keys are not all strings or whole numbers")
    return dict(pairs)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _empty,
    ("numpy", "dtype"): _DType,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): _dict,
    ("_codecs", "encode"): lambda text, _latin1: text.encode("latin1"),  # bytes, protocols 0 to 2
    ("__builtin__", "bytes"): lambda: b"",  # empty ones there
}
for _package in ("numpy.core", "numpy._core"):
    for _module in ("multiarray", "numeric"):
        _name = f"{_package}.{_module}"
        _ALLOWED[_name, "_reconstruct"] = _empty
        _ALLOWED[_name, "scalar"] = lambda kind, raw: _from_buffer(raw, kind, (), "C")[()]
        _ALLOWED[_name, "_frombuffer"] = _from_buffer


# The one in C allocates as much as the largest index says, of a damaged file many GiB.
_PythonsOwn: Any = pickle._Unpickler


class _Unpickler(_PythonsOwn):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name].__call__  # which a pickle can call, but not change

    def _new_dict(self, items: list) -> None:
        self.stack.append({})
        self._update(items)

    def _update(self, items: list) -> None:
        self.stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch = _PythonsOwn.dispatch | {
        ord(pickle.DICT): lambda self: self._new_dict(self.pop_mark()),
        ord(pickle.SETITEM): lambda self: self._update([self.stack.pop(-2), self.stack.pop()]),
        ord(pickle.SETITEMS): lambda self: self._update(self.pop_mark()),
    }
    for _opcode in (pickle.ADDITEMS, pickle.FROZENSET):  # which hash too; arrays need no sets
        del dispatch[ord(_opcode)]
