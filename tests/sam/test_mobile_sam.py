"""MobileSAM: names and shapes of its published file, which are stored, and timm's encoder."""

import json
from pathlib import Path

import pytest
import torch
from sam_cases import config
from segment_anything import sam_model_registry

from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.segment_anything import CLASSIFIER, TinyViTEncoder, timm_name

pytest.importorskip("timm")

KEYS = Path(__file__).parents[1] / "data_reference" / "mobile_sam_encoder_keys.json"


@pytest.fixture(scope="module")
def published():
    """A state dict of these names and the rest of vit_b's; each entry has a value of its own."""
    with torch.device("meta"):
        sam = sam_model_registry["vit_b"]()
    encoder = json.loads(KEYS.read_text())
    shapes = {f"image_encoder.{name}": shape for name, shape in encoder.items()}
    rest = sam.state_dict().items()
    shapes |= {name: tuple(v.shape) for name, v in rest if not name.startswith("image_encoder.")}
    return {name: torch.tensor(float(i)).expand(s) for i, (name, s) in enumerate(shapes.items())}


def test_the_published_file_loads_also_after_adaptation(published, tmp_path):
    assert len(published) == 439 and sum(v.numel() for v in published.values()) == 10_140_231
    path = tmp_path / "mobile_sam.pt"
    torch.save(published, path)
    backend = build_sam_backend(config(MODEL_TYPE="vit_t", CHECKPOINT=path))
    assert (backend.image_side, backend.grid_side) == (1024, 64)
    own = backend.sam.state_dict()
    used = {name: v for name, v in published.items() if not name.startswith(CLASSIFIER)}
    assert len(used) == len(own) == 435
    assert all(torch.equal(own[timm_name(name)], value) for name, value in used.items())
    first, stages = backend.image_encoder.patch_embed, backend.image_encoder.stages
    for of_file, tensor in (
        ("patch_embed.seq.2.c.weight", first.conv2.conv.weight),
        ("layers.2.downsample.conv3.bn.running_var", stages[3].downsample.conv3.bn.running_var),
        ("layers.2.blocks.5.local_conv.c.weight", stages[2].blocks[5].local_conv.conv.weight),
    ):
        assert torch.equal(published[f"image_encoder.{of_file}"], tensor)
    adapted = backend.save(str(tmp_path / "adapted"))
    again = build_sam_backend(config(MODEL_TYPE="vit_t", CHECKPOINT=adapted)).sam.state_dict()
    assert all(torch.equal(again[name], value) for name, value in own.items())


def test_the_encoder_has_stride_16_and_follows_its_biases_in_eval_mode():
    """S4M.SAM.ADAPT trains such an encoder."""
    torch.manual_seed(0)
    encoder, image = TinyViTEncoder().eval(), torch.randn(1, 3, 64, 48)
    before = encoder(image)
    assert before.shape == (1, 256, 4, 3)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
    assert (encoder(image) - before).abs().max() > 1e-3
    before.sum().backward()
    encoder(image).sum().backward()
