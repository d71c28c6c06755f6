"""Every random draw is a function of (seed, stream, position in the stream).

The loader attaches ``seeds`` to each sample: one integer for each purpose below. Whoever draws for
that sample makes a generator from its integer, so that a draw depends neither on a worker's state
nor on what was drawn before it, and a run continues exactly where it stopped.

The default generators of PyTorch, NumPy and Python, from which other libraries draw, are seeded in
each iteration; their states can be read and set as plain tensors and numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: What is drawn for a sample; each purpose has a seed of its own.
PURPOSES = ("augment", "strong_view", "loss_points", "prompt_points", "refine_points", "arp")


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings.

    Stable over processes, machines and Python versions; different key sequences give
    independent seeds.
    """
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seeds(seed: int, stream: str, position: int) -> dict[str, int]:
    """The seeds of the sample at ``position`` (counted over all ranks) of ``stream``."""
    return {purpose: derive_seed(seed, stream, position, purpose) for purpose in PURPOSES}


def seed_default_generators(seed: int) -> None:
    """Seed PyTorch's (all devices), NumPy's and Python's default generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # all that it takes
    random.seed(seed)


def default_generator_states() -> dict[str, Any]:
    """What the default generators of this process draw next, as tensors and plain numbers.

    PyTorch's are of the CPU and, where CUDA is in use, of the current device.
    """
    of_numpy = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "keys": torch.from_numpy(of_numpy["state"]["key"].astype(np.int64)),
            "position": int(of_numpy["state"]["pos"]),
            "has_gauss": int(of_numpy["has_gauss"]),
            "cached_gaussian": float(of_numpy["gauss"]),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss},
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_default_generators(states: Mapping[str, Any]) -> None:
    """Make the default generators draw what they were about to draw.

    Args:
        states: of :func:`default_generator_states`. CUDA's is left alone where there is none.
    """
    torch.set_rng_state(states["torch"])
    numpy, python = states["numpy"], states["python"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    gaussian = (numpy["has_gauss"], numpy["cached_gaussian"])
    np.random.set_state(("MT19937", keys, numpy["position"], *gaussian))
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss_next"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def undisturbed_generators() -> Iterator[None]:
    """Afterwards the default generators draw what they would have drawn without the block."""
    states = default_generator_states()
    try:
        yield
    finally:
        restore_default_generators(states)
