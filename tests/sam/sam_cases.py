"""Configs, small SAMs with random weights for all backends, and images for them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from detectron2.config import CfgNode
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from s4m_d2.engine.config_file import load_config
from s4m_d2.sam.hugging_face import CLASSES, TransformersBackend
from s4m_d2.sam.point_prompts import PointPromptBackend
from s4m_d2.sam.sam2 import Sam2Backend, build_sam2_image_model, published_settings
from s4m_d2.sam.segment_anything import SegmentAnythingBackend, assemble_sam

needs_sam2 = pytest.mark.skipif(
    importlib.util.find_spec("sam2") is None,
    reason='the optional package sam2 is not installed: pip install "s4m_d2[sam2]"',
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason='the optional package transformers is not installed: pip install "s4m_d2[transformers]"',
)
SMALL_HIERA = {
    "embed_dim": 8, "num_heads": 1, "stages": [1, 1, 2, 1], "global_att_blocks": [3],
    "window_pos_embed_bkg_spatial_size": [7, 7],
}  # fmt: skip
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
BACKENDS = [
    "segment_anything",
    pytest.param("sam2", marks=needs_sam2),
    pytest.param("transformers sam_hq", marks=needs_transformers),
    pytest.param("transformers sam2", marks=needs_transformers),
]


def config(**sam) -> CfgNode:
    """Of the CPU and these keys of S4M.SAM."""
    words = [word for key, value in sam.items() for word in (f"S4M.SAM.{key}", str(value))]
    return load_config("", ["MODEL.DEVICE", "cpu", *words])


def with_random_weights(build: Callable[[], nn.Module], spread: float = 0.05) -> nn.Module:
    """Every parameter random, also those that a library starts at zero; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in sam.state_dict().values():
            value.add_(spread * torch.randn(value.shape, generator=generator))
    return sam


def small_sam() -> Sam:
    """Of a frame of 64 px, as it is initialized."""
    encoder = ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=16, depth=2, num_heads=2, out_chans=32,
        use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return assemble_sam(encoder, 8, 32, num_heads=2, mlp_dim=32)


def small_sam2_settings() -> dict:
    """Of a published model with a small trunk."""
    settings = published_settings("hiera_t")
    settings["image_encoder"]["trunk"] = SMALL_HIERA
    settings["image_encoder"]["neck"]["backbone_channel_list"] = [64, 32, 16, 8]
    return settings


_DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
_VIT = {
    "hidden_size": 16, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1],
    "num_pos_feats": 16, "mlp_dim": 32,
}  # fmt: skip
_HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
    "global_attention_blocks": [3],
}  # fmt: skip
_SAM3_VIT = {
    "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64, "image_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 2, "window_size": 2, "global_attn_indexes": [1],
    "pretrain_image_size": 28,
}  # fmt: skip
_PYRAMID = {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
# By model_type: settings of the encoder, of the prompts' frame, and others of the decoder.
SMALL_TRANSFORMERS = {
    "sam": (_VIT, (64, 8), {}),
    "sam_hq": (_VIT, (64, 8), {"vit_dim": 16}),
    "sam2": (
        {"backbone_config": _HIERA, "backbone_channel_list": [64, 32, 16, 8], **_PYRAMID},
        (64, 16),
        {},
    ),
    "sam3_tracker": ({"backbone_config": _SAM3_VIT, **_PYRAMID}, (56, 14), {}),
}


def small_transformers(kind: str) -> nn.Module:
    """A model of transformers' classes, by the model_type of its config."""
    import transformers

    vision, (side, patch), others = SMALL_TRANSFORMERS[kind]
    cls = getattr(transformers, CLASSES[kind])
    prompts = {"hidden_size": 32, "image_size": side, "patch_size": patch}
    config = cls.config_class(
        vision_config=copy.deepcopy(vision),
        prompt_encoder_config=prompts | {"mask_input_channels": 4},
        mask_decoder_config=_DECODER | others,
    )
    return with_random_weights(lambda: cls(config), spread=0.2).eval()


def build_small(name: str, **options) -> PointPromptBackend:
    """The backend of that name around a small model: frames of 64 px, of SAM 2 128.

    name: also "transformers " and a kind of :func:`small_transformers`.
    """
    if name.startswith("transformers "):
        return TransformersBackend(small_transformers(name.split()[1]), **options)
    if name == "sam2":
        settings = small_sam2_settings() | {"image_size": 128}
        settings["image_encoder"]["neck"]["d_model"] = 32
        settings["image_encoder"]["neck"]["position_encoding"]["num_pos_feats"] = 32
        build = partial(build_sam2_image_model, settings)
        return Sam2Backend(with_random_weights(build), **options)
    return SegmentAnythingBackend(with_random_weights(small_sam), **options)


def image_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def batch_of(*images: torch.Tensor, fill: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Images at the top left of one (B, 3, H, W) batch, and their sizes."""
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    batch = torch.full((len(images), 3, height, width), fill, dtype=torch.uint8)
    for i, (h, w) in enumerate(sizes):
        batch[i, :, :h, :w] = images[i]
    return batch, sizes
