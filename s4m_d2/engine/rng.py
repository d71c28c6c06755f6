"""Every random draw is a function of (seed, stream, position in the stream).

The loader attaches ``seeds`` to each sample: one integer for each purpose below. Whoever draws for
that sample makes a generator from its integer, so that a draw depends neither on a worker's state
nor on what was drawn before it, and a run continues exactly where it stopped.
"""

from __future__ import annotations

import hashlib

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
