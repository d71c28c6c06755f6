"""How often labeling waits for the device, and that its way on a GPU gives what the CPU's gives."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from seeds import seeded

from s4m_d2 import structures, transfers
from s4m_d2.data import StrongView
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.labeling import pseudo_labeling
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.semi import pseudo_labels, refinement
from s4m_d2.semi.arp import ARP
from s4m_d2.semi.refinement import PointRefiner

from .test_pseudo_labeling import CLASSES
from .test_pseudo_labeling import labeling as known_labeling

QUERIES = 6
SIZES = [(32, 48), (32, 48), (24, 40), (32, 48)]
PADDED = (32, 48)


class RandomTeacher:
    """Predicts from each image's own mean: nothing in image 1, broken and tiny masks elsewhere."""

    def predict_queries(self, batch):
        images = [sample["image"] for sample in batch]
        device = images[0].device
        logits, masks = [], []
        for image in images:
            name = int(image[0, 0, 0])
            generator = seeded(name)
            of_image = torch.zeros(QUERIES, CLASSES + 1)
            of_image[:, 3 if name == 1 else name % CLASSES] = 9.0
            of_image[QUERIES - 1] = 0.0  # not confident
            grid = torch.randn(QUERIES, 1, 3, 4, generator=generator)
            mask = F.interpolate(6 * grid, (8, 12), mode="bilinear")[:, 0]
            mask[0, 2, 3] = torch.nan
            mask[1] = -9.0
            mask[1, 1:3, 2] = 9.0  # fewer pixels than clicks
            mask[2] = -0.01  # a soft area, but no pixel
            logits.append(of_image)
            masks.append(mask)
        return {
            "pred_logits": torch.stack(logits).to(device),
            "pred_masks": torch.stack(masks).to(device),
            "image_sizes": [tuple(image.shape[-2:]) for image in images],
            "padded_size": PADDED,
        }


class BlobBackend:
    """Answers each prompt with blobs around its first click; every other answer is empty."""

    def encode(self, images, image_sizes):
        return images.device

    def prompt(self, device, points, labels):
        assert all(of_image.device.type == "cpu" for of_image in labels)
        outputs = []
        axis = (torch.arange(16, device=device) + 0.5) / 16
        for of_image in points:
            x, y = of_image[:, 0, :, None].unbind(1)
            distance = (axis - x)[:, None] ** 2 + (axis - y)[:, :, None] ** 2
            radii = transfers.to_device([0.1, 0.3, 0.5], device)[:, None, None]
            logits = radii**2 - distance[:, None]
            logits[::2] = -1.0
            if len(logits) > 1:
                logits[1, 2, 0, :1] = torch.inf  # of one value: the host would wait
            ious = (of_image.sum(dim=(1, 2))[:, None] * radii[:, 0, 0] * 7) % 1
            outputs.append(SimpleNamespace(mask_logits=logits, iou_predictions=ious))
        return outputs

    def upscale(self, mask_logits, image_size):
        return F.interpolate(mask_logits[:, None], image_size, mode="bilinear")[:, 0]


def samples(indices):
    result = []
    for i in indices:
        image = torch.randint(0, 256, (3, *SIZES[i]), dtype=torch.uint8, generator=seeded(i))
        weak = torch.full_like(image, i)
        seeds = sample_seeds(0, "unlabeled", i)
        result.append({"image": image, "image_weak": weak, "seeds": seeds})
    return result


def labeling(refined=True, random_placement=False, device="cpu", arp=True):
    teacher = RandomTeacher()
    predict = teacher.predict_queries
    teacher.predict_queries = lambda batch: {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in predict(batch).items()
    }
    exchange = ARP(min_area=60, pair_fraction=0.5, random_placement=random_placement)
    refiner = PointRefiner(backend=BlobBackend()) if refined else None
    view = StrongView(load_config("")).batch
    return known_labeling(teacher, exchange if arp else None, refiner, view, min_area=1.5)


def assert_equal_views(first, second):
    for a, b in zip(first.student_batch, second.student_batch, strict=True):
        assert torch.equal(a["image"], b["image"])
    for name in ("refined", "arp_labels"):
        for a, b in zip(getattr(first, name), getattr(second, name), strict=True):
            assert torch.equal(a.labels, b.labels) and torch.equal(a.scores, b.scores)
            assert torch.equal(a.masks, b.masks)


def test_the_batch_holds_every_case():
    """What the tests below label, so that they cover what they claim."""
    views = labeling()(samples(range(4)))
    stats = [selection.stats for selection in views.selections]
    assert stats[1]["kept"] == 0 and stats[0]["kept"] >= 3
    assert stats[0]["dropped_non_finite"] == 1 and stats[0]["dropped_score"] == 1
    assert 2 in views.selections[0].labels.areas and stats[0]["dropped_area"] == 1  # no pixel
    assert 0 < views.stats["refinement/fallbacks"] < 1
    masks = [sample["instances"].gt_masks.tensor for sample in views.student_batch]
    assert all(mask.any() for of_image in masks for mask in of_image)


@pytest.mark.parametrize("refined", [True, False])
def test_an_image_is_labeled_alike_in_any_batch(refined):
    """Without ARP, which exchanges instances within the batch."""
    together = labeling(refined, arp=False)(samples(range(4)))
    for i in range(4):
        alone = labeling(refined, arp=False)(samples([i]))
        part = pseudo_labeling.UnlabeledViews(
            *(getattr(together, name)[i : i + 1] for name in (
                "student_batch", "selections", "refined", "arp_images", "arp_labels",
            )), {}
        )  # fmt: skip
        assert_equal_views(part, alone)
        assert together.selections[i].stats == alone.selections[0].stats


@pytest.mark.gpu
@pytest.mark.parametrize("random_placement", [False, True])
def test_on_a_gpu_nothing_else_waits(monkeypatch, random_placement):
    pipeline = labeling(True, random_placement, device="cuda")
    batch = samples(range(4))
    pipeline(batch)  # libraries initialize
    predictions = pipeline.teacher.model.predict_queries(
        [{"image": sample["image_weak"]} for sample in batch]
    )
    pipeline.teacher.model.predict_queries = lambda batch: predictions
    waits = []

    def to_host(*tensors):
        waits.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        arrays = transfers.to_host(*tensors)
        torch.cuda.set_sync_debug_mode("error")
        return arrays

    for module in (pseudo_labels, refinement, structures):
        monkeypatch.setattr(module, "to_host", to_host)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = pipeline(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 4
    assert views.student_batch[0]["image"].is_cuda
