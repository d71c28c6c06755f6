"""The whole model: batching, padding, targets, training, distillation."""

import cv2
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from seeds import seeded

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.losses import StructuralDistillation
from s4m_d2.modeling import meta_arch
from s4m_d2.modeling.meta_arch import prepare_target

LAYERS = 4  # of the tiny model, the learnable queries included
NAMES = {
    f"{name}{suffix}"
    for name in ("loss_ce", "loss_mask", "loss_dice")
    for suffix in ("", *(f"_{i}" for i in range(LAYERS - 1)))
}


class RecordingDistillation:
    """Notes its arguments; its loss depends on the mask features alone."""

    def __call__(self, mask_features, images, image_sizes, masks, generators):
        self.images, self.image_sizes, self.masks = images, image_sizes, masks
        self.seeds = None if generators is None else [g.initial_seed() for g in generators]
        return {"loss_sd": mask_features.square().mean()}


def assert_same_queries(actual, expected, index):
    for name in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(
            actual[name][index], expected[name][0], rtol=1e-4, atol=1e-4, msg=name
        )


@torch.no_grad()
def test_masks_of_one_piece_everywhere(make_tiny_model, make_sample):
    key = "MODEL.MASK_FORMER.TEST.LARGEST_COMPONENT"
    samples = [make_sample(64, 96)]
    for is_one, model in ((one, make_tiny_model(key, one).eval()) for one in (False, True)):
        low = model.predict_queries(samples)["pred_masks"][0] > 0
        full = model(samples)[0]["instances"].pred_masks
        pieces = [cv2.connectedComponents(m.numpy().view("u1"))[0] - 1 for m in [*low, *full]]
        assert (max(pieces) == 1) is is_one


@torch.no_grad()
def test_images_of_a_batch_see_nothing_but_a_border_of_the_mean_color(make_tiny_model, make_sample):
    """A small image beside a larger one sees what it would see alone with that border."""
    model = make_tiny_model().eval()
    small, large = make_sample(64, 96), make_sample(96, 128, seed=1)
    bordered = model.pixel_mean.expand(3, 96, 128).clone()
    bordered[:, :64, :96] = small["image"]
    together = model.predict_queries([small, large])
    assert_same_queries(together, model.predict_queries([{"image": bordered}]), 0)
    assert_same_queries(together, model.predict_queries([large]), 1)
    assert together["image_sizes"] == [(64, 96), (96, 128)]
    assert together["padded_size"] == (96, 128)


@torch.no_grad()
def test_results_have_the_size_asked_for_or_the_image_s(make_tiny_model, make_sample):
    model = make_tiny_model("TEST.DETECTIONS_PER_IMAGE", 7).eval()
    samples = [
        {**make_sample(50, 70), "height": 101, "width": 139},
        make_sample(40, 90, seed=1),
    ]
    results = [result["instances"] for result in model(samples)]
    assert [tuple(r.pred_masks.shape) for r in results] == [(7, 101, 139), (7, 40, 90)]
    assert [tuple(r.image_size) for r in results] == [(101, 139), (40, 90)]


def test_every_parameter_gets_a_gradient_with_and_without_instances(make_tiny_model, make_sample):
    """What DistributedDataParallel needs, too."""
    model = make_tiny_model().train()
    for labels in ([1, 5, 5], []):
        model.zero_grad()
        losses = model([make_sample(64, 96, labels), make_sample(64, 64, labels, seed=1)])
        assert set(losses) == NAMES
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing
        assert model.sem_seg_head.predictor.class_embed.weight.grad.any()
        assert model.backbone.stem.conv1.weight.grad.any()
        mask_gradient = model.sem_seg_head.predictor.mask_embed.layers[2].weight.grad.any()
        assert mask_gradient == bool(labels)


def test_without_deep_supervision_only_the_last_layer_is_trained(make_tiny_model, make_sample):
    model = make_tiny_model("MODEL.MASK_FORMER.DEEP_SUPERVISION", False).train()
    losses = model([make_sample(64, 64, [1])])
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_losses_are_a_function_of_the_samples_seeds(make_tiny_model, make_sample):
    model = make_tiny_model().train()
    for module in model.backbone.modules():  # batch statistics couple the images
        module.eval()
    sample = make_sample(64, 64, [1, 2])
    state = torch.get_rng_state()
    first = model([sample])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = model([sample])
    assert all(torch.equal(first[name], again[name]) for name in first)
    prompts = model([{**sample, "seeds": {**sample["seeds"], "prompt_points": 99}}])
    assert all(torch.equal(first[name], prompts[name]) for name in first)
    points = model([{**sample, "seeds": {**sample["seeds"], "loss_points": 99}}])
    assert any(not torch.equal(first[name], points[name]) for name in first)


