"""enhance(): each rule by hand, its properties, and parity with the literal loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_enhancement import literal_enhance
from pycocotools import mask as mask_utils

from s4m_d2.errors import S4MError
from s4m_d2.sepl import VOID, enhance
from s4m_d2.sepl.rule import assign_masks


def row(text: str) -> np.ndarray:
    """(1, W) uint8 label of a line of digits, with . for background and v for void."""
    values = {".": 0, "v": VOID}
    return np.array([[values[c] if c in values else int(c) for c in text]], dtype=np.uint8)


def mask_rows(*texts: str) -> np.ndarray:
    """(N, 1, W) bool masks of lines of # and others."""
    return np.array([[[c == "#" for c in text]] for text in texts], dtype=bool)


def encode(masks: np.ndarray) -> list[dict]:
    """Compressed COCO RLEs of (N, H, W) bool masks."""
    return [mask_utils.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


# label, masks, enhanced label
CASES = {
    "partial activation is completed": ("..11......", ["#####....."], "11111....."),
    "a mask goes to the class it overlaps most": (
        "112222..11", ["######....", "........##"], "222222..11",
    ),
    "of equal overlaps to the smaller index": (
        "2211....22", ["####......", "........##"], "1111....22",
    ),
    "no mask": ("11.v......", [], "11.v......"),
    "whoever claims its pixels": ("222.3.222.", ["#########."], "222232222."),
    "a class that others cover comes back": (
        "211.112...",
        ["#..#..#...", "###.......", "...###....", "....###..."],  # equal in area and o_s
        "2111112...",
    ),
    # Class 3 comes back, which takes the last pixel of class 2, which comes back then.
    "and one that this covers": (
        "2233.11111111",
        [
            "###..........",
            "..###........",
            "#....##......",
            ".#.....##....",
            "...#.....##..",
            "....#......##",
        ],
        "2233111111111",
    ),
    "the smallest mask wins": ("111..222..", ["####......", "...######."], "111122222."),
    "of equally large ones that with the larger o_s": (
        "11.222....", ["####......", "..####...."], "112222....",  # 2/4 (o_p 1) and 3/4
    ),
    "then the smaller index": ("22.11.....", ["###.......", "..###....."], "22111....."),
    "void is nobody's and stays": ("vv11......", ["..###....."], "vv111....."),
    "void counts in a mask's area": ("11vvv.1111", ["#####....."], "11vvv.1111"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    label, masks, expected = CASES[case]
    masks = mask_rows(*masks).reshape(-1, 1, len(label))
    for method in (enhance, literal_enhance):
        assert method(row(label), masks).tolist() == row(expected).tolist()
    records = [{"segmentation": np.array(mask)} for mask in masks]  # of SAM's mask generator
    assert enhance(row(label), records).tolist() == row(expected).tolist()


def test_the_boundaries_of_the_shares_are_exact():
    for shared, mask_area, class_area, selected in (
        (50, 100, 10_000, False), (51, 100, 10_000, True), (17, 10**9, 20, False),
        (18, 10**9, 20, True), (85, 10**9, 100, False), (8_500_001, 10**9, 10**7, True),
    ):  # fmt: skip
        values = torch.tensor([[shared]]), torch.tensor([mask_area]), torch.tensor([class_area])
        assert assign_masks(*values)[2].tolist() == [selected]


@st.composite
def labels_and_masks(draw):
    """A label (H, W) uint8 and masks (N, H, W) bool."""
    size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.choice([0, VOID, 1, 2, 5, 254], size=draw(st.integers(1, 4)))
    shares = rng.random((draw(st.integers(0, 6)), 1, 1))
    masks = rng.random((len(shares), *size)) < shares
    return rng.choice(values, size=size).astype(np.uint8), masks


@settings(max_examples=300)
@given(
    labels_and_masks(),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 0.85, 1.0]),
    st.booleans(),
)
def test_equals_the_literal_loops(pair, o_s_thresh, o_p_thresh, keep_uncovered):
    label, masks = pair
    options = dict(o_s_thresh=o_s_thresh, o_p_thresh=o_p_thresh, keep_uncovered=keep_uncovered)
    expected = literal_enhance(label, masks, **options).tolist()
    label.flags.writeable = masks.flags.writeable = False
    enhanced = enhance(label, masks, **options)
    assert enhanced.tolist() == expected and not np.shares_memory(enhanced, label)
    assert enhance(label, encode(masks), **options).tolist() == expected


def test_masks_as_tensors_and_every_kind_of_rle():
    label, masks = row("..11...22."), mask_rows("#####.....", "......####")
    compressed = encode(masks)
    text = [{**rle, "counts": rle["counts"].decode()} for rle in compressed]
    lists = [{"size": [1, 10], "counts": counts} for counts in ([0, 5, 5], [6, 4])]
    records = [{"segmentation": rle, "area": 5} for rle in text]
    for given_masks in (torch.from_numpy(masks), compressed, text, lists, tuple(text), records):
        assert enhance(label, given_masks).tolist() == row("11111.2222").tolist()


@pytest.mark.parametrize("keep_uncovered", [False, True])
def test_runs_of_length_0_are_as_if_they_were_not_there(keep_uncovered):
    """COCO's API loses what comes after two of them at one place, or does not come to an end."""
    label = np.array([[0, 3, 3, 3, 0], [3, 3, 0, 0, 7]], dtype=np.uint8)
    counts = ([2, 0, 3, 4, 1], [2, 0, 2, 3, 3], [0, 10], [1, 1, 0, 2, 0, 1, 5])
    masks = [{"size": [2, 5], "counts": runs} for runs in counts]
    decoded = [np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(5, 2).T for runs in counts]
    options = {"o_p_thresh": 1.0, "keep_uncovered": keep_uncovered}
    expected = enhance(label, np.array(decoded), **options).tolist()
    assert enhance(label, masks, **options).tolist() == expected
    text = [mask_utils.frPyObjects(mask, 2, 5) for mask in masks]
    assert enhance(label, text, **options).tolist() == expected


TWO_MASKS = mask_rows("####......", "......####")
LABEL = row("1.........")
BAD_INPUTS = [
    ((np.zeros((1, 10)), TWO_MASKS), "float64"),
    ((LABEL[None].astype(int), TWO_MASKS), r"\(1, 1, 10\)"),
    ((LABEL.tolist(), TWO_MASKS), "list"),
    ((-LABEL.astype(int), TWO_MASKS), "from 0 on.* int64"),
    ((LABEL[:, :6], TWO_MASKS), r"\(2, 1, 10\)"),
    ((LABEL, TWO_MASKS.astype(np.uint8)), "uint8"),
    ((LABEL, TWO_MASKS[0]), r"\(1, 10\)"),
    ((LABEL[:, :6], encode(TWO_MASKS)), r"mask 0 .*\[1, 10\]"),
    ((LABEL[:, :4], [{"size": [1, 4], "counts": "1"}]), "mask 0 "),
    ((LABEL[:, :4], [{"size": [1, 4]}]), "mask 0 .*counts"),
    ((LABEL, list(TWO_MASKS.astype(np.uint8))), "mask 0 .*ndarray"),
]


def test_bad_inputs_are_named():
    for given_inputs, message in BAD_INPUTS:
        with pytest.raises(S4MError, match=message):
            enhance(*given_inputs)
    for option, value in (("o_s_thresh", 1.5), ("o_p_thresh", np.nan)):
        with pytest.raises(S4MError, match=f"{option}.*{value}"):
            enhance(LABEL, TWO_MASKS, **{option: value})
