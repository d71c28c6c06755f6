"""What training in several processes asks of a backbone."""

import pytest
import tiny_timm  # noqa: F401
import torch
from detectron2.modeling import ShapeSpec, build_backbone

NAMES = ("test_resnet", "test_convnext", "s4m_swin", "s4m_swinv2", "test_vit", "s4m_vit14")


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_gets_a_gradient(make_tiny_cfg, name):
    """DistributedDataParallel waits for the gradients of all."""
    options = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name)
    backbone = build_backbone(make_tiny_cfg(*options), ShapeSpec(channels=3)).train()
    features = backbone(torch.ones(2, 3, 64, 96))
    sum(features[name].sum() for name in ("res2", "res3", "res4", "res5")).backward()
    trained = dict(backbone.named_parameters()).items()
    assert not [name for name, p in trained if p.requires_grad and p.grad is None]
