"""Choosing images: shares that a seed draws, lists, validation splits."""

import doctest
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.data import segmentations, splits, stable_subset
from s4m_d2.data.splits import draw_validation, listed_subset, read_split_file
from s4m_d2.errors import ConfigError, DatasetError, InputError

NAMES = [f"city/img_{i:03d}.png" for i in range(40)]


def test_a_draw_is_the_same_on_every_machine():
    for seed, expected in ((0, "000 009 017 026"), (3, "014 025 031 037")):
        assert stable_subset(NAMES, 0.1, seed) == [f"city/img_{i}.png" for i in expected.split()]
    assert draw_validation(cats(10), 0.3) == ["0.png", "5.png", "9.png"]


@given(seed=st.integers(-(2**70), 2**70), shuffle=st.randoms(use_true_random=False))
def test_a_split_depends_on_base_names_alone(seed, shuffle: random.Random):
    moved = [name.replace("city", "/elsewhere") for name in NAMES]
    shuffle.shuffle(moved)
    expected = [name.replace("city", "/elsewhere") for name in stable_subset(NAMES, 0.3, seed)]
    assert stable_subset(moved, 0.3, seed) == expected


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=2).map(sorted), st.integers(0, 1000))
def test_smaller_fractions_are_part_of_larger_ones(fractions, seed):
    small, large = (stable_subset(NAMES, fraction, seed) for fraction in fractions)
    assert set(small) <= set(large)


def test_the_number_of_images_is_the_fraction_rounded():
    for count, fraction, expected in (
        (2975, 0.05, 149),
        (2975, 0.1, 298),
        (2975, 0.3, 893),
        (3, 0.01, 1),
        (7, 1.0, 7),
    ):
        assert len(stable_subset([f"{i}.png" for i in range(count)], fraction, 0)) == expected
    for count, fraction, expected in ((2, 0.2, 1), (8, 0.2, 2), (10, 0.25, 3), (10, 0.99, 9)):
        assert len(draw_validation(cats(count), fraction)) == expected


def test_bad_subsets():
    for names, fraction, error, message in (
        ([], 0.1, DatasetError, "no images"),
        (["a/1.png", "b/1.png"], 0.5, DatasetError, "1.png"),
        (["1.png"], 0, InputError, "fraction"),
        (["1.png"], 1.1, InputError, "1.1"),
    ):
        with pytest.raises(error, match=message):
            stable_subset(names, fraction, 0)


def test_a_list_names_images_in_any_spelling(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "x_1_leftImg8bit.png\n# published split\n\ntrain/x/x_3.png  # with a comment\nx_4\n"
        "x_5_gtFine_instanceIds.png\nframe.0001\n9\n",
        encoding="utf-8-sig",  # as Windows' Notepad does
    )
    names = [f"root/x/x_{i}_leftImg8bit.png" for i in range(6)] + ["y/9.jpg", "y/frame.0001"]
    chosen = listed_subset(names[::-1], read_split_file(str(path)), str(path))
    assert chosen == [names[i] for i in (1, 3, 4, 5, 6, 7)]


def test_bad_lists(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(DatasetError, match=r"list\.txt"):
        read_split_file(str(path))
    repeated = b"x_1\nx_2\ny/x_1_leftImg8bit.png\n"
    for content, named in ((b"# no\n \n", ""), (repeated, "x_1"), (b"\xff\xfe\x00", "")):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=f"list.txt.*{named}"):
            read_split_file(str(path))
    for names, listed, named in (
        (["1.png"], ["1", "nor", "no"], "2 of the 3 .*no, nor"),
        (["a/1.png", "b/1.png"], ["1"], "1"),
    ):
        with pytest.raises(DatasetError, match=named):
            listed_subset(names, listed, "my.txt")


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


def test_a_rare_class_is_in_both_parts_for_which_the_split_may_double_up_to_half():
    classes_of = cats(60) | {"a.png": {"cat", "dog"}, "b.png": {"dog"}}
    chosen = draw_validation(classes_of, 0.1)
    assert len(chosen) == 6
    assert len({"a.png", "b.png"} & set(chosen)) == 1
    rare = {f"{i}.png": {f"class {i % 15}"} for i in range(30)}  # two images of each class
    assert len(draw_validation(rare, 0.1)) == 6
    assert len(draw_validation(rare, 0.4)) == 15


def test_where_no_image_can_be_spared_the_ways_out_are_named():
    with pytest.raises(DatasetError, match="--val.*VAL_FRACTION 0"):
        draw_validation({"1.png": {"cat"}, "2.png": {"dog"}}, 0.5)
    with pytest.raises(ConfigError):
        draw_validation(cats(5), 1.0)


def test_doctests():
    for module in (segmentations, splits):
        assert doctest.testmod(module).failed == 0
