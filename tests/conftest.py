"""Shared by all tests: one thread a process, deterministic properties, the gpu marker, data."""

from pathlib import Path

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


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A folder for DETECTRON2_DATASETS: toyscapes with 10 training and 2 validation images."""
    from make_toyscapes import make_toyscapes

    root = tmp_path_factory.mktemp("datasets")
    make_toyscapes(root / "toyscapes", seed=3, counts={"train": 10, "val": 2}, size=(128, 64))
    return root
