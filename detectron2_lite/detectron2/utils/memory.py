"""Surviving CUDA's out-of-memory errors."""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps

import torch


@contextmanager
def _ignore_cuda_oom():
    try:
        yield
    except RuntimeError as error:
        if "CUDA out of memory. " not in str(error):
            raise


def _to_cpu(value):
    device = getattr(value, "device", None)
    return value.cpu() if getattr(device, "type", None) == "cuda" else value


def retry_if_cuda_oom(func: Callable) -> Callable:
    """Wrap a stateless function so that it survives CUDA's out-of-memory error.

    The call is repeated after emptying the cache, then with its tensor arguments (not nested ones)
    moved to the CPU; in that case the result lies on the CPU too.
    """

    @wraps(func)
    def wrapped(*args, **kwargs):
        with _ignore_cuda_oom():
            return func(*args, **kwargs)
        torch.cuda.empty_cache()
        with _ignore_cuda_oom():
            return func(*args, **kwargs)
        logging.getLogger(__name__).info("CUDA is out of memory: running %s on the CPU", func)
        return func(*map(_to_cpu, args), **{name: _to_cpu(v) for name, v in kwargs.items()})

    return wrapped
