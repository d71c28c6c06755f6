"""MobileSAM: names and shapes of its published file, written down here, and timm's encoder."""

import pytest
import torch
from sam_cases import config
from segment_anything import sam_model_registry

from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.segment_anything import CLASSIFIER, TinyViTEncoder, timm_name

pytest.importorskip("timm")

NORM = ("weight", "bias", "running_mean", "running_var")
WIDTHS = (64, 128, 160, 320)  # of the four stages
ATTENTION = {1: (2, 4, 7), 2: (6, 5, 14), 3: (2, 10, 7)}  # stage → blocks, heads, window's side


def convolution(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    norm = {f"{name}.bn.{part}": shape[:1] for part in NORM}
    return {f"{name}.c.weight": shape, **norm, f"{name}.bn.num_batches_tracked": ()}


def linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Of mobile_sam.pt, without the prefix ``image_encoder.``."""
    found = convolution("patch_embed.seq.0", 32, 3, 3, 3)
    found |= convolution("patch_embed.seq.2", 64, 32, 3, 3)
    for block in ("layers.0.blocks.0", "layers.0.blocks.1"):
        found |= convolution(f"{block}.conv1", 256, 64, 1, 1)
        found |= convolution(f"{block}.conv2", 256, 1, 3, 3)
        found |= convolution(f"{block}.conv3", 64, 256, 1, 1)
    for stage in range(3):
        width, out = WIDTHS[stage : stage + 2]
        found |= convolution(f"layers.{stage}.downsample.conv1", out, width, 1, 1)
        found |= convolution(f"layers.{stage}.downsample.conv2", out, 1, 3, 3)
        found |= convolution(f"layers.{stage}.downsample.conv3", out, out, 1, 1)
    for stage, (blocks, heads, side) in ATTENTION.items():
        width = WIDTHS[stage]
        for block in (f"layers.{stage}.blocks.{i}" for i in range(blocks)):
            found |= linear(f"{block}.attn.norm", width)
            found |= linear(f"{block}.attn.qkv", 3 * width, width)
            found |= linear(f"{block}.attn.proj", width, width)
            found |= {f"{block}.attn.attention_biases": (heads, side**2)}
            found |= linear(f"{block}.mlp.norm", width)
            found |= linear(f"{block}.mlp.fc1", 4 * width, width)
            found |= linear(f"{block}.mlp.fc2", width, 4 * width)
            found |= convolution(f"{block}.local_conv", width, 1, 3, 3)
    found |= linear("norm_head", 320) | linear("head", 1000, 320)
    found |= {"neck.0.weight": (256, 320, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    return found | linear("neck.1", 256) | linear("neck.3", 256)


@pytest.fixture(scope="module")
def published():
    """A state dict of these names and the rest of vit_b's; each entry has a value of its own."""
    with torch.device("meta"):
        sam = sam_model_registry["vit_b"]()
    shapes = {f"image_encoder.{name}": shape for name, shape in encoder_shapes().items()}
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
