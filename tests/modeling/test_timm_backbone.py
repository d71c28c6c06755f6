"""timm's models as backbones: maps, strides, sizes, options and what is refused."""

import logging
import re

import pytest
import tiny_timm
import torch
from detectron2.modeling import ShapeSpec, build_backbone, build_model
from tiny_timm import timm

from s4m_d2.engine.training.build import parameter_groups
from s4m_d2.errors import ConfigError, InputError, WeightsError

HIERARCHIES = ("test_resnet", "test_convnext", "s4m_swin", "s4m_swinv2")
PLAIN = ("test_vit", "s4m_vit14")
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME")


@pytest.fixture
def build(make_tiny_cfg):
    def build(name, *options):
        torch.manual_seed(0)
        return build_backbone(make_tiny_cfg(*TIMM, name, *options), ShapeSpec(channels=3))

    return build


def images(height, width, batch=2, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", HIERARCHIES + PLAIN)
def test_maps_have_the_strides_and_channels_that_are_promised_at_any_size(build, name):
    backbone = build(name).eval()
    shapes = backbone.output_shape()
    assert {key: spec.stride for key, spec in shapes.items()} == STRIDES
    assert backbone.size_divisibility == 32
    for height, width in ((64, 128), (128, 256), (160, 160), (32, 32)):
        features = backbone(images(height, width))
        assert {key: tuple(value.shape) for key, value in features.items()} == {
            key: (2, spec.channels, height // spec.stride, width // spec.stride)
            for key, spec in shapes.items()
        }


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "indices"), [("test_resnet", (1, 2, 3, 4)), ("test_convnext", (0, 1, 2, 3))]
)
def test_maps_equal_those_of_timm_s_own_extractor(build, name, indices):
    """timm's ``features_only`` walks the layers in another way (FeatureListNet)."""
    backbone = build(name).eval()
    extractor = timm.create_model(name, features_only=True, out_indices=indices)
    weights = backbone.net.state_dict()
    renamed = {key: re.sub(r"^stages\.(\d)\.", r"stages_\1.", key) for key in weights}
    renamed = {key: re.sub(r"^stem\.(\d)\.", r"stem_\1.", value) for key, value in renamed.items()}
    extractor.load_state_dict({renamed[key]: value for key, value in weights.items()})
    expected = extractor.eval()(images(64, 96))
    for actual, reference in zip(backbone(images(64, 96)).values(), expected, strict=True):
        torch.testing.assert_close(actual, reference)


def test_out_indices_choose_the_block_of_a_vit(build):
    assert len(build("test_vit").net.blocks) == 6
    assert len(build("test_vit", "MODEL.TIMM.OUT_INDICES", (3,)).net.blocks) == 4


@pytest.mark.parametrize("name", ["test_resnet", "s4m_vit14"])
def test_a_frozen_model_stays_as_it_is(build, name):
    backbone = build(name, "MODEL.TIMM.FROZEN", True).train()
    before = {key: value.clone() for key, value in backbone.net.state_dict().items()}
    features = backbone(images(64, 64))
    assert not any(parameter.requires_grad for parameter in backbone.net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in backbone.net.state_dict().items())
    if name == "s4m_vit14":
        sum(value.square().mean() for value in features.values()).backward()
        assert all(p.grad is not None for p in backbone.pyramid.parameters())


def test_frozen_batch_norms_are_the_norms_of_evaluation(build):
    plain, frozen = build("test_resnet").eval(), build("test_resnet", "MODEL.TIMM.NORM", "FrozenBN")
    statistics = {"running_mean": 0.1, "running_var": 1.7}
    for net in (plain.net, frozen.net):
        for key, value in net.state_dict().items():
            if key.endswith(tuple(statistics)):
                value.fill_(statistics[key.rpartition(".")[2]])
    with torch.no_grad():
        expected, actual = plain(images(64, 64)), frozen.train()(images(64, 64))
    for key in STRIDES:
        torch.testing.assert_close(actual[key], expected[key])
    assert not [key for key, _ in frozen.net.named_parameters() if "bn" in key]


def test_batch_norms_synchronize_on_demand(build):
    kinds = {type(m).__mro__ for m in build("test_resnet", "MODEL.TIMM.NORM", "SyncBN").modules()}
    assert any(torch.nn.SyncBatchNorm in kind for kind in kinds)
    assert not any(torch.nn.BatchNorm2d in kind for kind in kinds)


