"""Shared by all tests: one thread for each process, deterministic properties, the gpu marker."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("s4m_d2", deadline=None, derandomize=True)
settings.load_profile("s4m_d2")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
