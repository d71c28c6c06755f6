"""The backend of Hugging Face's transformers against the forward of each of its classes.

What it shares with the other backends is in test_backends.py.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from sam_cases import SMALL_TRANSFORMERS, config, image_of, needs_transformers, small_transformers

from s4m_d2.errors import WeightsError
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam import hugging_face as hugging_face_backend

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PROCESSORS = {"sam2": "Sam2ImageProcessor", "sam3_tracker": "Sam3ImageProcessor"}
PIXELS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}  # of no published model


def build(path):
    return build_sam_backend(config(BACKEND="transformers", CHECKPOINT=path))


@pytest.fixture(scope="module", params=SMALL_TRANSFORMERS)
def saved(request, tmp_path_factory):
    """A model, its image processor, and the folder that both are saved in."""
    import transformers

    model, side = small_transformers(request.param), SMALL_TRANSFORMERS[request.param][1][0]
    square = {"height": side, "width": side}
    if request.param in PROCESSORS:
        processor = getattr(transformers, PROCESSORS[request.param])(size=square, **PIXELS)
    else:
        size = {"longest_edge": side}
        processor = transformers.SamImageProcessor(size=size, pad_size=square, **PIXELS)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


@pytest.fixture(scope="module")
def loaded(saved):
    return build(saved[2])


@needs_transformers
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("labels", "width"),
    [
        ([[1], [1]], 0.5),
        ([[1, 0], [1, 1], [0, 1]], 1.0),
        ([[2, 3], [2, 3], [2, 3]], 1.0),
        ([[1, 2, 3]], 0.5),
    ],
)
def test_equals_the_models_own_forward(saved, loaded, labels, width, masked):
    """Clicks, boxes and both, of an image whose longer side is the frame's."""
    model, processor, _ = saved
    side = loaded.image_side
    size = (side, round(side * width) if loaded.frame.padded else side)
    image, labels = image_of(*size), torch.tensor(labels)
    points = torch.rand(*labels.shape, 2, generator=torch.Generator().manual_seed(1))
    pixels = points * torch.tensor([size[1], size[0]]) - 0.5  # the model adds half a pixel
    box = labels >= 2
    low_side = 4 * loaded.grid_side
    shapes = 9 * torch.randn(len(labels), 1, low_side, low_side)
    prompts = {}
    if box.any():
        prompts["input_boxes"] = pixels[box].reshape(1, len(labels), 4)
    if not box.all():
        shape = 1, len(labels), -1
        prompts["input_points"] = pixels[~box].reshape(*shape, 2)
        prompts["input_labels"] = labels[~box].reshape(shape)
    frames = processor(image, return_tensors="pt")["pixel_values"]
    tokens = []
    hook = model.mask_decoder.transformer.register_forward_hook(
        lambda module, args, output: tokens.append(output[1])
    )
    with torch.no_grad():
        if masked:  # the model takes one mask per image
            prompts = {name: value.transpose(0, 1) for name, value in prompts.items()}
            prompts["input_masks"] = shapes
            frames = frames.expand(len(labels), -1, -1, -1)
        expected = model(pixel_values=frames, multimask_output=True, **prompts)
    hook.remove()

    encoded = loaded.encode(image[None], [size])
    options = {"mask_prompts": [shapes[:, 0]]} if masked else {}
    (answer,) = loaded.prompt(encoded, [points], [labels], **options)
    torch.testing.assert_close(answer.mask_logits, expected.pred_masks.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(answer.iou_predictions, expected.iou_scores.flatten(0, 1), **CLOSE)
    if labels.shape[1] == 1 and not masked:
        [features] = loaded.prompted_features(encoded, [points[:, 0]])
        attended = tokens[0].reshape(len(labels), loaded.grid_side**2, -1).transpose(1, 2)
        torch.testing.assert_close(features.flatten(2), attended, **CLOSE)


@needs_transformers
def test_a_model_without_values_has_the_size_of_the_loaded_one(saved, loaded):
    with torch.device("meta"):
        blueprint, pixels = hugging_face_backend.load_model(str(saved[2]))
    assert pixels == (PIXELS["image_mean"], PIXELS["image_std"])
    assert all(value.is_meta for value in blueprint.state_dict().values())
    shapes = {name: value.shape for name, value in loaded.sam.state_dict().items()}
    assert {name: value.shape for name, value in blueprint.state_dict().items()} == shapes


@needs_transformers
def test_what_is_saved_is_the_same_backend(loaded, tmp_path):
    again = build(loaded.save(str(tmp_path / "sam_adapted")))
    state = again.sam.state_dict()
    assert all(torch.equal(state[name], x) for name, x in loaded.sam.state_dict().items())
    torch.testing.assert_close(
        (again.frame.mean, again.frame.std), (loaded.frame.mean, loaded.frame.std)
    )


@needs_transformers
def test_a_model_of_the_hubs_cache_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, revision = tmp_path / "models--own--sam", "0" * 40
    small_transformers("sam").save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    assert build("own/sam").image_side == 64


def of_type(model_type, folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": model_type}))


def with_a_pickle_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


def without_weights_of_the_decoder(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    left = {name: value for name, value in state.items() if "mask_decoder" not in name}
    save_file(left, folder / "model.safetensors", {"format": "pt"})


@needs_transformers
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (partial(of_type, "vit"), "type 'vit'; expected one of sam, sam_hq, sam2"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json has type 'None'"),
        (with_a_pickle_alone, r"has no model\.safetensors.*save_pretrained"),
        (truncated, "cannot be loaded"),
        (without_weights_of_the_decoder, r"lack mask_decoder\..* more of SamModel"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tmp_path, spoil, message):
    small_transformers("sam").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(WeightsError, match=message) as refusal:
        build(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@needs_transformers
@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("facebook/sam2.1-hiera-tiny", "facebook/sam2.1-hiera-tiny"),
        ("/nowhere/sam", "facebook/sam-vit-large"),
        ("models/sam_vit_l_0b3195.pth", "facebook/sam-vit-large"),
    ],
)
def test_a_model_that_is_not_here_is_not_downloaded(tmp_path, monkeypatch, checkpoint, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=rf"'{checkpoint}'.*hf download {name}\b"):
        build(checkpoint)


@needs_transformers
def test_the_video_models_config_gives_the_model_of_images(tmp_path):
    model = small_transformers("sam2")
    model.save_pretrained(tmp_path)
    of_type("sam2_video", tmp_path)
    state = build(tmp_path).sam.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
