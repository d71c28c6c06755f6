"""A very small model of the quickstart's kind, on a small toyscapes data set."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from s4m_d2.data import register_unlabeled_folder
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.stages import run_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,  # narrow: small checkpoints, and statistics in every layer
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "DATASETS.TRAIN": "('toyscapes_train_30pct',)",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(64, 72)",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.CROP.SIZE": "(64, 128)",
    "SOLVER.IMS_PER_BATCH": 2,
    "S4M.TEACHER.IMS_PER_BATCH": 2,
    "S4M.DISTILL.NUM_POINTS": 2,
    "S4M.PSEUDO_LABEL.SCORE_THRESH": 0.0,
    "S4M.ARP.MIN_AREA_FRACTION": 0.0,
}


def overrides(folder, changes) -> list[str]:
    """KEY VALUE words of a small run into a folder; ``__`` stands for a dot in names of changes."""
    merged = SMALL | {"OUTPUT_DIR": str(folder)}
    merged |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(item) for pair in merged.items() for item in pair]


def make_config(folder, **changes):
    path = str(ROOT / "configs" / "toyscapes_10pct.yaml")
    return run_config(load_config(path, overrides(folder, changes)))


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
