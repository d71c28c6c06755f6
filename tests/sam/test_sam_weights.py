"""Building backends from a config: packaged and published weights, MobileSAM's (the names and
shapes of its file are stored), and the errors of missing, damaged and wrong ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_cases import config, needs_sam2, small_sam
from segment_anything import sam_model_registry
from toyscapes_scene import render_scene

from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.pretrained import renamed
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.adaptation import draw_clicks
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.segment_anything import (
    CLASSIFIER,
    MOBILE_SAM_NAMES,
    TINY_WEIGHTS,
    TOYSCAPES_WEIGHTS,
    TinyViTEncoder,
    build_tiny_sam,
)

SCENES, SEED, MIN_AREA = 16, 77, 100  # a seed of neither a data set nor the training
MOBILE_SAM = Path(__file__).parents[1] / "data_reference" / "mobile_sam_encoder_keys.json"


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


def scenes():
    """(image (3, H, W), instance masks (N, H, W)) of each scene."""
    for index in range(SCENES):
        scene = render_scene(SEED, "test", index)
        ids, areas = np.unique(scene.instance_ids, return_counts=True)
        ids = ids[(ids >= 1000) & (areas >= MIN_AREA)]
        masks = torch.from_numpy(scene.instance_ids == ids[:, None, None])
        yield torch.from_numpy(scene.image).permute(2, 0, 1), masks


def test_clicks_give_good_masks_more_of_them_better_ones_and_their_rating_follows():
    backend = build_sam_backend(config(BACKEND="tiny_toyscapes", CHECKPOINT=""))
    rng = np.random.default_rng(0)
    ious, ratings = {1: [], 3: []}, {1: [], 3: []}
    for image, masks in scenes():
        size = tuple(image.shape[1:])
        encoded = backend.encode(image[None], [size])
        clicks = torch.from_numpy(np.stack([draw_clicks(mask.numpy(), 3, rng) for mask in masks]))
        for count in (1, 3):
            [output] = backend.prompt(encoded, [clicks[:, :count]])
            rating, best = output.iou_predictions.max(dim=1)
            predicted = backend.upscale(output.mask_logits[range(len(best)), best], size) > 0
            shared, either = predicted & masks, predicted | masks
            ious[count].append(shared.sum((1, 2)) / either.sum((1, 2)))
            ratings[count].append(rating)
    one, three, rating = map(torch.cat, (ious[1], ious[3], ratings[1]))
    assert len(three) > 60 and three.mean() >= 0.85 and three.mean() > one.mean() + 0.02
    assert np.corrcoef(one, rating)[0, 1] > 0.5
    assert (one - rating).abs().mean() < 0.15


def test_the_pyramid_starts_at_zero():
    """That it is added later: test_adaptation.py."""
    encoder, image = build_tiny_sam().image_encoder.eval(), torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), encoder.transformer(image))


@pytest.mark.parametrize(
    ("backend", "package", "missing"),
    [
        ("tiny", "timm", "timm"),
        ("transformers", "transformers", "transformers"),
        ("sam2", "sam2", "sam2"),
        pytest.param("sam2", "sam2", "hydra", marks=needs_sam2),  # which it imports
    ],
)
def test_a_missing_package_is_named(monkeypatch, backend, package, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sam2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    model_type = "hiera_t" if backend == "sam2" else "vit_b"
    with pytest.raises(ConfigError, match=rf"{backend}.*pip install \"s4m_d2\[{package}\]\""):
        build_sam_backend(config(BACKEND=backend, MODEL_TYPE=model_type, CHECKPOINT=""))


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


def test_mobile_sams_file_loads_also_after_adaptation(published_vit_b, tmp_path):
    """Each entry has a value of its own."""
    encoder = json.loads(MOBILE_SAM.read_text())
    shapes = {f"image_encoder.{name}": shape for name, shape in encoder.items()}
    rest = published_vit_b.items()
    shapes |= {name: tuple(v.shape) for name, v in rest if not name.startswith("image_encoder.")}
    pairs = enumerate(shapes.items())
    published = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in pairs}
    assert len(published) == 439 and sum(v.numel() for v in published.values()) == 10_140_231
    path = tmp_path / "mobile_sam.pt"
    torch.save(published, path)
    backend = build_sam_backend(config(MODEL_TYPE="vit_t", CHECKPOINT=path))
    assert (backend.image_side, backend.grid_side) == (1024, 64)
    own = backend.sam.state_dict()
    used = {name: v for name, v in published.items() if not name.startswith(CLASSIFIER)}
    assert len(used) == len(own) == 435
    assert all(
        torch.equal(own[renamed(name, MOBILE_SAM_NAMES)], value) for name, value in used.items()
    )
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


def test_mobile_sams_encoder_has_stride_16_and_follows_its_biases_in_eval_mode():
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
