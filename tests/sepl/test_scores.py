import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from s4m_d2.errors import InputError
from s4m_d2.sepl.scores import ConfusionMatrix, confusion

CLASSES = 4
VOID = 255


def maps(*rows):
    return np.array(rows, dtype=np.uint8)


def literal_iou(pairs, num_classes):
    """Pixel by pixel, as the definition reads."""
    hits, false_positives, misses = ([0] * num_classes for _ in range(3))
    for truth, label in pairs:
        for true, given_class in zip(truth.ravel().tolist(), label.ravel().tolist(), strict=True):
            if true == VOID:
                continue
            if true == given_class:
                hits[true] += 1
            else:
                misses[true] += 1
                if given_class != VOID:
                    false_positives[given_class] += 1
    unions = [sum(counts) for counts in zip(hits, false_positives, misses, strict=True)]
    return [h / u if u else math.nan for h, u in zip(hits, unions, strict=True)]


def scored(pairs, num_classes=CLASSES):
    matrix = ConfusionMatrix(num_classes)
    for truth, label in pairs:
        matrix.update(truth, label)
    return matrix


values = st.sampled_from([*range(CLASSES), VOID])
image_pairs = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 5)).flatmap(
        lambda size: st.tuples(*[arrays.arrays(np.uint8, size, elements=values)] * 2)
    ),
    max_size=5,
)


@pytest.mark.parametrize(
    ("truth", "label", "iou", "accuracy"),
    [
        # background 3 of 4, class 1: 1 of 2, class 2 nowhere
        ([0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [3 / 4, 1 / 2, math.nan], 4 / 5),
        # void in the truth is not scored, whatever the label says
        ([0, 1, 255, 255], [0, 1, 2, 255], [1, 1, math.nan], 1),
        # void in the label: a miss of class 1, a false positive of none
        ([0, 1, 1, 1], [0, 1, 255, 255], [1, 1 / 3, math.nan], 2 / 4),
        # a class of the label that the truth lacks has IoU 0, and so has one that was missed
        ([0, 0, 2, 2], [0, 1, 0, 0], [1 / 4, 0, 0], 1 / 4),
        # nothing to score
        ([255, 255], [0, 1], [math.nan] * 3, math.nan),
    ],
)
def test_small_cases_by_hand(truth, label, iou, accuracy):
    matrix = scored([(maps(truth), maps(label))], 3)
    np.testing.assert_allclose(matrix.iou(), iou)
    np.testing.assert_allclose(matrix.pixel_accuracy(), accuracy)
    present = [value for value in iou if not math.isnan(value)]
    expected = sum(present) / len(present) if present else math.nan
    np.testing.assert_allclose(matrix.miou(), expected)


@given(image_pairs)
def test_any_maps_score_as_a_loop_over_their_pixels_does(pairs):
    np.testing.assert_allclose(
        scored(pairs).iou(), literal_iou(pairs, CLASSES), rtol=1e-15, equal_nan=True
    )


@given(image_pairs, st.randoms(use_true_random=False), st.integers(1, 3))
def test_order_and_sharding_of_the_images_do_not_matter(pairs, random, shards):
    expected = scored(pairs).counts
    random.shuffle(pairs)
    parts = [scored(pairs[shard::shards]) for shard in range(shards)]
    total = ConfusionMatrix(CLASSES)
    for part in parts:
        total.merge(part)
    assert (total.counts == expected).all()
    before = [part.counts.copy() for part in parts]
    parts[0].merge(total)
    assert (parts[0].counts == before[0] + expected).all()
    assert (total.counts == expected).all(), "what is added stays as it is"


def test_the_data_set_is_scored_at_once_and_not_as_a_mean_over_images():
    large = np.zeros((10, 10), np.uint8), np.ones((10, 10), np.uint8)
    large[0][:, :5] = 1  # class 1: 50 of 100, background 0 of 50
    small = maps([1, 0]), maps([1, 0])  # both right
    matrix = scored([large, small], 2)
    np.testing.assert_allclose(matrix.iou(), [1 / 51, 51 / 101])
    np.testing.assert_allclose(matrix.miou(), (1 / 51 + 51 / 101) / 2)
    of_images = [confusion(*pair, 2).miou() for pair in (large, small)]
    assert of_images == [0.25, 1]
    assert abs(matrix.miou() - np.mean(of_images)) > 0.3


def test_counts_of_a_large_data_set_stay_exact():
    matrix = confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), 1)
    for _ in range(31):  # 4 pixels, doubled: more than 32 bits hold
        matrix.merge(matrix)
    matrix.update(maps([0]), maps([VOID]))
    assert matrix.counts.tolist() == [[2**33, 1]]
    assert matrix.pixel_accuracy() == 2**33 / (2**33 + 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint32])
def test_the_dtype_of_the_maps_does_not_matter(dtype):
    truth, label = maps([0, 1, 254, 255], [254, 0, 7, 3]), maps([0, 254, 254, 9], [255, 0, 7, 4])
    expected = confusion(truth, label, 255)
    assert (
        confusion(truth.astype(dtype), label.astype(dtype), 255).counts == expected.counts
    ).all()
    assert expected.counts[254, 254] == 1 and expected.counts[254, 255] == 1


WRONG = [
    (maps([0, 1]), maps([0, 1, 1]), r"size \(1, 2\).*label \(1, 3\)"),
    (maps([0, 1]), maps([0, 7]), r"label has class indices \[7\], but there are 4 classes"),
    (maps([0, 9]), maps([0, 1]), r"ground truth has class indices \[9\]"),
    (maps([255, 4]), maps([0, 0]), r"ground truth has class indices \[4\]"),
    (maps([255, 0]), maps([4, 0]), r"label has class indices \[4\]"),
    (np.array([[-1, 0]]), maps([0, 0]), "values from -1 to 0"),
    (maps([0, 0]), np.array([[0, 256]]), "values from 0 to 256"),
    (np.zeros((1, 2)), maps([0, 0]), "array of integers.*float64"),
    (np.zeros((1, 2, 3), np.uint8), maps([0, 0]), r"\(1, 2, 3\)"),
    ([[0, 1]], maps([0, 0]), "got list"),
]


@pytest.mark.parametrize(("truth", "label", "message"), WRONG)
def test_maps_that_cannot_be_compared_are_refused_and_nothing_is_counted(truth, label, message):
    matrix = scored([(maps([0, 1]), maps([1, 1]))])
    before = matrix.counts.copy()
    with pytest.raises(InputError, match=message):
        matrix.update(truth, label)
    assert (matrix.counts == before).all()


@pytest.mark.parametrize("count", [0, -1, 256])
def test_a_number_of_classes_that_cannot_be(count):
    with pytest.raises(InputError, match=rf"num_classes is {count}; expected 1..255"):
        ConfusionMatrix(count)


def test_matrices_of_different_classes_are_not_added():
    for one, other in itertools.permutations([ConfusionMatrix(3), ConfusionMatrix(4)]):
        with pytest.raises(InputError, match="3 and 4|4 and 3"):
            one.merge(other)
