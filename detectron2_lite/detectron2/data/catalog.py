"""The two global tables of data sets: how to load one, and what is known about it."""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable
from typing import Any

__all__ = ["DatasetCatalog", "Metadata", "MetadataCatalog"]


class _Catalog(UserDict):
    def list(self) -> list[str]:
        """Names of all entries, in order of registration."""
        return [*self.keys()]

    def remove(self, name: str) -> None:
        self.pop(name)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lstrip('_')}({', '.join(self.keys())})"

    __str__ = __repr__


class _DatasetCatalog(_Catalog):
    """Maps a name to a function without arguments that returns ``list[dict]``."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Raises AssertionError if ``func`` is not callable or ``name`` is taken."""
        assert callable(func), f"Dataset '{name}' needs a function to register, got {func!r}."
        assert name not in self, f"Dataset '{name}' is already registered!"
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Call the registered function; KeyError if there is none."""
        if name not in self:
            known = ", ".join(self.keys())
            raise KeyError(f"Dataset '{name}' is not registered! Available datasets are: {known}")
        return self[name]()


class Metadata(types.SimpleNamespace):
    """Facts about one data set as attributes; an attribute keeps its value."""

    name: str = "N/A"  # a class attribute, so that error messages can always read it

    def __getattr__(self, key: str) -> Any:
        known = [k for k in self.__dict__ if k != "name"]
        state = f"Available keys are {known}." if known else "metadata is empty."
        raise AttributeError(
            f"Attribute '{key}' does not exist in the metadata of dataset '{self.name}': {state}"
        )

    def __setattr__(self, key: str, val: Any) -> None:
        if not hasattr(self, key):
            super().__setattr__(key, val)
        elif (old := getattr(self, key)) != val:
            raise AssertionError(
                f"Attribute '{key}' in the metadata of '{self.name}' cannot be set to a different "
                f"value!\n{old} != {val}"
            )

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        for key, val in kwargs.items():
            setattr(self, key, val)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


class _MetadataCatalog(_Catalog):
    """Maps a name to its one :class:`Metadata`, created on first access."""

    def get(self, name: str) -> Metadata:
        assert len(name), "A dataset's name cannot be empty."
        return self.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
