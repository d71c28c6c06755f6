import doctest
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.data import stable_subset, subsets
from s4m_d2.data.subsets import listed_subset, read_split_file, stem
from s4m_d2.errors import DatasetError, InputError

NAMES = [f"city/img_{i:03d}.png" for i in range(40)]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, ["000", "009", "017", "026"]), (3, ["014", "025", "031", "037"])],
)
def test_a_split_is_the_same_on_every_machine(seed, expected):
    assert stable_subset(NAMES, 0.1, seed) == [f"city/img_{i}.png" for i in expected]


def test_doctests():
    assert doctest.testmod(subsets).failed == 0


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


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [
        (2975, 0.05, 149),
        (2975, 0.1, 298),
        (2975, 0.2, 595),
        (2975, 0.3, 893),
        (118287, 0.01, 1183),
        (3, 0.01, 1),
        (7, 1.0, 7),
    ],
)
def test_sizes_of_splits(count, fraction, expected):
    assert len(stable_subset([f"{i}.png" for i in range(count)], fraction, 0)) == expected


@pytest.mark.parametrize(
    ("names", "fraction", "error", "message"),
    [
        ([], 0.1, DatasetError, "no images"),
        (["a/1.png", "b/1.png"], 0.5, DatasetError, "1.png"),
        (["1.png"], 0, InputError, "fraction"),
        (["1.png"], 1.1, InputError, "1.1"),
    ],
)
def test_bad_subsets(names, fraction, error, message):
    with pytest.raises(error, match=message):
        stable_subset(names, fraction, 0)


def test_a_list_names_images_in_any_spelling(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "# published split\n\nx_1_leftImg8bit.png\ntrain/x/x_3.png  # with a comment\nx_4\n"
        "x_5_gtFine_instanceIds.png\n"
    )
    names = [f"root/x/x_{i}_leftImg8bit.png" for i in range(6)]
    chosen = listed_subset(names[::-1], read_split_file(str(path)), str(path))
    assert chosen == [names[1], names[3], names[4], names[5]]


def test_stems_keep_dots_that_are_no_extension():
    assert stem("a/frame.0001") == "frame.0001"
    assert stem("a/000000000009.jpg") == "000000000009"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b"# nothing\n \n", "empty"),
        (b"x_1\nx_2\ny/x_1_leftImg8bit.png\n", "more than once: x_1"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        read_split_file(str(path))
    assert str(path) in str(error.value)


def test_a_listed_name_must_exist_and_be_unambiguous():
    with pytest.raises(DatasetError, match="2 of the 3 .* my.txt .*: no, nor"):
        listed_subset(["1.png"], ["1", "nor", "no"], "my.txt")
    with pytest.raises(DatasetError, match="more than once: 1"):
        listed_subset(["a/1.png", "b/1.png"], ["1"], "my.txt")
