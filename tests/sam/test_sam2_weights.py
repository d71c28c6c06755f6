"""Building SAM 2 from a config: published sizes and files."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from sam_cases import SMALL_HIERA, config, needs_sam2

from s4m_d2.sam import build_sam_backend
from s4m_d2.sam import sam2 as sam2_backend
from s4m_d2.sam.sam2 import SIZES, VIDEO_ONLY, build_sam2_image_model

FLAGS = (
    "directly_add_no_mem_embed",
    "image_size",
    "iou_prediction_use_sigmoid",
    "pred_obj_scores",
    "pred_obj_scores_mlp",
)
VERSIONS = ("sam2", "sam2.1")


def build(path="none.pt"):
    return build_sam_backend(config(BACKEND="sam2", MODEL_TYPE="hiera_t", CHECKPOINT=path))


@needs_sam2
def test_the_sizes_are_those_of_the_packages_configs():
    import sam2
    from sam2.modeling.backbones.hieradet import Hiera

    built = build_sam2_image_model(SMALL_HIERA)
    for version in VERSIONS:
        folder = Path(sam2.__path__[0]) / "configs" / version
        for model, size in SIZES.items():
            text = (folder / f"{version}_{model}.yaml").read_text()
            published = yaml.safe_load(text)["model"]
            trunk, neck = (published["image_encoder"][part] for part in ("trunk", "neck"))
            for name, value in vars(size).items():
                expected = trunk.get(name, inspect.signature(Hiera).parameters[name].default)
                assert value == (tuple(expected) if isinstance(expected, list) else expected), name
            assert set(trunk) - {"_target_"} <= set(vars(size))
            channels = neck["d_model"], neck["position_encoding"]["num_pos_feats"]
            assert channels == 2 * (sam2_backend.EMBED_DIM,)
            assert neck["fpn_top_down_levels"] == sam2_backend.TOP_DOWN_LEVELS
            assert neck["fpn_interp_model"] == "nearest"
            assert published["image_encoder"]["scalp"] == sam2_backend.DROPPED_LEVELS
            assert published["use_high_res_features_in_sam"]
            assert all(getattr(built, name) == published[name] for name in FLAGS)


@needs_sam2
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_either_version_loads(version, tmp_path, monkeypatch):
    """A model of the package's own builder, with its parts for video; only the trunk is shrunk."""
    from sam2.build_sam import build_sam2

    trunk = "++model.image_encoder.trunk."
    theirs = build_sam2(
        f"configs/{version}/{version}_hiera_t.yaml",
        device="cpu",
        hydra_overrides_extra=[
            trunk + "embed_dim=8",
            trunk + "stages=[1,1,2,1]",
            trunk + "global_att_blocks=[3]",
            "++model.image_encoder.neck.backbone_channel_list=[64,32,16,8]",
        ],
    )
    path = tmp_path / f"{version}_hiera_tiny.pt"
    torch.save({"model": theirs.state_dict()}, path)
    monkeypatch.setitem(SIZES, "hiera_t", SMALL_HIERA)
    backend = build(path)
    assert (backend.image_side, backend.grid_side) == (1024, 64)
    ours = backend.sam.state_dict()
    for name, value in theirs.state_dict().items():
        assert name.startswith(VIDEO_ONLY) or torch.equal(ours[name], value)
    assert all(name in theirs.state_dict() for name in ours)
