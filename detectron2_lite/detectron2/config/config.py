"""CfgNode with `_BASE_` inheritance, and the bridge from a config to explicit arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from detectron2.utils.file_io import PathManager
from fvcore.common.config import CfgNode as _CfgNode


class CfgNode(_CfgNode):
    """fvcore's CfgNode (attribute access, `_BASE_` files, freezing, merging) with a VERSION key.

    Unlike in Detectron2, a file with unsafe YAML tags (`!!python/...`) is always refused.
    """

    @classmethod
    def _open_cfg(cls, filename: str):
        return PathManager.open(filename, "r")

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Read a YAML file and everything its `_BASE_` names into nested dicts.

        Raises yaml.constructor.ConstructorError, which names the file, the line and the tag, at a
        tag that YAML's safe loader lacks, whatever `allow_unsafe` says.
        """
        return super().load_yaml_with_base(filename, allow_unsafe=False)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file into this config; unknown keys raise KeyError.

        `allow_unsafe` exists for Detectron2's signature and is ignored.
        """
        assert PathManager.isfile(cfg_filename), f"Config file '{cfg_filename}' does not exist!"
        loaded = type(self)(self.load_yaml_with_base(cfg_filename))
        version = loaded.get("VERSION", self.VERSION)
        assert version == self.VERSION, (
            f"Cannot merge '{cfg_filename}' of version {version} into version {self.VERSION}."
        )
        self.merge_from_other_cfg(loaded)


def get_cfg() -> CfgNode:
    """Return a copy of the default config."""
    from .defaults import DEFAULTS

    return DEFAULTS.clone()


def configurable(init_func: Callable | None = None, *, from_config: Callable | None = None):
    """Let a class or a function be called with a config in place of its explicit arguments.

    On a class, decorate `__init__` and give the class a `from_config(cls, cfg, ...)` classmethod
    that returns the arguments as a dict; on a function, pass `from_config=` a function that does.
    A call whose first argument (or `cfg=`) is a CfgNode goes through `from_config`; arguments
    that `from_config` does not take override what it returns.

    Raises AttributeError or TypeError, at the call, if `from_config` is missing or malformed.
    """
    if init_func is None:
        return configurable if from_config is None else functools.partial(_wrap, from_config)
    valid = inspect.isfunction(init_func) and init_func.__name__ == "__init__"
    assert valid and from_config is None, "@configurable without arguments is for __init__ only."

    @functools.wraps(init_func)
    def wrapped(self, *args, **kwargs):
        name = type(self).__name__
        translate = getattr(type(self), "from_config", None)
        if translate is None:
            raise AttributeError(f"{name} is @configurable and needs a 'from_config' classmethod.")
        if not inspect.ismethod(translate):
            raise TypeError(f"{name}.from_config must be a classmethod.")
        args, kwargs = _translate(translate, args, kwargs)
        init_func(self, *args, **kwargs)

    return wrapped


def _wrap(from_config: Callable, func: Callable) -> Callable:
    @functools.wraps(func)
    def wrapped(*args, **kwargs):
        args, kwargs = _translate(from_config, args, kwargs)
        return func(*args, **kwargs)

    wrapped.from_config = from_config
    return wrapped


def _translate(from_config: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return explicit arguments: the given ones, or `from_config`'s if one of them is a config."""
    if not any(isinstance(value, _CfgNode) for value in (*args[:1], kwargs.get("cfg"))):
        return args, kwargs
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{from_config.__qualname__} must take 'cfg' as the first argument!")
    overrides = {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not any(parameter.kind in variadic for parameter in parameters.values()):
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name not in parameters}
    return (), {**from_config(*args, **kwargs), **overrides}
