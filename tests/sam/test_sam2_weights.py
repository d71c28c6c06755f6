"""Building SAM 2 from a config: published sizes and files."""

from __future__ import annotations

import pytest
import torch
from sam_cases import config, needs_sam2, small_sam2_settings

from s4m_d2.sam import build_sam_backend
from s4m_d2.sam import sam2 as sam2_backend
from s4m_d2.sam.sam2 import VIDEO_ONLY

VERSIONS = ("sam2", "sam2.1")


def build(path="none.pt"):
    return build_sam_backend(config(BACKEND="sam2", MODEL_TYPE="hiera_t", CHECKPOINT=path))


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
    monkeypatch.setattr(sam2_backend, "published_settings", lambda _: small_sam2_settings())
    backend = build(path)
    assert (backend.image_side, backend.grid_side) == (1024, 64)
    ours = backend.sam.state_dict()
    for name, value in theirs.state_dict().items():
        assert name.startswith(VIDEO_ONLY) or torch.equal(ours[name], value)
    assert all(name in theirs.state_dict() for name in ours)
