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


@pytest.fixture
def small_options(small_data, monkeypatch, tmp_path):
    """KEY VALUE overrides for a small run into ``tmp_path / "run"``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_data))

    def options(**changes) -> list[str]:
        merged = SMALL | {"OUTPUT_DIR": str(tmp_path / "run")}
        merged |= {key.replace("__", "."): value for key, value in changes.items()}
        return [str(item) for pair in merged.items() for item in pair]

    return options


@pytest.fixture
def small_config(small_options):
    def config(**changes):
        path = str(ROOT / "configs" / "toyscapes_10pct.yaml")
        return run_config(load_config(path, small_options(**changes)))

    return config


@pytest.fixture
def folder_without_labels(small_data):
    """The name of a set of images whose labels nobody knows."""
    name = "folder_without_labels"
    register_unlabeled_folder(name, str(small_data / "toyscapes/leftImg8bit/train"))
    yield name
    DatasetCatalog.remove(name)
