"""A very small model of the quickstart's kind, on a small toyscapes data set."""

import pytest
from detectron2.data import DatasetCatalog
from helpers import QUICKSTART, SMALL_HEAD, SMALL_RUN, key_values, signals_and_logging_kept

from s4m_d2.data import register_unlabeled_folder
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.stages import run_config
from s4m_d2.engine.training.stop_signals import listen

SMALL = {
    **SMALL_RUN,
    **SMALL_HEAD,
    "MODEL.RESNETS.DEPTH": 50,  # narrow: small checkpoints, and statistics in every layer
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "S4M.DISTILL.NUM_POINTS": 2,
}


def overrides(folder, changes) -> list[str]:
    """KEY VALUE words of a small run into a folder; ``__`` stands for a dot in names of changes."""
    return key_values(SMALL | {"OUTPUT_DIR": folder}, **changes)


def make_config(folder, **changes):
    return run_config(load_config(QUICKSTART, overrides(folder, changes)))


@pytest.fixture
def listening():
    with signals_and_logging_kept():
        listen()
        yield
        listen()  # forgets what was received


@pytest.fixture
def small_options(small_data, monkeypatch, tmp_path):
    """KEY VALUE overrides for a small run into ``tmp_path / "run"``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_data))
    return lambda **changes: overrides(tmp_path / "run", changes)


@pytest.fixture
def small_config(small_options, tmp_path):
    return lambda **changes: make_config(tmp_path / "run", **changes)


@pytest.fixture(scope="module")
def shared_config(small_data, tmp_path_factory):
    """(folder, overrides) → config of a run that the tests of a module share."""
    root = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(small_data))
        yield lambda folder, **changes: make_config(root / folder, **changes)


@pytest.fixture
def folder_without_labels(small_data):
    """The name of a set of images whose labels nobody knows."""
    name = "folder_without_labels"
    register_unlabeled_folder(name, str(small_data / "toyscapes/leftImg8bit/train"))
    yield name
    DatasetCatalog.remove(name)
