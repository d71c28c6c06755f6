"""enhance(): each rule by hand, its properties, and parity with the literal loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_enhancement import literal_enhance
from pycocotools import mask as mask_utils

from s4m_d2.errors import InputError
from s4m_d2.sepl import VOID, enhance, merge_masks, select_masks


def row(text: str) -> np.ndarray:
    """(1, W) uint8 label of a line of digits, with . for background and v for void."""
    values = {".": 0, "v": VOID}
    return np.array([[values[c] if c in values else int(c) for c in text]], dtype=np.uint8)


def mask_rows(*texts: str) -> np.ndarray:
    """(N, 1, W) bool masks of lines of # and others."""
    return np.array([[[c == "#" for c in text]] for text in texts])


def encode(masks: np.ndarray) -> list[dict]:
    """Compressed COCO RLEs of (N, H, W) bool masks."""
    return [mask_utils.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


def uncompressed(mask: np.ndarray) -> dict:
    """COCO's list of run lengths of an (H, W) bool mask."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=flat[-1] ^ True))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0).tolist()}


# label, masks, enhanced label
CASES = {
    "partial activation is completed": ("..11......", ["#####....."], "11111....."),
    "false activation is dropped": ("111111....", ["####......"], "1111......"),
    # 2 of the mask's 4 pixels are not more than half, 3 of 5 are; o_p is 2/6 and 3/7.
    "o_s of one half does not select": ("11....1111", ["####......"], "11....1111"),
    "o_s above one half selects": ("111...1111", ["#####....."], "11111....."),
    # 17 of the class's 20 pixels are not more than 0.85, 18 are; o_s is 17/47 and 18/48.
    "o_p of 0.85 does not select": (
        "1" * 20 + "." * 30,
        ["." * 3 + "#" * 47],
        "1" * 20 + "." * 30,
    ),
    "o_p above 0.85 selects": ("1" * 20 + "." * 30, [".." + "#" * 48], ".." + "1" * 48),
    "a mask goes to the class it overlaps most": (
        "112222..11",
        ["######....", "........##"],
        "222222..11",
    ),
    "of equal overlaps to the smaller index": (
        "2211....22",
        ["####......", "........##"],
        "1111....22",
    ),
    "background does not compete": ("1.........", ["##########"], "1111111111"),
    "a mask without a class's pixel does nothing": ("11........", ["....####.."], "11........"),
    "an empty mask does nothing": ("11........", [".........."], "11........"),
    "masks of a class are united": ("11..11....", ["###.......", "...###...."], "111111...."),
    "a class without a selected mask stays": ("1..2222...", ["...###...."], "1..222...."),
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
    "the smallest mask wins": (
        "111..222..",
        ["####......", "...######."],
        "111122222.",
    ),
    "of equally large ones that with the larger o_s": (
        "11.222....",
        ["####......", "..####...."],  # 2/4 (o_p 1) and 3/4
        "112222....",
    ),
    "then the smaller index": ("22.11.....", ["###.......", "..###....."], "22111....."),
    "void is nobody's and stays": ("vv11......", ["..###....."], "vv111....."),
    "void in a selected mask is redrawn": ("v111......", ["#####....."], "11111....."),
    "void counts in a mask's area": ("11vvv.1111", ["#####....."], "11vvv.1111"),
    "no class, but void": ("vv........", ["######...."], "vv........"),
    "no class at all": ("..........", ["######...."], ".........."),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    label, masks, expected = CASES[case]
    label, masks = row(label), mask_rows(*masks)
    expected = row(expected)
    assert enhance(label, masks).tolist() == expected.tolist()
    assert enhance(label, encode(masks)).tolist() == expected.tolist()
    assert literal_enhance(label, masks).tolist() == expected.tolist()


def test_uncovered_pixels_can_be_kept():
    label, masks = row("111.11.v.2"), mask_rows("####......", ".......###")
    assert enhance(label, masks).tolist() == row("1111...222").tolist()
    kept = enhance(label, masks, keep_uncovered=True)
    assert kept.tolist() == row("111111.222").tolist()


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        # Class 1 has 4 pixels. Of the first mask's 3, 2 are its (o_s 2/3, o_p 2/4), of the
        # second's 9 all 4 are (o_s 4/9, o_p 1).
        ({}, "111111111."),
        ({"o_p_thresh": 1.0}, "111......."),
        ({"o_s_thresh": 2 / 3}, "111111111."),
        ({"o_s_thresh": 1.0, "o_p_thresh": 1.0}, "11..11...."),
        ({"o_s_thresh": 0.4, "o_p_thresh": 1.0}, "111111111."),
    ],
)
def test_thresholds(thresholds, expected):
    masks = mask_rows("###.......", "#########.")
    assert enhance(row("11..11...."), masks, **thresholds).tolist() == row(expected).tolist()


def labels_and_masks(max_side: int = 9, max_masks: int = 6):
    """Pairs of a label (H, W) uint8 and masks (N, H, W) bool."""

    @st.composite
    def draw_pair(draw):
        height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        values = rng.choice([0, VOID, 1, 2, 5, 254], size=draw(st.integers(1, 4)))
        label = rng.choice(values, size=(height, width)).astype(np.uint8)
        shares = rng.random((draw(st.integers(0, max_masks)), 1, 1))
        masks = rng.random((len(shares), height, width)) < shares
        return label, masks

    return draw_pair()


def classes_of(label: np.ndarray) -> set[int]:
    return set(np.unique(label).tolist()) - {0, VOID}


@settings(max_examples=300)
@given(
    labels_and_masks(),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 0.85, 1.0]),
    st.booleans(),
)
def test_equals_the_literal_loops(pair, o_s_thresh, o_p_thresh, keep_uncovered):
    label, masks = pair
    options = {
        "o_s_thresh": o_s_thresh,
        "o_p_thresh": o_p_thresh,
        "keep_uncovered": keep_uncovered,
    }
    expected = literal_enhance(label, masks, **options).tolist()
    assert enhance(label, masks, **options).tolist() == expected
    assert enhance(label, encode(masks), **options).tolist() == expected


@given(labels_and_masks())
def test_classes_stay_the_same(pair):
    label, masks = pair
    enhanced = enhance(label, masks)
    assert classes_of(enhanced) == classes_of(label)
    assert set(np.unique(enhanced)) <= set(np.unique(label)) | {0}
    assert (enhanced == VOID)[label != VOID].sum() == 0


@given(labels_and_masks(), st.randoms(use_true_random=False))
def test_the_order_of_masks_does_not_matter(pair, random):
    label, masks = pair
    order = list(range(len(masks)))
    random.shuffle(order)
    assert (enhance(label, masks[order]) == enhance(label, masks)).all()


@given(labels_and_masks())
def test_a_mask_given_twice_counts_once(pair):
    label, masks = pair
    assert (enhance(label, np.concatenate([masks, masks])) == enhance(label, masks)).all()


@given(labels_and_masks(max_masks=0))
def test_without_masks_the_label_comes_back(pair):
    label, masks = pair
    assert (enhance(label, masks) == label).all()
    assert (enhance(label, []) == label).all()


@given(labels_and_masks(max_masks=0), st.integers(0, 2**32 - 1))
def test_masks_of_the_classes_or_of_parts_of_them_leave_the_label(pair, seed):
    label, _ = pair
    parts = np.random.default_rng(seed).integers(0, 3, label.shape)
    kinds = [(label == c) & (parts == part) for c in classes_of(label) for part in range(3)]
    masks = np.array(kinds, dtype=bool).reshape(-1, *label.shape)
    assert (enhance(label, masks) == label).all()


@given(labels_and_masks())
def test_transposed_inputs_give_the_transposed_label(pair):
    label, masks = pair
    transposed = enhance(label.T, masks.transpose(0, 2, 1))
    assert (transposed == enhance(label, masks).T).all()


@given(labels_and_masks())
def test_inputs_are_left_as_they_are(pair):
    label, masks = pair
    kept = label.copy(), masks.copy()
    enhanced = enhance(label, masks)
    assert (label == kept[0]).all() and (masks == kept[1]).all()
    assert not np.shares_memory(enhanced, label)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_the_dtype_stays(dtype):
    enhanced = enhance(row("..11...v..").astype(dtype), mask_rows("#####....."))
    assert enhanced.dtype == dtype
    assert enhanced.tolist() == row("11111..v..").tolist()


def test_class_indices_above_those_of_8_bits():
    label = row("..11......").astype(np.int32) * 1000
    assert enhance(label, mask_rows("#####.....")).tolist() == [[1000] * 5 + [0] * 5]


def test_masks_as_tensors_and_every_kind_of_rle():
    label, masks = row("..11...22."), mask_rows("#####.....", "......####")
    expected = row("11111.2222").tolist()
    compressed = encode(masks)
    text = [{**rle, "counts": rle["counts"].decode()} for rle in compressed]
    lists = [uncompressed(mask) for mask in masks]
    for given_masks in (torch.from_numpy(masks), compressed, text, lists, tuple(text)):
        assert enhance(label, given_masks).tolist() == expected
    read_only = masks.copy()
    read_only.flags.writeable = False
    assert enhance(label, read_only).tolist() == expected


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


def test_the_selection_tells_what_happened_to_each_mask():
    label = row("111.2222..")
    selection = select_masks(label, mask_rows("####......", "#####.....", "........##"))
    assert selection.classes.tolist() == [1, 2]
    assert selection.mask_classes.tolist() == [1, 1, 0]
    assert selection.areas.tolist() == [4, 5, 2]
    assert selection.o_s.tolist() == [3 / 4, 3 / 5, 0]
    assert selection.o_p.tolist() == [1, 1, 0]
    assert selection.selected.tolist() == [True, True, False]
    assert selection.unmatched_classes.tolist() == [2]


TWO_MASKS = mask_rows("####......", "......####")
BAD_INPUTS = {
    "label of floats": (np.zeros((1, 10)), TWO_MASKS, {}, "must hold integers, got float64"),
    "label of three axes": (np.zeros((1, 1, 10), int), TWO_MASKS, {}, r"\(H, W\) array"),
    "label as a list": ([[0] * 10], TWO_MASKS, {}, "got list of shape None"),
    "negative class": (-row("1........."), TWO_MASKS, {}, "class index"),
    "class beyond the count": (
        row("1..7......"),
        TWO_MASKS,
        {"num_classes": 7},
        r"\[7\], but .* 7",
    ),
    "masks of another size": (row("1....."), TWO_MASKS, {}, r"\(N, 1, 6\) bool .* \(2, 1, 10\)"),
    "masks of numbers": (row("1........."), TWO_MASKS.astype(np.uint8), {}, "got .* uint8"),
    "one mask without its axis": (row("1........."), TWO_MASKS[0], {}, r"got \(1, 10\) bool"),
    "RLE of another size": (row("1....."), encode(TWO_MASKS), {}, r"mask 0: .*\(1, 10\)"),
    "cut RLE": (row("1..."), [{"size": [1, 4], "counts": "1"}], {}, "mask 0: .*sum to 1"),
    "RLE without counts": (row("1..."), [{"size": [1, 4]}], {}, "mask 0: .*counts"),
    "a list of arrays": (row("1........."), list(TWO_MASKS), {}, "mask 0 is of type ndarray"),
    "threshold above 1": (row("1........."), TWO_MASKS, {"o_s_thresh": 1.5}, "o_s_thresh is 1.5"),
    "threshold nan": (row("1........."), TWO_MASKS, {"o_p_thresh": np.nan}, "o_p_thresh is nan"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_named(case):
    label, masks, options, message = BAD_INPUTS[case]
    if case == "negative class":
        label = label.astype(np.int8)
    with pytest.raises(InputError, match=message):
        enhance(label, masks, **options)


def test_masks_must_be_those_of_the_selection():
    label = row("111.2222..")
    selection = select_masks(label, TWO_MASKS)
    with pytest.raises(InputError, match="1 masks with a selection from 2"):
        merge_masks(label, TWO_MASKS[:1], selection)


@given(labels_and_masks(), st.integers(2, 6))
def test_class_indices_within_the_count_pass(pair, num_classes):
    label, masks = pair
    if max(classes_of(label), default=0) >= num_classes:
        with pytest.raises(InputError, match="class indices"):
            enhance(label, masks, num_classes=num_classes)
    else:
        assert (enhance(label, masks, num_classes=num_classes) == enhance(label, masks)).all()