def test_distillation_gets_features_rgb_images_and_padded_masks(make_tiny_model, make_sample):
    model = make_tiny_model("INPUT.FORMAT", "BGR").train()
    model.distillation = RecordingDistillation()
    samples = [make_sample(40, 60, [1, 2]), make_sample(64, 50, [], seed=7)]
    losses = model(samples)
    assert set(losses) == NAMES | {"loss_sd"}
    losses["loss_sd"].backward()
    assert model.sem_seg_head.pixel_decoder.mask_features.weight.grad.any()
    seen = model.distillation
    assert seen.images.shape == (2, 3, 64, 64) and seen.image_sizes == [(40, 60), (64, 50)]
    assert torch.equal(seen.images[0, :, :40, :60], samples[0]["image"].flip(0))
    assert not seen.images[0, :, 40:].any() and not seen.images[1, :, :, 50:].any()
    assert [tuple(m.shape) for m in seen.masks] == [(2, 64, 64), (0, 64, 64)]
    assert seen.seeds == [sample["seeds"]["prompt_points"] for sample in samples]


def test_distillation_leaves_no_trace_in_modules_weights_or_evaluation(
    make_tiny_model, make_sample
):
    model = make_tiny_model()
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    model.distillation = RecordingDistillation()
    assert ([name for name, _ in model.named_modules()], list(model.state_dict())) == names
    with torch.no_grad():
        model.eval()([make_sample(64, 64)])
    assert not hasattr(model.distillation, "images")


def test_config_builds_the_distillation_around_the_configured_sam(make_tiny_cfg, monkeypatch):
    backend = object()
    monkeypatch.setattr(meta_arch, "build_sam_backend", lambda cfg: backend)
    model = build_model(make_tiny_cfg("S4M.DISTILL.ENABLED", True, "S4M.DISTILL.NUM_POINTS", 17))
    assert type(model.distillation) is StructuralDistillation
    assert model.distillation.backend is backend and model.distillation.num_points == 17
    assert build_model(make_tiny_cfg()).distillation is None


def test_batches_are_squares_or_multiples_of_the_divisibility(make_tiny_model, make_sample):
    """With large-scale jitter, and in training only, squares."""
    jitter = ("INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj", "INPUT.IMAGE_SIZE", 96)
    model = make_tiny_model(*jitter, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 48)
    model.distillation = RecordingDistillation()
    model.train()([make_sample(40, 70, [1])])
    assert model.distillation.images.shape == (1, 3, 96, 96)
    with pytest.raises(InputError, match="INPUT.IMAGE_SIZE"):
        model([make_sample(40, 100, [1])])
    with torch.no_grad():
        found = model.eval().predict_queries([make_sample(40, 100)])
    assert found["padded_size"] == (48, 144) and found["image_sizes"] == [(40, 100)]
    assert found["pred_masks"].shape == (1, 20, 12, 36)


SIZE = (6, 10)  # of targets


def prepare(sample, padded_size=SIZE):
    return prepare_target(sample, padded_size, torch.device("cpu"))


def make(labels, masks, size=SIZE):
    fields = {"gt_classes": torch.tensor(labels, dtype=torch.int64)}
    if masks is not None:
        fields["gt_masks"] = masks
    return {
        "file_name": "aachen_7.png",
        "image": torch.zeros(3, *SIZE, dtype=torch.uint8),
        "instances": Instances(size, **fields),
    }


def test_masks_are_padded_at_the_bottom_and_right():
    masks = torch.rand(2, *SIZE, generator=seeded(0)) > 0.5
    for given in (BitMasks(masks), masks, masks.float()):
        target = prepare(make([3, 7], given), padded_size=(8, 16))
        assert target["labels"].tolist() == [3, 7]
        assert target["masks"].dtype == torch.bool and target["masks"].shape == (2, 8, 16)
        assert torch.equal(target["masks"][:, :6, :10], masks)
        assert target["masks"].sum() == masks.sum()
    target = prepare(make([], None), padded_size=(8, 16))
    assert target["labels"].shape == (0,) and target["masks"].shape == (0, 8, 16)


def test_pixels_of_the_padding_are_not_doubted():
    sample = make([3], torch.ones(1, *SIZE, dtype=torch.bool))
    assert prepare(sample).keys() == {"labels", "masks"}
    sample["instances"].gt_weights = torch.tensor([0.5])
    sample["instances"].gt_doubts = torch.full((1, *SIZE), 7, dtype=torch.uint8)
    target = prepare(sample, padded_size=(8, 16))
    assert target["weights"].tolist() == [0.5]
    assert torch.equal(target["doubts"] == 7, target["masks"]) and target["doubts"].sum() == 7 * 60


ONE = torch.ones(1, *SIZE, dtype=torch.bool)


def test_bad_annotations_are_named():
    for sample, error, words in (
        (make([1], ONE[:, :5]), DatasetError, ["(1, 5, 10)", "(6, 10)"]),
        (make([1, 2], None), InputError, ["gt_masks"]),
        (make([1], PolygonMasks([[torch.zeros(6).numpy()]])), InputError, ["INPUT.MASK_FORMAT"]),
        ({"file_name": "aachen_7.png"}, InputError, ["instances"]),
    ):
        with pytest.raises(error) as caught:
            prepare(sample)
        assert all(word in str(caught.value) for word in ("aachen_7.png", *words))
