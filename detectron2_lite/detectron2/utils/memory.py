"""Surviving CUDA's out-of-memory errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps

import torch

__all__ = ["retry_if_cuda_oom"]


@contextmanager
def _ignore_cuda_oom():
    try:
        yield
    except RuntimeError as error:
        if "CUDA out of memory. " not in str(error):
            raise


def _to_cpu(value):
    device = getattr(value, "device", None)
    on_gpu = getattr(device, "type", None) == "cuda" and hasattr(value, "to")
    return value.to(device="cpu") if on_gpu else value


def retry_if_cuda_oom(func: Callable) -> Callable:
    """Wrap a stateless function so that it survives CUDA's out-of-memory error.

    The call is repeated after emptying the cache, then with its tensor-like arguments (not
    nested ones) moved to the CPU; in that case the result lies on the CPU too.
    """

    @wraps(func)
    def wrapped(*args, **kwargs):
        with _ignore_cuda_oom():
            return func(*args, **kwargs)
        torch.cuda.empty_cache()
        with _ignore_cuda_oom():
            return func(*args, **kwargs)
        logging.getLogger(__name__).info("CUDA is out of memory: running %s on the CPU", func)
        cpu_kwargs = {name: _to_cpu(value) for name, value in kwargs.items()}
        return func(*(_to_cpu(value) for value in args), **cpu_kwargs)

    return wrapped
