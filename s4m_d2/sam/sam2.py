"""SAM 2 and 2.1 (Ravi et al., 2024) on single images, by the classes of the sam2 package.

Only the part that images need is built, with the settings of the package's config files, which its
own builder composes in Hydra's global state. SAM 2 and 2.1 differ in the parts for video alone, so
either's weights fit. The package is optional (``s4m_d2[sam2]``), imported where a backend is built.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from s4m_d2.pretrained import import_optional
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import check_model_type, load_sam
from s4m_d2.sam.point_prompts import Frame, PointPromptBackend

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
# Settings of ``SAM2Base`` that matter for single images, beside those of its parts.
IMAGE_SETTINGS = (
    "image_size",
    "directly_add_no_mem_embed",
    "use_high_res_features_in_sam",
    "iou_prediction_use_sigmoid",
    "pred_obj_scores",
    "pred_obj_scores_mlp",
)
INSTALLATION = " (PyTorch 2.5.1 or newer; --no-build-isolation: pip gets no other one to build it)"
# What the published files hold beside the image model, by the start of the parameter's name.
VIDEO_ONLY = ("mask_downsample.", "maskmem_", "memory_", "no_mem_pos_enc", "no_obj_", "obj_ptr_")


class Sam2Backend(PointPromptBackend):
    """A ``SAM2Base`` with the published settings, used as in the package's ``SAM2ImagePredictor``.

    An image's content is stretched to the square, so it covers the whole grid.
    """

    def __init__(self, sam: Any, **options: Any) -> None:
        """Freeze ``sam``; options as those of :class:`PointPromptBackend`."""
        decoder = SimpleNamespace(
            prompt_encoder=sam.sam_prompt_encoder, mask_decoder=sam.sam_mask_decoder
        )
        mean, std = torch.tensor((PIXEL_MEAN, PIXEL_STD), device=sam.device)[..., None, None]
        super().__init__(sam, decoder, Frame(sam.image_size, mean, std, padded=False), **options)

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        *finer_maps, embeddings = self.sam.forward_image(frames)["backbone_fpn"]
        no_memory = self.sam.no_mem_embed.reshape(1, -1, 1, 1)  # an image is a video's first frame
        return embeddings + no_memory, tuple(finer_maps)


def published_settings(model_type: str) -> dict[str, Any]:
    """The package's settings of a published model, as its config files have them."""
    package = import_optional("sam2", "S4M.SAM.BACKEND sam2", needs="hydra", hint=INSTALLATION)
    path = Path(package.__path__[0], "configs", "sam2", f"sam2_{model_type}.yaml")
    return yaml.safe_load(path.read_text())["model"]


def build_sam2_image_model(settings: Mapping[str, Any]) -> nn.Module:
    """Build an untrained ``SAM2Base`` without its memory; settings: see published_settings."""
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam2_base import SAM2Base

    def made(cls: type, settings: Mapping[str, Any], **changes: Any) -> Any:
        arguments = {key: value for key, value in settings.items() if key != "_target_"}
        return cls(**arguments | changes)

    encoder = settings["image_encoder"]
    neck = encoder["neck"]
    positions = made(PositionEmbeddingSine, neck["position_encoding"], warmup_cache=False)
    sam = SAM2Base(
        image_encoder=ImageEncoder(
            made(Hiera, encoder["trunk"]),
            made(FpnNeck, neck, position_encoding=positions),
            scalp=encoder["scalp"],
        ),
        memory_attention=nn.Identity(),
        memory_encoder=nn.Identity(),
        **{name: settings[name] for name in IMAGE_SETTINGS},
    )
    del sam.maskmem_tpos_enc, sam.no_mem_pos_enc  # for video
    return sam


@SAM_BACKEND_REGISTRY.register()
def sam2(cfg: Any) -> Sam2Backend:
    """Build the published model of ``cfg.S4M.SAM``, of SAM 2 or 2.1."""
    model_type = cfg.S4M.SAM.MODEL_TYPE
    check_model_type("sam2", model_type)
    build = partial(build_sam2_image_model, published_settings(model_type))
    sam = load_sam(build, cfg.S4M.SAM.CHECKPOINT, model_type, ignored=VIDEO_ONLY)
    return Sam2Backend.build_from_config(cfg, sam)
