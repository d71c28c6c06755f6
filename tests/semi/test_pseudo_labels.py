"""Selection of pseudo-labels: each rule alone, at equality, and against a literal loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.semi.pseudo_labels import select_pseudo_labels

CLASSES = 3
RULES = dict(score_thresh=0.7, min_area=5.0)
ROW = (0.1, 0.8, 0.05, 0.05)  # class 1
FATES = ("dropped_no_object", "dropped_score", "dropped_area", "dropped_non_finite", "kept")


def class_logits(*probabilities) -> torch.Tensor:
    """(Q, 4) logits whose softmax is the given rows (three classes, then no-object)."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


def mask_with_area(pixels: int) -> torch.Tensor:
    mask = torch.full((6 * 8,), -30.0)
    mask[:pixels] = 30.0
    return mask.view(1, 6, 8)


def select(logits, masks, content_size=(6, 8), **changes):
    rules = {**RULES, **changes}
    [selection] = select_pseudo_labels([logits], [masks], content_sizes=[content_size], **rules)
    return selection


def test_a_score_at_the_threshold_is_dropped():
    logits = torch.tensor([[1.0, 3.0, 0.0, 0.5]])
    score = float(logits.softmax(-1)[0, 1])
    assert select(logits, mask_with_area(10), score_thresh=score).stats["dropped_score"] == 1
    below = math.nextafter(score, 0.0) - 1e-7
    assert select(logits, mask_with_area(10), score_thresh=below).stats["kept"] == 1


def test_an_area_at_the_threshold_is_dropped_and_the_area_is_soft():
    logits = class_logits(ROW)
    half = torch.zeros(1, 2, 5)  # probability 0.5 exactly, 10 px: area 5 exactly
    assert select(logits, half, (2, 5), mask_thresh=0.4).stats["dropped_area"] == 1
    assert select(logits, half, (2, 5), min_area=4.999, mask_thresh=0.4).stats["kept"] == 1
    assert select(logits, half, (2, 5), min_area=4.999).stats["dropped_area"] == 1  # no pixel


def test_a_pixel_at_the_mask_threshold_is_outside():
    logits = class_logits(ROW)
    masks = torch.tensor([[[0.0, 1e-3, -1e-3, 9.0]]])
    kept = select(logits, masks, (1, 4), min_area=0.5).labels
    assert kept.masks.tolist() == [[[False, True, False, True]]]
    stricter = select(logits, masks, (1, 4), min_area=0.5, mask_thresh=0.9).labels
    assert stricter.masks.tolist() == [[[False, False, False, True]]]


@pytest.mark.parametrize("queries", [0, 4])
def test_a_teacher_without_pseudo_labels_yields_an_empty_selection(queries):
    logits = torch.zeros(queries, CLASSES + 1)
    logits[:, -1] = 9.0
    selection = select(logits, torch.zeros(queries, 6, 8), content_size=(5, 7))
    assert len(selection.labels) == 0 and selection.labels.image_size == (5, 7)
    assert selection.mask_logits.shape == (0, 5, 7)
    assert selection.stats["dropped_no_object"] == selection.stats["queries"] == queries


@given(
    seed=st.integers(0, 10**6),
    content=st.tuples(st.floats(0.25, 5.0), st.floats(0.25, 6.0)),
    score_thresh=st.sampled_from([0.4, 0.7, 0.9, (0.3, 0.6, 0.8)]),
    broken=st.sampled_from([0.0, math.nan, math.inf, -math.inf]),
    min_area=st.sampled_from([0.0, 1.5, 5.0]),
    mask_thresh=st.sampled_from([0.2, 0.5, 0.7]),
)
def test_selection_equals_the_rules_applied_query_by_query(
    seed, content, score_thresh, broken, min_area, mask_thresh
):
    """``score_thresh``: of all classes, or of each. ``broken``: added to the class logits of one
    query, to a mask logit of another, and to the padding, which is not looked at."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(12, CLASSES + 1, generator=generator)
    logits[:, 0] += 2
    masks = 4 * torch.randn(12, 5, 6, generator=generator)
    masks += 3 * torch.randn(12, 1, 1, generator=generator)
    logits[3] += broken  # all of its row: no class has a probability then
    masks[4, 0, 0] += broken
    masks[:, math.ceil(content[0]) :, math.ceil(content[1]) :] += broken
    of_classes = score_thresh if isinstance(score_thresh, tuple) else [score_thresh] * CLASSES
    if isinstance(score_thresh, tuple):
        score_thresh = torch.tensor(score_thresh)
    thresholds = dict(score_thresh=score_thresh, min_area=min_area, mask_thresh=mask_thresh)
    selection = select(logits, masks, content, **thresholds)

    kept, stats = [], {"queries": 12, **dict.fromkeys(FATES, 0)}
    for query in range(12):
        if query == 3 and broken != 0:
            stats["dropped_non_finite"] += 1
            continue
        exponentials = [math.exp(value) for value in logits[query].tolist()]
        probabilities = [value / sum(exponentials) for value in exponentials]
        best = max(range(CLASSES + 1), key=probabilities.__getitem__)
        pixels = [
            1 / (1 + math.exp(-masks[query, y, x].item()))
            for y in range(math.ceil(content[0]))
            for x in range(math.ceil(content[1]))
        ]
        if best == CLASSES:
            stats["dropped_no_object"] += 1
        elif probabilities[best] <= of_classes[best]:
            stats["dropped_score"] += 1
        elif query == 4 and broken != 0:
            stats["dropped_non_finite"] += 1
        elif sum(pixels) <= min_area or max(pixels) <= mask_thresh:
            stats["dropped_area"] += 1
        else:
            stats["kept"] += 1
            inside = [probability > mask_thresh for probability in pixels]
            kept.append((query, best, probabilities[best], inside))

    labels = selection.labels
    assert selection.stats == stats and selection.content_size == content
    assert labels.labels.tolist() == [label for _, label, _, _ in kept]
    assert labels.scores.tolist() == pytest.approx([score for _, _, score, _ in kept], rel=1e-5)
    assert labels.masks.flatten(1).tolist() == [mask for _, _, _, mask in kept]
    height, width = labels.image_size
    assert torch.equal(
        selection.mask_logits, masks[[query for query, *_ in kept], :height, :width]
    ), "the logits are those of the kept queries"


def test_half_precision_predictions_are_compared_in_single_precision():
    logits = class_logits(ROW).bfloat16()
    masks = torch.full((1, 6, 8), -2.0).bfloat16()  # area 48 * sigmoid(-2) = 5.7216
    assert masks.sigmoid().sum().item() < 5.72, "too coarse in bfloat16"
    selection = select(logits, masks, min_area=5.72, mask_thresh=0.1)
    assert selection.mask_logits.dtype == selection.labels.scores.dtype == torch.float32
    assert selection.stats["kept"] == 1
