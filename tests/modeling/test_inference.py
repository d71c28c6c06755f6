"""Instances from queries: hand-made ones, the definition, and the memory on large images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarking.timing import Form, peak_memory

from s4m_d2.modeling import inference
from s4m_d2.modeling.inference import CHUNK_PIXELS, instance_inference, largest_components

SIZE = (8, 12)
FULL = {"padded_size": SIZE, "image_size": SIZE, "output_size": SIZE}


def logits_of(probabilities):
    """(Q, K + 1) logits whose softmax gives these class probabilities and the rest to nothing."""
    rows = [[*row, 1 - sum(row)] for row in probabilities]
    return torch.tensor(rows).log()


def box_mask(rows, columns, *, inside=3.0):
    mask = torch.full(SIZE, -5.0)
    mask[slice(*rows), slice(*columns)] = inside
    return mask


MASKS = torch.stack([box_mask((1, 4), (2, 9)), box_mask((5, 8), (0, 3), inside=1.0)])


def test_of_nearly_equal_masks_of_a_class_the_best_stays():
    wide = box_mask((1, 4), (2, 10))  # IoU 21 / 24 with the first mask
    masks = torch.stack([MASKS[0], wide, wide, MASKS[1]])
    logits = logits_of([[0.5, 0.1], [0.6, 0.1], [0.1, 0.7], [0.3, 0.1]])
    result = instance_inference(logits, masks, max_instances=4, duplicate_iou=0.8, **FULL)
    assert result.pred_classes.tolist() == [1, 0, 0]  # the other class, wide, the other place
    assert torch.equal(result.pred_masks[1], wide > 0)
    kept = instance_inference(logits, masks, max_instances=4, duplicate_iou=0.9, **FULL)
    assert len(kept) == 4


def test_the_largest_of_a_masks_regions_stays():
    drawn = """\
        11..2
        11...
        ..2.2
        2....
        2...2""".split()
    place = torch.tensor([[".12".index(c) for c in row] for row in drawn])
    whole, none = torch.ones(5, 5), -torch.ones(5, 5)
    mask = torch.where(place > 0, 2.0, -0.5)
    found = largest_components(torch.stack([mask, whole, none])[None])
    kept = torch.where(place == 2, -2.0, mask)  # a corner that touches does not connect
    torch.testing.assert_close(found, torch.stack([kept, whole, none])[None])


CLASSES = 8
LARGE_SIZES = (2000, 4000), (1024, 2048), (1000, 2000)  # of the output, padded, of the view
PEAK_CHUNKS = 2.5  # the bound on the peak, in chunks of masks that are upsampled together


def whole_inference(pred_logits, pred_masks, padded_size, image_size, output_size, max_instances):
    """The definition: every mask of the result at once, in float32."""
    probabilities = pred_logits.float().softmax(-1)[:, :-1]
    scores, pairs = probabilities.flatten().topk(min(max_instances, probabilities.numel()))
    logits = pred_masks[pairs // probabilities.shape[1]][None].float()
    logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : image_size[0], : image_size[1]]
    logits = F.interpolate(logits, size=output_size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    means = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    return scores * means, pairs % probabilities.shape[1], masks


def random_queries(queries, size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(queries, CLASSES + 1, generator=generator) * 3
    masks = torch.randn(queries, *size, generator=generator)
    masks[0] = -1  # an empty one, which is kept
    logits[0, 2] = 9
    return logits.to(dtype), masks.to(dtype)


SIZES = [
    {"padded_size": (32, 64), "image_size": (30, 50), "output_size": (41, 77)},
    {"padded_size": (32, 64), "image_size": (32, 64), "output_size": (16, 24)},
    {"padded_size": (8, 16), "image_size": (8, 16), "output_size": (8, 16)},  # as predicted
]


@pytest.mark.parametrize("sizes", SIZES)
def test_chunked_and_encoded_masks_are_those_of_the_definition(monkeypatch, sizes):
    for rle_masks, dtype, masks_in_chunk in (
        (False, torch.float32, 1),
        (True, torch.float16, 3),
        (True, torch.float32, 1000),
    ):
        logits, masks = random_queries(30, (8, 16), dtype)
        given = logits.clone(), masks.clone()
        area = max(np.prod(sizes["padded_size"]), np.prod(sizes["output_size"]))
        monkeypatch.setattr(inference, "CHUNK_PIXELS", int(area) * masks_in_chunk)
        result = instance_inference(logits, masks, max_instances=20, rle_masks=rle_masks, **sizes)
        scores, classes, expected = whole_inference(logits, masks, max_instances=20, **sizes)
        assert not expected.flatten(1).any(1).all()
        # The last bit of a sigmoid depends on where in memory, to a vector register, its number is.
        torch.testing.assert_close(result.scores, scores, rtol=1e-6, atol=0)
        assert torch.equal(result.pred_classes, classes)
        assert np.array_equal(np.asarray(result.pred_masks), expected.numpy())
        boxes = [mask.nonzero() for mask in expected]
        boxes = [
            [*b.amin(0).flip(0), *(b.amax(0).flip(0) + 1)] if len(b) else [0] * 4 for b in boxes
        ]
        assert torch.equal(result.pred_boxes.tensor, torch.tensor(boxes).float())
        assert torch.equal(logits, given[0]) and torch.equal(masks, given[1])


def large_queries(count, size):
    """Each query one blob of its own, on a grid at 1/16 of the image."""
    y, x = torch.meshgrid(torch.arange(size[0] / 16), torch.arange(size[1] / 16), indexing="ij")
    centers = torch.arange(count)[:, None, None]
    down, right = size[0] / 16 / 10.4, size[1] / 16 / 10
    places = centers % 10 * down, centers // 10 * right
    masks = size[0] / 100 - ((y - places[0]) ** 2 + (x - places[1]) ** 2).sqrt()
    logits = torch.full((count, CLASSES + 1), -10.0)
    logits[:, 0] = torch.linspace(2, -2, count)  # every query is kept, in order
    return logits, masks


@pytest.mark.parametrize("rle_masks", [True, False], ids=["encoded", "dense"])
@pytest.mark.parametrize(
    ("queries", "divisor"), [(20, 4), pytest.param(100, 1, marks=pytest.mark.slow)]
)
def test_peak_of_a_large_image(monkeypatch, queries, divisor, rle_masks):
    """A constant; with dense masks also the result, and no second copy of it.

    The quick case has the proportions of the whole one, 160 MiB, at a 16th of the pixels.
    """
    monkeypatch.setattr(inference, "CHUNK_PIXELS", CHUNK_PIXELS // divisor**2)
    large, padded, image = ((h // divisor, w // divisor) for h, w in LARGE_SIZES)
    logits, masks = large_queries(queries, large)
    sizes = {"padded_size": padded, "image_size": image, "output_size": large}
    results = []

    def infer():
        results.append(
            instance_inference(logits, masks, max_instances=queries, rle_masks=rle_masks, **sizes)
        )

    chunk = 4 * inference.CHUNK_PIXELS  # float32
    bound = PEAK_CHUNKS * chunk + (0 if rle_masks else queries * large[0] * large[1])
    peak = peak_memory(Form(infer), torch.device("cpu"))
    print(f"\n{queries} queries: peak {peak / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB")
    assert peak <= bound
    (result,) = results
    assert len(result) == queries and result.pred_masks[-1].shape == large
    chosen = [0, queries // 2 + 1]
    scores, _, expected = whole_inference(logits[chosen], masks[chosen], max_instances=2, **sizes)
    torch.testing.assert_close(result.scores[chosen], scores, rtol=1e-6, atol=0)
    for index, mask in zip(chosen, expected, strict=True):
        assert torch.equal(result.pred_masks[index], mask)
