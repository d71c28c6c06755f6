"""tools/benchmarking: the plain forms, on inputs whose results are known."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from benchmarking import checks, plain, plain_model, stage_parts  # noqa: E402

from s4m_d2.semi import EMATeacher  # noqa: E402
from s4m_d2.structures import PseudoLabels  # noqa: E402


def labels_of(masks, classes):
    masks = torch.tensor(masks, dtype=torch.bool)
    return PseudoLabels(torch.tensor(classes), masks, torch.full((len(masks),), 0.9))


def test_points_fill_up_small_masks_and_name_pixel_centers():
    masks = torch.zeros(1, 2, 4, dtype=torch.bool)
    masks[0, 1, 2] = True
    points, labels = plain.mask_points(
        torch.zeros(1, 2, 4), masks, (2.0, 4.0), 3, np.random.default_rng(0)
    )
    assert points[0, 0].tolist() == [2.5 / 4, 1.5 / 2]
    assert labels.tolist() == [[1, -1, -1]]


def test_points_fall_where_the_softmax_says():
    copies = 4000
    logits = torch.tensor([[0.0, math.log(3.0), 50.0]]).expand(copies, 1, 3)
    masks = torch.tensor([[True, True, False]]).expand(copies, 1, 3)
    points, _ = plain.mask_points(logits, masks, (1.0, 3.0), 1, np.random.default_rng(0))
    share = (points[:, 0, 0] > 0.4).float().mean().item()
    assert points[:, 0, 0].max() < 0.6, "outside the mask"
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / copies)


def test_pasted_instances_cover_and_empty_ones_go():
    images = [torch.full((3, 1, 4), 10, dtype=torch.uint8), torch.zeros(3, 1, 4, dtype=torch.uint8)]
    labels = [
        labels_of([[[1, 1, 0, 0]], [[0, 0, 0, 1]]], [0, 1]),  # the second is too small to be pasted
        labels_of([[[0, 1, 1, 0]], [[1, 0, 0, 0]]], [2, 3]),  # the second will be covered
    ]
    new_images, new_labels = plain.exchange_instances(
        images, labels, [plain.Exchange(0, 1)], 2, (1.0, 1.0)
    )
    assert new_images[1][0, 0].tolist() == [10, 10, 0, 0]
    assert new_labels[1].labels.tolist() == [2, 0]
    assert new_labels[1].masks[:, 0].int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 0]]
    assert new_images[0] is images[0] and new_labels[0] is labels[0]
    assert labels[1].masks[0, 0].tolist() == [False, True, True, False], "an input was changed"


def test_an_instance_is_moved_and_scaled_as_drawn():
    image = torch.arange(8, dtype=torch.uint8).expand(3, 1, 8) * 10
    mask = torch.tensor([[True, True, False, False, False, False, False, False]])
    pixels, moved = plain.place(image, mask, torch.tensor([0.0, 1.0, 0.0]), (1.0, 1.0))
    assert moved.int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    assert pixels[0, 0, 6:].tolist() == [0, 10]
    _, doubled = plain.place(image, mask, torch.tensor([1.0, 0.0, 0.0]), (1.0, 2.0))
    assert doubled.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        (plain.StrongDraws((), False, None), [100, 50, 200]),
        (plain.StrongDraws((("brightness", 1.2),), False, None), [120, 60, 240]),
        (plain.StrongDraws((("brightness", 2.0),), False, None), [200, 100, 255]),
        (plain.StrongDraws((), True, None), [82] * 3),  # 0.299 R + 0.587 G + 0.114 B
        (plain.StrongDraws((), False, 1.0), [100, 50, 200]),  # nothing to blur
    ],
)
def test_strong_view_of_one_color(draws, expected):
    image = torch.tensor([100, 50, 200], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    seen = plain.strong_view(image.contiguous(), draws, 3.0)
    assert seen[:, 4, 4].tolist() == expected


def model_of(value, count):
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("mean", torch.full((2,), value))
    model.register_buffer("count", torch.tensor(count))
    nn.init.constant_(model.weight, value)
    return model


def test_teacher_moves_and_copies_counts():
    teacher, student = model_of(4.0, 1), model_of(8.0, 7)
    plain.update_teacher(teacher, student, 0.75)
    assert teacher.weight.item() == teacher.mean[0].item() == 5.0
    assert teacher.count.item() == 7 and student.weight.item() == 8.0


def test_a_broken_update_is_noticed(monkeypatch):
    student = model_of(8.0, 7)
    bench = SimpleNamespace(teacher=EMATeacher(model_of(4.0, 1), decay=0.75), student=student)
    part = stage_parts.ema_part(bench)
    part.check()
    assert bench.teacher.model.weight.item() == 4.0, "the check moved the teacher"
    monkeypatch.setattr(plain, "update_teacher", lambda *args: None)
    with pytest.raises(checks.Mismatch, match="ema"):
        part.check()


def test_deformable_sampling_reads_cells_and_weighs_levels():
    value = torch.tensor([10.0, 20.0, 4.0]).view(1, 3, 1, 1)  # a level of 1 x 2, one of 1 x 1
    levels = [(1, 2), (1, 1)]
    locations = torch.tensor([[0.25, 0.5], [0.5, 0.5]]).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([0.5, 0.25]).view(1, 1, 1, 2, 1)
    assert plain_model.deformable_sampling(value, levels, locations, weights).item() == 6.0
    locations[0, 0, 0, 0, 0] = torch.tensor([0.5, 0.5])  # between the cells
    assert plain_model.deformable_sampling(value, levels, locations, weights).item() == 8.5
    locations[0, 0, 0, 0, 0] = torch.tensor([2.0, 0.5])  # outside: zero
    assert plain_model.deformable_sampling(value, levels, locations, weights).item() == 1.0


def test_matching_is_the_cheapest_assignment():
    draws = torch.Generator().manual_seed(0)
    outputs = {
        "pred_logits": torch.randn((2, 5, 4), generator=draws),
        "pred_masks": torch.randn((2, 5, 8, 8), generator=draws),
    }
    targets = [
        {
            "labels": torch.tensor([0, 2, 1][:count], dtype=torch.int64),
            "masks": (torch.rand((count, 16, 16), generator=draws) > 0.5).float(),
        }
        for count in (3, 0)
    ]
    matcher = plain_model.Matcher(2.0, 5.0, 5.0, 64)
    seeded = [torch.Generator().manual_seed(1) for _ in range(3)]
    ((queries, instances),), ((none, _),) = matcher([outputs], targets, seeded[:2])
    points = torch.rand((64, 2), generator=seeded[2])
    cost = matcher.cost(outputs["pred_logits"][0], outputs["pred_masks"][0], targets[0], points)
    best = min(
        itertools.permutations(range(5), 3), key=lambda rows: cost[list(rows), [0, 1, 2]].sum()
    )
    assert queries.tolist() == list(best) and instances.tolist() == [0, 1, 2]
    assert len(none) == 0


def test_the_terms_of_a_cost():
    logits = torch.tensor([[math.log(3.0), 0.0]])
    target = {"labels": torch.tensor([0]), "masks": torch.ones(1, 4, 4)}
    inside = torch.full((1, 4, 4), 50.0)
    points = torch.rand((16, 2), generator=torch.Generator().manual_seed(0))
    classes = plain_model.Matcher(2.0, 0.0, 0.0, 16).cost(logits, inside, target, points)
    assert classes.shape == (1, 1) and classes.item() == pytest.approx(-2 * 0.75)
    for weights in ((0.0, 5.0, 0.0), (0.0, 0.0, 3.0)):
        masks = plain_model.Matcher(*weights, 16)
        right, wrong = (
            masks.cost(logits, sign * inside, target, points).item() for sign in (1, -1)
        )
        assert 0 <= right < 0.3 * wrong


def test_sam_one_by_one_asks_for_single_images():
    class Backend:
        grid_side = 4

        def __init__(self):
            self.batches = []

        def encode(self, images, image_sizes):
            self.batches.append(len(images))
            return plain_model.EncodedImages(images.float(), list(image_sizes))

        def prompt(self, encoded, points, labels, **options):
            self.batches.append(len(encoded))
            return [encoded.embeddings[0, 0, 0, 0].item()]

    backend = Backend()
    alone = plain_model.OneByOne(backend)
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    encoded = alone.encode(images, [(2, 2)] * 3)
    assert torch.equal(encoded.embeddings, images) and encoded.image_sizes == [(2, 2)] * 3
    assert alone.prompt(encoded, [None] * 3) == [0.0, 1.0, 2.0]
    assert set(backend.batches) == {1} and alone.grid_side == 4


def test_clicks_of_another_distribution_are_noticed():
    draws = torch.Generator().manual_seed(0)
    fair = torch.rand((3000, 1, 2), generator=draws).round()
    other = torch.rand((3000, 1, 2), generator=draws).round()
    checks.same_frequencies(fair, other, "clicks")
    with pytest.raises(checks.Mismatch, match="clicks"):
        checks.same_frequencies(fair, (other - 0.1).clamp(min=0).round() * 0, "clicks")


@pytest.mark.parametrize("change", ["classes", "scores", "masks", "number"])
def test_other_pseudo_labels_are_noticed(change):
    one = labels_of([[[1, 1, 0, 0]]], [2])
    other = {
        "classes": PseudoLabels(one.labels + 1, one.masks, one.scores),
        "scores": PseudoLabels(one.labels, one.masks, one.scores / 2),
        "masks": PseudoLabels(one.labels, ~one.masks, one.scores),
        "number": one[:0],
    }[change]
    checks.same_labels([one], [one], "labels")
    with pytest.raises(checks.Mismatch):
        checks.same_labels([one], [other], "labels")
