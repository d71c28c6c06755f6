"""Weights of others in models with a timm backbone: Mask2Former's and the authors' Swin, DINOv2."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import ShapeSpec, build_backbone
from swin_reference import Swin, random_swin_weights, swin_shapes
from tiny_timm import SWIN_CHANNELS, SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError
from s4m_d2.modeling.timm_backbone import (
    ADDED_LAYERS,
    to_mask2former_names,
    to_own_names,
)

SWIN = (
    "MODEL.BACKBONE.NAME", "build_timm_backbone",
    "MODEL.TIMM.NAME", "s4m_swin",
    "MODEL.TIMM.OUT_NORM", True,
)  # fmt: skip
VIT = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "s4m_vit14")
CONFIG = Path(__file__).parents[2] / "configs" / "cityscapes_10pct_swinl.yaml"
COMPUTED = "layers.0.blocks.1.attn.relative_position_index"


@pytest.fixture(scope="module")
def swin_weights():
    return random_swin_weights(SWIN_CHANNELS, SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (96, 96), (36, 60)])
def test_mask2former_s_swin_weights_give_swin_s_maps(make_tiny_cfg, swin_weights, size):
    """Against a literal Swin; maps are multiples of the window, or not, or odd."""
    backbone = build_backbone(make_tiny_cfg(*SWIN), ShapeSpec(channels=3)).double().eval()
    own = [f"backbone.{name}" for name in backbone.state_dict()]
    state = to_own_names({f"backbone.{k}": v for k, v in swin_weights.items()}, own)
    backbone.load_state_dict({name.removeprefix("backbone."): v for name, v in state.items()})
    image = torch.randn(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = Swin(swin_weights, SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW)(image)
    features = backbone(image[None])
    for name, reference in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        actual = features[name][0].permute(1, 2, 0)
        torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-9, msg=name)


def test_every_weight_of_mask2former_s_swin_l_has_its_place_in_our_config(make_tiny_cfg):
    """Names and shapes at full size, on the meta device."""
    cfg = make_tiny_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(["MODEL.TIMM.PRETRAINED", False])
    with torch.device("meta"):
        own = build_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    own = {f"backbone.{name}": tuple(value.shape) for name, value in own.items()}
    shapes = swin_shapes(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)
    published = {f"backbone.{name}": shape for name, shape in shapes.items()}
    assert to_own_names(published, own) == own


def mask2former_state(model, swin_weights):
    """What Mask2Former's file holds of this model: its Swin, with buffers, and our head."""
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    state |= {f"backbone.{k}": v.float() for k, v in swin_weights.items()}
    return state | {f"backbone.{COMPUTED}": torch.zeros(9, 9, dtype=torch.int64)}


@pytest.fixture
def load(tmp_path):
    """Load the content of a file into a model; what of it was used."""

    def load(model, content, **options):
        torch.save(content, tmp_path / "w.pth")
        checkpointer = S4MCheckpointer(model)
        checkpointer.load(str(tmp_path / "w.pth"), **options)
        return checkpointer.last_report

    return load


def test_a_whole_mask2former_with_swin_loads_completely(make_tiny_model, swin_weights, load):
    model = make_tiny_model(*SWIN)
    report = load(model, {"model": mask2former_state(model, swin_weights)}, require=True)
    assert not (report.missing or report.unexpected or report.mismatched)
    net = model.backbone.net
    second_merging = swin_weights["layers.1.downsample.reduction.weight"].float()
    assert torch.equal(net.layers[2].downsample.reduction.weight, second_merging)
    assert torch.equal(model.backbone.norms["res5"].bias, swin_weights["norm3.bias"].float())


def test_a_model_with_swin_is_written_under_mask2former_s_names(make_tiny_model, swin_weights):
    model = make_tiny_model(*SWIN)
    published = mask2former_state(model, swin_weights)
    own = to_own_names(published, model.state_dict())
    written = to_mask2former_names(own)
    del published[f"backbone.{COMPUTED}"]
    assert written.keys() == published.keys()
    assert all(torch.equal(written[name], published[name]) for name in published)


def test_a_swin_of_its_authors_loads_into_the_backbone_alone(make_tiny_model, swin_weights, load):
    """Its final norm has the name of many norms' last words, and the size of some."""
    model = make_tiny_model(*SWIN)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.float() for k, v in swin_weights.items() if not k.startswith("norm")}
    state |= {COMPUTED: torch.zeros(9, 9), "norm.weight": torch.full((64,), 7.0)}
    report = load(model, {"model": state, "matching_heuristics": True})
    assert set(report.matched) == {n for n in before if n.startswith("backbone.net.")}
    assert report.unexpected == ["norm.weight"] and not report.mismatched
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in report.matched), name


def test_a_bare_vit_loads_although_the_pyramid_is_new(make_tiny_model, load):
    model = make_tiny_model(*VIT)
    prefix = "backbone.net."
    state = {
        name.removeprefix(prefix): torch.randn_like(value)
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }
    report = load(model, {**state, "mask_token": torch.zeros(1, 32)})
    assert torch.equal(model.backbone.net.pos_embed, state["pos_embed"])
    assert report.unexpected == ["mask_token"]
    new = [name for name in report.missing if name.startswith("backbone.")]
    assert new and all(name.startswith(ADDED_LAYERS) for name in new)

    with pytest.raises(WeightsError, match="of the backbone"):
        load(model, {k: v for k, v in state.items() if not k.startswith("blocks.1.")})


def test_names_of_other_models_and_our_own_stay(make_tiny_model, swin_weights):
    for model, rename in ((VIT, to_mask2former_names), (SWIN, lambda x: to_own_names(x, x))):
        state = make_tiny_model(*model).state_dict()
        assert rename(state).keys() == state.keys()
    own = ["backbone.res2.0.conv1.weight", "sem_seg_head.predictor.query_feat.weight"]
    assert to_own_names(swin_weights, own).keys() == swin_weights.keys()
