"""Configs and models for the tests of the model."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

import s4m_d2.modeling  # noqa: F401 (registers the model)
from s4m_d2.config import add_s4m_config

CONFIG = Path(__file__).parents[2] / "configs" / "Base-Cityscapes.yaml"
ALONE = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "DATASETS.TRAIN", (),
    "DATASETS.TEST", (),
    "S4M.DISTILL.ENABLED", False,
]  # fmt: skip
TINY = [
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64,
    "MODEL.SEM_SEG_HEAD.MASK_DIM", 64,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2,
    "MODEL.MASK_FORMER.HIDDEN_DIM", 64,
    "MODEL.MASK_FORMER.DEC_LAYERS", 4,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 256,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 256,
]  # fmt: skip


def _config(options):
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list([*ALONE, *options])
    return cfg


@pytest.fixture
def cityscapes_cfg():
    """Mask2Former R50 for Cityscapes, without weights."""
    return _config([])


@pytest.fixture
def make_tiny_cfg():
    """The fixture's configuration, with overrides."""
    return lambda *overrides: _config([*TINY, *overrides])


@pytest.fixture
def make_tiny_model(make_tiny_cfg):
    """A small seeded model with overrides of its config."""

    def make(*overrides):
        torch.manual_seed(0)
        return build_model(make_tiny_cfg(*overrides))

    return make


@pytest.fixture
def saved(make_tiny_cfg, tmp_path):
    """Save w.pth and config.yaml of a small model whose weights and statistics are all random."""

    def save(*options):
        few = ["MODEL.MASK_FORMER.DEC_LAYERS", 3, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2]
        cfg = make_tiny_cfg(*few, *options)
        (tmp_path / "config.yaml").write_text(cfg.dump())
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        generator = torch.Generator().manual_seed(1)
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "criterion" not in name:
                spread = 0.6 if "norm" in name else 0.1
                value.add_(spread * (torch.rand(value.shape, generator=generator) - 0.5))
        torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
        return model

    return save


@pytest.fixture
def make_sample():
    """A labeled sample: random image, one box-shaped instance a label."""

    def make(height, width, labels=(), *, seed=0, name="street.png"):
        generator = torch.Generator().manual_seed(seed)
        masks = torch.zeros(len(labels), height, width, dtype=torch.bool)
        for index in range(len(labels)):
            top, left = 4 * index, 6 * index
            masks[index, top : top + height // 3, left : left + width // 3] = True
        return {
            "file_name": name,
            "image": torch.randint(
                0, 256, (3, height, width), generator=generator, dtype=torch.uint8
            ),
            "instances": Instances(
                (height, width),
                gt_classes=torch.tensor(labels, dtype=torch.int64),
                gt_masks=BitMasks(masks),
            ),
            "seeds": {"loss_points": seed + 1, "prompt_points": seed + 2},
        }

    return make
