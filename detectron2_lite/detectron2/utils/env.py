"""The process's global random states."""

import logging
import os
import random

import numpy as np
import torch

_MAX_DRAWN_SEED = 2**31


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the global generators of torch (all devices), numpy and `random`.

    With `seed=None` a seed is drawn from the operating system and logged.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "big") % _MAX_DRAWN_SEED
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
