"""Seeds: every random draw is a function of (seed, stream, position in the stream).

The loader attaches ``seeds`` to each sample: one integer for each purpose below, from which a
generator is made. So draws depend neither on a worker's state nor on earlier draws, and a run can
be resumed exactly. The default generators, used by other libraries, are seeded in each iteration.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: Purposes of draws for a sample; each has its own seed.
PURPOSES = ("augment", "strong_view", "loss_points", "prompt_points", "refine_points", "arp")
_NUMPY = ("keys", "position", "has_gauss", "cached_gaussian")  # of NumPy's state


def derive_seed(*keys: int | str) -> int:
    """Hash integers and strings to a 63-bit seed, the same in all processes and on all machines."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seeds(seed: int, stream: str, position: int) -> dict[str, int]:
    """The seeds of the sample at ``position`` (counted over all ranks) of ``stream``."""
    return {purpose: derive_seed(seed, stream, position, purpose) for purpose in PURPOSES}


def seed_default_generators(seed: int) -> None:
    """Seed PyTorch's (all devices), NumPy's and Python's default generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # its range
    random.seed(seed)


def default_generator_states() -> dict[str, Any]:
    """States of this process' default generators (PyTorch's of all devices), as plain data."""
    of_numpy: Any = np.random.get_state()  # its kind, and _NUMPY
    keys = torch.from_numpy(of_numpy[1].astype(np.int64))
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": dict(zip(_NUMPY, (keys, *of_numpy[2:]), strict=True)),
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss},
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_default_generators(states: Mapping[str, Any]) -> None:
    """Restore :func:`default_generator_states`. Devices that are not here are ignored."""
    torch.set_rng_state(states["torch"])
    keys, *rest = (states["numpy"][name] for name in _NUMPY)
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    python = states["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss_next"]))
    if "cuda" in states and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def undisturbed_generators() -> Iterator[None]:
    """Restore the default generators after the block."""
    states = default_generator_states()
    try:
        yield
    finally:
        restore_default_generators(states)
