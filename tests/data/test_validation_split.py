import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.data.validation_split import draw_validation
from s4m_d2.errors import DatasetError, InputError

CLASSES = ("apple", "pear", "plum")
images_with_classes = st.dictionaries(
    st.integers(0, 10_000).map("{:05d}.png".format), st.sets(st.sampled_from(CLASSES)), max_size=30
)


def cats(count):
    return {f"{i}.png": {"cat"} for i in range(count)}


@given(images_with_classes, st.floats(0.05, 0.9), st.randoms(use_true_random=False))
def test_every_class_keeps_an_image_and_the_order_of_the_file_does_not_matter(
    classes_of, fraction, rng
):
    try:
        chosen = draw_validation(classes_of, fraction)
    except DatasetError:
        images = Counter(name for found in classes_of.values() for name in found)
        spare = [f for f in classes_of.values() if f and all(images[name] > 1 for name in f)]
        assert not spare
        return
    kept = [found for name, found in classes_of.items() if name not in chosen]
    assert set().union(*kept) == set().union(*classes_of.values())
    assert set(chosen) < set(classes_of)
    shuffled = list(classes_of.items())
    rng.shuffle(shuffled)
    assert draw_validation(dict(shuffled), fraction) == chosen


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(2, 0.2, 1), (7, 0.2, 1), (8, 0.2, 2), (50, 0.2, 10), (10, 0.25, 3), (10, 0.99, 9)],
)
def test_the_number_of_images_is_the_fraction_rounded(count, fraction, expected):
    assert len(draw_validation(cats(count), fraction)) == expected


def test_a_rare_class_is_in_both_parts():
    classes_of = cats(60) | {"a.png": {"cat", "dog"}, "b.png": {"dog"}}
    chosen = draw_validation(classes_of, 0.1)
    assert len(chosen) == 6
    assert len({"a.png", "b.png"} & set(chosen)) == 1


def test_for_the_classes_the_split_may_double_but_not_pass_half_of_the_images():
    rare = {f"{i}.png": {f"class {i % 15}"} for i in range(30)}  # two images of each class
    assert len(draw_validation(rare, 0.1)) == 6
    assert len(draw_validation(rare, 0.4)) == 15


def test_a_new_image_changes_at_most_one_place():
    before = draw_validation(cats(50), 0.2)
    for name in map("new {}.png".format, range(20)):
        after = draw_validation({**cats(50), name: {"cat"}}, 0.2)
        assert len(set(before) - set(after)) <= 1


def test_the_draw_is_the_same_on_every_machine():
    names = [f"{i}.png" for i in range(10)]
    random.Random(0).shuffle(names)
    assert draw_validation({name: {"cat"} for name in names}, 0.3) == ["0.png", "5.png", "9.png"]


@pytest.mark.parametrize("classes_of", [{"1.png": {"cat"}}, {"1.png": {"cat"}, "2.png": {"dog"}}])
def test_where_no_image_can_be_spared_the_ways_out_are_named(classes_of):
    with pytest.raises(DatasetError, match="--val .*VAL_FRACTION 0"):
        draw_validation(classes_of, 0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match="fraction"):
        draw_validation(cats(5), fraction)
