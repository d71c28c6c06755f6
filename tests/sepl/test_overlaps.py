"""Overlap matrices against counting pixel by pixel, and what assignment makes of them."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from s4m_d2 import structures as structures_module
from s4m_d2.errors import InputError
from s4m_d2.sepl.overlaps import label_overlaps, rle_overlaps
from s4m_d2.sepl.selection import UNASSIGNED, assign_masks
from s4m_d2.structures import dense_overlaps


def counted(masks: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    return [[int((mask & segment).sum()) for segment in segments] for mask in masks]


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (40, 1), (17, 23)])
@pytest.mark.parametrize("num_masks", [0, 1, 5])
@pytest.mark.parametrize("classes", [[], [3], [1, 2, 3, 7, 300]])
def test_matrices_of_a_label(size, num_masks, classes):
    rng = np.random.default_rng(num_masks)
    label = rng.choice([0, 1, 2, 3, 7, 255, 300, 301], size=size)
    masks = rng.random((num_masks, *size)) < 0.4
    classes = np.array(classes, dtype=label.dtype)
    segments = label == classes[:, None, None]
    encoded = mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    matrices = (
        label_overlaps(masks, label, classes),
        rle_overlaps(encoded, label, classes),
        dense_overlaps(torch.from_numpy(masks), torch.from_numpy(segments)).numpy(),
    )
    for matrix in matrices:
        assert matrix.shape == (num_masks, len(classes))
        assert matrix.dtype == np.int64
        assert matrix.tolist() == counted(masks, segments)


@pytest.mark.parametrize("chunk_values", [1, 10, 64, 1000])
def test_instances_may_overlap_and_come_in_chunks(chunk_values, monkeypatch):
    monkeypatch.setattr(structures_module, "CHUNK_VALUES", chunk_values)
    rng = np.random.default_rng(0)
    masks, segments = rng.random((4, 9, 11)) < 0.5, rng.random((3, 9, 11)) < 0.7
    matrix = dense_overlaps(torch.from_numpy(masks), torch.from_numpy(segments))
    assert matrix.tolist() == counted(masks, segments)


def test_counts_are_exact_under_autocast():
    """In bfloat16 257 and 256 are the same."""
    masks = torch.ones(1, 1, 257, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense_overlaps(masks, masks).tolist() == [[257]]


def test_counts_are_exact_beyond_what_float32_counts_to():
    masks = torch.ones(1, 1, 2**24 + 3, dtype=torch.bool)
    assert dense_overlaps(masks, masks).tolist() == [[2**24 + 3]]


def assign(overlaps, mask_areas, segment_areas, **options):
    tensors = [torch.tensor(values) for values in (overlaps, mask_areas, segment_areas)]
    return assign_masks(*tensors, **options)


def test_each_mask_goes_to_the_segment_it_shares_most_with():
    found = assign([[2, 5, 5], [0, 0, 0], [1, 0, 0]], [10, 4, 2], [20, 5, 6])
    assert found.segments.tolist() == [1, UNASSIGNED, 0]
    assert found.o_s.tolist() == [5 / 10, 0, 1 / 2]
    assert found.o_p.tolist() == [5 / 5, 0, 1 / 20]
    assert found.selected.tolist() == [True, False, False]


def test_no_segments_and_no_masks():
    found = assign_masks(
        torch.zeros(3, 0, dtype=torch.long), torch.ones(3).long(), torch.zeros(0).long()
    )
    assert found.segments.tolist() == [UNASSIGNED] * 3
    assert found.selected.tolist() == [False] * 3
    found = assign_masks(
        torch.zeros(0, 2, dtype=torch.long), torch.zeros(0).long(), torch.ones(2).long()
    )
    assert len(found.segments) == len(found.selected) == 0


@pytest.mark.parametrize(("shared", "selected"), [(50, False), (51, True)])
def test_the_boundary_of_o_s(shared, selected):
    found = assign([[shared]], [100], [10_000])
    assert found.selected.tolist() == [selected]


@pytest.mark.parametrize(
    ("shared", "area", "selected"),
    [(17, 20, False), (18, 20, True), (85, 100, False), (86, 100, True), (8_500_001, 10**7, True)],
)
def test_the_boundary_of_o_p(shared, area, selected):
    found = assign([[shared]], [10**9], [area])
    assert found.selected.tolist() == [selected]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_thresholds_are_shares(value):
    with pytest.raises(InputError, match=f"o_p_thresh is {value}"):
        assign([[1]], [1], [1], o_p_thresh=value)
