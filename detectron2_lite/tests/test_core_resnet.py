"""Layers, ResNet and the registries of models."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_backbone,
    build_model,
    build_resnet_backbone,
    build_sem_seg_head,
)
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torchvision.models import resnet as tv

STAGES = ["res2", "res3", "res4", "res5"]


def resnet_cfg(depth=18, norm="BN", freeze_at=0, **options):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.OUT_FEATURES = depth, norm, STAGES
    resnets.STRIDE_IN_1X1 = False
    if depth < 50:
        resnets.RES2_OUT_CHANNELS = 64
    for key, value in options.items():
        resnets[key] = value
    return cfg


def from_torchvision(name):
    """torchvision's parameter names -> Detectron2's."""
    for stage in "4321":
        name = name.replace(f"layer{stage}", f"res{int(stage) + 1}")
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for i in "123":
        name = name.replace(f"bn{i}", f"conv{i}.norm")
    return name if name.startswith("res") else "stem." + name


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnet_computes_what_torchvisions_does(depth):
    torch.manual_seed(0)
    reference = getattr(tv, f"resnet{depth}")().eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.6)
    weights = {from_torchvision(k): v for k, v in reference.state_dict().items() if "fc." not in k}
    ours = build_backbone(resnet_cfg(depth)).eval()
    ours.load_state_dict(weights, strict=True)
    x = torch.rand(1, 3, 64, 96)
    stem = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
    expected = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stem = expected[from_torchvision(name)] = getattr(reference, name)(stem)
    got = ours(x)
    assert list(got) == STAGES
    for name in STAGES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
        spec = ours.output_shape()[name]
        assert got[name].shape == (1, spec.channels, 64 // spec.stride, 96 // spec.stride)


@pytest.mark.parametrize("in_1x1, strides", [(True, [2, 1]), (False, [1, 2])])
def test_the_stride_sits_where_the_key_says(in_1x1, strides):
    block = build_backbone(resnet_cfg(50, STRIDE_IN_1X1=in_1x1)).res3[0]
    assert [block.conv1.stride[0], block.conv2.stride[0]] == strides


def test_dilating_res5_keeps_its_stride_at_16():
    backbone = build_backbone(resnet_cfg(50, RES5_DILATION=2))
    assert backbone.output_shape()["res5"] == ShapeSpec(channels=2048, stride=16)
    assert backbone(torch.rand(1, 3, 64, 64))["res5"].shape[-2:] == (4, 4)


def test_stages_above_the_last_output_are_not_built():
    backbone = build_backbone(resnet_cfg(OUT_FEATURES=["stem", "res3"]))
    assert not hasattr(backbone, "res4")
    assert {k: v.shape[1] for k, v in backbone(torch.rand(1, 3, 32, 32)).items()} == {
        "stem": 64,
        "res3": 128,
    }
    with pytest.raises(AssertionError):
        build_backbone(resnet_cfg(OUT_FEATURES=["res2", "res9"]))


def test_freezing_stops_gradients_and_statistics_of_the_first_stages_only():
    backbone = build_backbone(resnet_cfg(freeze_at=2))
    trainable = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"res3", "res4", "res5"}
    frozen = [n for n, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    assert {name.split(".")[0] for name in frozen} == {"stem", "res2"}
    assert isinstance(backbone.res3[0].conv1.norm, nn.BatchNorm2d)


def test_convolutions_start_from_he_normal_by_fan_out():
    torch.manual_seed(0)
    conv = build_backbone(resnet_cfg()).res5[0].conv2
    fan_out = 512 * 9
    assert conv.bias is None
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)


def test_small_resnets_refuse_what_they_cannot_be():
    with pytest.raises(AssertionError, match="RES2_OUT_CHANNELS"):
        build_backbone(resnet_cfg(18, RES2_OUT_CHANNELS=256))


def test_make_stage_gives_each_block_its_own_stride():
    stage = ResNet.make_stage(
        BottleneckBlock,
        3,
        bottleneck_channels=4,
        in_channels=8,
        out_channels=16,
        stride_per_block=[2, 1, 1],
        dilation=2,
    )
    assert [b.stride for b in stage] == [2, 1, 1]
    assert [b.conv2.dilation[0] for b in stage] == [2, 2, 2]
    assert [b.in_channels for b in stage] == [8, 16, 16]
    with pytest.raises(AssertionError):
        ResNet.make_stage(BasicBlock, 2, in_channels=8, out_channels=8, stride_per_block=[1])
    net = ResNet(BasicStem(3, 8), [stage], out_features=["res2"], freeze_at=1)
    assert net(torch.rand(2, 3, 32, 32))["res2"].shape == (2, 16, 4, 4)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("GN", nn.GroupNorm),
        (lambda channels: nn.InstanceNorm2d(channels), nn.InstanceNorm2d),
    ],
)
def test_norms_by_name(name, kind):
    assert type(get_norm(name, 64)) is kind
    assert get_norm("", 64) is None
    assert get_norm(None, 64) is None
    with pytest.raises(KeyError):
        get_norm("NoSuchNorm", 64)


def test_a_frozen_norm_is_the_trained_norm_in_eval_mode_with_and_without_gradients():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=1e-3)
    norm(torch.randn(8, 4, 5, 5) * 3 + 1)
    nn.init.uniform_(norm.weight)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(norm))[0]
    x = torch.randn(2, 4, 3, 3)
    expected = norm.eval()(x)
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(frozen(x.requires_grad_()), expected)
    assert not list(frozen.parameters())
    torch.testing.assert_close(FrozenBatchNorm2d(4)(x), x, rtol=1e-5, atol=1e-6)


def test_a_frozen_norm_loads_files_that_hold_only_its_affine_part():
    frozen = FrozenBatchNorm2d(2)
    frozen.running_mean += 1
    frozen.load_state_dict({"weight": torch.tensor([2.0, 3.0]), "bias": torch.ones(2)})
    assert frozen.running_mean.tolist() == [0, 0]
    assert frozen.running_var.tolist() == [1, 1]
    assert frozen.weight.tolist() == [2, 3]


def test_a_convolution_applies_its_norm_before_its_activation():
    conv = Conv2d(1, 1, 1, bias=False, norm=nn.BatchNorm2d(1), activation=torch.relu).eval()
    nn.init.constant_(conv.weight, 1.0)
    nn.init.constant_(conv.norm.bias, -1.0)
    x = torch.tensor([0.5, 3.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(conv(x).flatten(), torch.tensor([0.0, 2.0]), rtol=1e-4, atol=1e-4)
    assert "activation" not in conv.state_dict()


def test_models_heads_and_backbones_are_found_by_name():
    class ToyModel(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.backbone = build_backbone(cfg)
            self.head = build_sem_seg_head(cfg, self.backbone.output_shape())

    class ToyHead(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self.channels = {name: spec.channels for name, spec in input_shape.items()}

    class ToyBackbone(Backbone):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self._out_features = ["a"]
            self._out_feature_channels = {"a": input_shape.channels + 1}
            self._out_feature_strides = {"a": 2}

        def forward(self, x):
            return {"a": x}

    registered = [
        (META_ARCH_REGISTRY, ToyModel),
        (SEM_SEG_HEADS_REGISTRY, ToyHead),
        (BACKBONE_REGISTRY, ToyBackbone),
    ]
    for registry, kind in registered:
        if kind.__name__ not in registry:
            registry.register(kind)
        with pytest.raises(AssertionError, match="already registered"):
            registry.register(kind)
    cfg = resnet_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ToyModel"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "ToyHead"
    cfg.MODEL.BACKBONE.NAME = "ToyBackbone"
    model = build_model(cfg)
    assert model.head.channels == {"a": len(cfg.MODEL.PIXEL_MEAN) + 1}
    assert (model.backbone.size_divisibility, model.backbone.padding_constraints) == (0, {})
    cfg.MODEL.META_ARCHITECTURE = "NoSuchModel"
    with pytest.raises(KeyError, match="NoSuchModel"):
        build_model(cfg)
    assert BACKBONE_REGISTRY.get("build_resnet_backbone") is build_resnet_backbone
