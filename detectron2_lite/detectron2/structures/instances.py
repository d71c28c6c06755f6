"""The instances of one image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


class Instances:
    """N instances of one image of size (height, width): fields of length N, read as attributes.

    Indexing by an int, a slice, a list, an index vector or a bool mask indexes every field.
    Names that start with "_" are private and no fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        return self._image_size

    def __setattr__(self, name: str, val: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, val)
        else:
            self.set(name, val)

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"Cannot find field '{name}' in the given Instances!")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Add or replace a field; its length must be that of the others."""
        if self._fields:
            assert len(value) == len(self), (
                f"Adding a field of length {len(value)} to a Instances of length {len(self)}"
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        return self._fields[name]

    def remove(self, name: str) -> None:
        del self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """The fields by name; changing the dict changes the instances."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """Call `to` of every field that has one."""
        moved = {k: v.to(*args, **kwargs) for k, v in self._fields.items() if hasattr(v, "to")}
        return Instances(self._image_size, **{**self._fields, **moved})

    def __getitem__(self, item: int | slice | list[int] | torch.Tensor) -> Instances:
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError("Instances index out of range!")
            item = slice(item, None, len(self))
        return Instances(self._image_size, **{k: v[item] for k, v in self._fields.items()})

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Empty Instances does not support __len__!")

    def __iter__(self):
        raise NotImplementedError("`Instances` object is not iterable!")

    @staticmethod
    def cat(instance_lists: Sequence[Instances]) -> Instances:
        """Join instances of images of one size; fields are tensors, lists or have `cat`."""
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        assert all(instances.image_size == first.image_size for instances in instance_lists)
        joined = {k: _join([i.get(k) for i in instance_lists]) for k in first.get_fields()}
        return Instances(first.image_size, **joined)

    def __repr__(self) -> str:
        size = "image_height={}, image_width={}".format(*self._image_size)
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return f"Instances(num_instances={len(self)}, {size}, fields=[{fields}])"


def _join(values: list) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return list(itertools.chain(*values))
    if not hasattr(values[0], "cat"):
        raise ValueError(f"Unsupported type {type(values[0])} for concatenation")
    return type(values[0]).cat(values)
