"""Building backends from a config, and the errors of missing, damaged and wrong weights."""

from __future__ import annotations

import sys

import pytest
import torch
from sam_cases import config, needs_sam2, small_sam
from segment_anything import sam_model_registry

from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.segment_anything import TINY_WEIGHTS, TOYSCAPES_WEIGHTS, build_tiny_sam


@pytest.mark.parametrize(
    ("name", "path", "most"),
    [("tiny", TINY_WEIGHTS, 12e6), ("tiny_toyscapes", TOYSCAPES_WEIGHTS, 5e6)],
)
def test_an_empty_checkpoint_means_the_packaged_weights_which_are_small(name, path, most):
    random_state = torch.get_rng_state()
    backend = build_sam_backend(config(BACKEND=name, CHECKPOINT="", MAX_PROMPTS=7))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (backend.image_side, backend.grid_side) == (256, 32)
    assert backend.max_prompts == 7
    packaged = torch.load(path, weights_only=True)
    for key, value in backend.sam.state_dict().items():
        assert torch.equal(value, packaged[key].to(value.dtype)) and value.isfinite().all()
    assert path.stat().st_size < most


def test_the_pyramid_starts_at_zero_and_is_then_added():
    encoder = build_tiny_sam().image_encoder.eval()
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        alone = encoder.transformer(image)
        torch.testing.assert_close(encoder(image), alone)
        encoder.output[-1].weight.normal_()
        other = encoder(image)
    assert other.shape == alone.shape == (1, 64, 32, 32)
    assert (other - alone).abs().mean() > 0.01


def test_tiny_names_timm_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install .*timm"):
        build_sam_backend(config(BACKEND="tiny", CHECKPOINT=""))


def named(state, start):
    return {start + name: value for name, value in state.items()}


WRAPPERS = {
    "MedSAM's training": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    "DataParallel": lambda state: named(state, "module."),
    "both": lambda state: {"model": named(state, "module.")},
    "Lightning": lambda state: {
        "epoch": 1, "pytorch-lightning_version": "2.4.0", "loops": {"fit_loop": {}},
        "state_dict": named(state, "model.sam.") | {"loss.weight": torch.zeros(3)},
    },
    "micro-sam's training": lambda state: {
        "iteration": 7, "model_state": named(state, "sam."), "optimizer_state": {"state": {}},
        "decoder_state": {"decoder.samplers.0.conv.weight": torch.zeros(2)},
    },
    "micro-sam's export": lambda state: {
        "model_state": state, "decoder_state": {"out_conv.weight": torch.zeros(2)},
    },
}  # fmt: skip


def test_weights_in_a_wrapper_load_as_the_bare_ones(tmp_path):
    state = small_sam().state_dict()
    for wrap in WRAPPERS.values():
        torch.save(wrap(state), tmp_path / "best.pt")
        loaded = load_sam(small_sam, tmp_path / "best.pt", "vit_b").state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.fixture(scope="module")
def published_vit_b():
    """Names and shapes of the published model, without its values' size."""
    with torch.device("meta"):
        state = sam_model_registry["vit_b"]().state_dict()
    return {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}


def position(width):
    return {"image_encoder.pos_embed": torch.zeros(()).expand(1, 64, 64, width)}


def hiera(depth):
    names = [f"image_encoder.trunk.blocks.{i}.norm1.weight" for i in range(depth)]
    return {"model": dict.fromkeys(names, torch.zeros(2))}


HQ = {"mask_decoder.hf_token.weight": torch.zeros(1, 256)}
TINY_VIT = {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 3, 3)}
# From the state dict of vit_b to the file, and what its message must name.
FOREIGN = {
    "vit_b": (lambda state: state, "S4M.SAM.BACKEND segment_anything S4M.SAM.MODEL_TYPE vit_b"),
    "vit_b, wrapped": (WRAPPERS["micro-sam's training"], "S4M.SAM.MODEL_TYPE vit_b"),
    "vit_h": (lambda state: state | position(1280), "S4M.SAM.MODEL_TYPE vit_h"),
    "HQ-SAM": (lambda state: state | HQ, "HQ-SAM"),
    "HQ-SAM's decoder": (lambda _: {"hf_token.weight": torch.zeros(1, 256)}, "HQ-SAM"),
    "MobileSAM": (lambda _: TINY_VIT, "S4M.SAM.BACKEND segment_anything S4M.SAM.MODEL_TYPE vit_t"),
    "Light HQ-SAM": (lambda _: TINY_VIT | HQ, "HQ-SAM"),
    "SAM 2": (lambda _: hiera(24), "S4M.SAM.BACKEND sam2 S4M.SAM.MODEL_TYPE hiera_b+"),
}


def test_a_file_of_another_model_is_recognized(published_vit_b, tmp_path):
    for content, expected in FOREIGN.values():
        torch.save(content(published_vit_b), tmp_path / "weights.pth")
        with pytest.raises(WeightsError) as caught:
            load_sam(small_sam, tmp_path / "weights.pth", "vit_l")
        assert expected in str(caught.value) and "sam_vit_l_0b3195.pth" in str(caught.value)


def test_the_published_names_and_shapes_are_those_of_the_library(published_vit_b, tmp_path):
    """MedSAM's file has them too. One entry more is named, without advice to set what is set."""
    path = tmp_path / "medsam_vit_b.pth"
    torch.save(published_vit_b, path)
    with torch.device("meta"):
        load_sam(sam_model_registry["vit_b"], path, "vit_b")
        torch.save({**published_vit_b, "image_encoder.lora": torch.zeros(2)}, path)
        with pytest.raises(WeightsError, match="image_encoder.lora") as caught:
            load_sam(sam_model_registry["vit_b"], path, "vit_b")
    assert "MODEL_TYPE" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "model", "words"),
    [
        ("segment_anything", "vit_l", ["sam_vit_l_0b3195.pth", "#model-checkpoints"]),
        ("segment_anything", "vit_t", ["mobile_sam.pt", "/MobileSAM/"]),
        pytest.param("sam2", "hiera_b+", ["sam2_hiera_base_plus.pt", "/sam2#"], marks=needs_sam2),
    ],
)
def test_a_missing_file_names_the_path_the_file_and_the_source(backend, model, words, tmp_path):
    path = str(tmp_path / "none.pth")
    with pytest.raises(WeightsError) as caught:
        build_sam_backend(config(BACKEND=backend, MODEL_TYPE=model, CHECKPOINT=path))
    assert all(word in str(caught.value) for word in [path, *words])


TOKEN = "mask_decoder.iou_token.weight"


def test_another_file_is_told_with_what_it_holds(tmp_path):
    state, path = small_sam().state_dict(), tmp_path / "weights.pth"
    for content, found in (
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, "model, epoch"),
        ([1, 2], "list"),
        (state | {"extra.weight": torch.zeros(1)}, "extra.weight"),
        (state | {TOKEN: torch.zeros(1, 7)}, rf"{TOKEN} is \(1, 7\) instead of \(1, 32\)"),
        ({name: value for name, value in state.items() if name != TOKEN}, TOKEN),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=found):
            load_sam(small_sam, path, "vit_b")