@torch.no_grad()
def test_stochastic_depth_is_off_unless_asked_for(build):
    """timm's Swin has 0.1 of it otherwise."""
    batch = images(64, 64)
    backbone = build("s4m_swin").train()
    assert torch.equal(backbone(batch)["res5"], backbone(batch)["res5"])
    backbone = build("s4m_swin", "MODEL.TIMM.DROP_PATH", 0.9).train()
    assert not torch.equal(backbone(batch)["res5"], backbone(batch)["res5"])


@pytest.mark.parametrize("name", ["s4m_swin", "test_vit"])
def test_checkpointing_activations_changes_no_gradient(build, name):
    gradients = []
    for checkpoint in (False, True):
        backbone = build(name, "MODEL.TIMM.GRAD_CHECKPOINT", checkpoint).train()
        sum(value.square().mean() for value in backbone(images(64, 64)).values()).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", ["test_convnext", "s4m_swin", "s4m_vit14"])
def test_norms_and_embeddings_are_not_decayed_and_the_backbone_learns_slowly(make_tiny_cfg, name):
    cfg = make_tiny_cfg(*TIMM, name, "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.05)
    model = build_model(cfg)
    settings = {
        parameter: (group["lr"], group["weight_decay"])
        for group in parameter_groups(cfg, model)
        for parameter in group["params"]
    }
    assert len(settings) == len(list(model.parameters()))
    embeddings = ("pos_embed", "cls_token", "reg_token", "relative_position_bias_table")
    undecayed = {key for key, _ in model.backbone.named_parameters() if key.endswith(embeddings)}
    for prefix, module in model.backbone.named_modules():
        if any("norm" in cls.__name__.lower() for cls in type(module).__mro__):
            own = module.named_parameters(recurse=False)
            undecayed |= {f"{prefix}.{key}" for key, _ in own}
    assert undecayed
    for key, parameter in model.backbone.named_parameters():
        rate, decay = settings[parameter]
        assert rate == pytest.approx(0.01), key
        assert decay == (0.0 if key in undecayed else 0.05), key


def test_pretrained_weights_are_read_and_other_colors_reported(
    build, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    options = ("s4m_vit14", "MODEL.TIMM.PRETRAINED", True)
    with pytest.raises(WeightsError, match=r"s4m_vit14.*MODEL\.WEIGHTS"):
        build(*options)
    build(*options, "MODEL.WEIGHTS", "output/model_final.pth")  # nothing to fetch
    torch.manual_seed(1)
    known = timm.create_model("s4m_vit14", num_classes=0).state_dict()
    torch.save(known, tiny_timm.VIT_FILE)
    monkeypatch.setattr(logging.getLogger("s4m_d2"), "propagate", True)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="s4m_d2.modeling.timm_backbone"):
        loaded = build(*options).net.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in known.items())
        mean = ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675])
        std = ("MODEL.PIXEL_STD", [57.375, 57.12, 58.395])
        build(*options, "INPUT.FORMAT", "BGR", *mean, *std)
        assert not caplog.records
        build(*options, *mean)
    assert "MODEL.PIXEL_MEAN" in caplog.text and "123.675" in caplog.text


def test_what_cannot_be_built_is_refused_with_a_way_out(build):
    for options, message in (
        (("swin_lage_patch4_window12_384",), r"'swin_lage_patch4_window12_384'.*list_models\(\)"),
        (("resnet50.imagenet",), r"'resnet50\.imagenet'.*list_pretrained\(\)"),
        (("s4m_swin", "MODEL.TIMM.PRETRAINED", True), "has no weights of 's4m_swin'"),
        (("beit_base_patch16_224",), "images of one size only"),
        (("hrnet_w18_small", "MODEL.TIMM.DROP_PATH", 0.1), "no stochastic depth"),
        (("s4m_swin", "MODEL.TIMM.DROP_PATH", 1.0), "is 1.0; expected at least 0 and below 1"),
        (("test_resnet", "MODEL.TIMM.NORM", "GN"), "NORM is 'GN'; expected one of BN, FrozenBN"),
        (("test_resnet", "MODEL.TIMM.OUT_INDICES", (0, 1, 2, 3)), r"strides \[4, 8, 16, 32\]"),
        (("test_resnet", "MODEL.TIMM.OUT_INDICES", (1, 2, 3, 9)), r"\[2, 4, 8, 16, 32\]"),
        (("test_vit", "MODEL.TIMM.OUT_INDICES", (1, 3)), "index of one map"),
        (("test_vit", "MODEL.TIMM.OUT_NORM", True), "norms of its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(*options)
    with pytest.raises(InputError, match=r"multiples of 32.*\(64, 80\)"):
        build("s4m_vit14")(images(64, 80))
