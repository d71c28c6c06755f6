"""Similarity maps for a clicked point: against a literal loop, and in the picture."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances
from literal_distillation import CHANNELS, RandomSam, content_of_grid, cosines, teacher_on_grid

from s4m_d2.engine.figures.figure_set import point_of, similarity_maps_at, similarity_panels
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.losses import StructuralDistillation

SIDE = 6


class Model:
    """Random mask features of an image padded to multiples of 32."""

    def __init__(self, seed):
        self.seed = seed

    def mask_features(self, batched_inputs):
        (sample,) = batched_inputs
        size = tuple(sample["image"].shape[-2:])
        padded = [32 * math.ceil(side / 32) for side in size]
        generator = torch.Generator().manual_seed(self.seed)
        self.features = torch.randn(
            1, CHANNELS, *(side // 4 for side in padded), generator=generator
        )
        self.padded = padded
        return self.features, torch.zeros(1, 3, *padded), [size]


def sample_of(height, width):
    return {"image": torch.full((3, height, width), 90, dtype=torch.uint8), "file_name": "a.png"}


@pytest.mark.parametrize("pads", [True, False], ids=["padding", "stretching"])
@pytest.mark.parametrize(
    ("size", "point"), [((40, 64), (50, 3)), ((64, 24), (0, 63)), ((32, 32), (31, 17.25))]
)
def test_maps_are_those_of_a_literal_loop_over_cells(pads, size, point):
    sam, models = RandomSam(SIDE, pads=pads), {"one": Model(1), "two": Model(2)}
    distillation = StructuralDistillation(backend=sam)
    found, extent = similarity_maps_at(sample_of(*size), point, models, distillation)

    rows, columns = content_of_grid(sam, size)
    across, down = sam.grid_scale(size)
    x, y = (point[0] + 0.5) / size[1], (point[1] + 0.5) / size[0]  # of the content
    # Read between centers of cells with content.
    place = min(x * across * SIDE, columns - 0.5), min(y * down * SIDE, rows - 0.5)
    tokens = sam.features(0, x, y)[:, :rows, :columns].detach().numpy()
    maps = {"SAM": tokens} | {
        name: teacher_on_grid(sam, model.features[0].double().numpy(), size, model.padded)
        for name, model in models.items()
    }
    assert found.keys() == maps.keys() and found["SAM"].shape == (rows, columns)
    for name, cells in maps.items():
        assert found[name].flatten().tolist() == pytest.approx(cosines(cells, place), abs=1e-5)
    assert extent == pytest.approx((down * SIDE, across * SIDE))


def test_all_maps_share_a_scale_that_none_leaves_and_the_point_is_marked():
    sam, models = RandomSam(SIDE, pads=True), {"teacher": Model(3)}
    samples, points = [sample_of(320, 640), sample_of(320, 400)], [(600, 40), (10, 300)]
    distillation = StructuralDistillation(backend=sam)
    panels = similarity_panels(samples, points, models, distillation, "RGB")
    assert panels.columns == ["image", "SAM", "teacher"]
    lowest = min(
        grid.min()
        for sample, point in zip(samples, points, strict=True)
        for grid in similarity_maps_at(sample, point, models, distillation)[0].values()
    )
    assert lowest - 0.1 <= panels.scale.low <= lowest and panels.scale.high == 1.0
    for row, (x, y), sample in zip(panels.rows, points, samples, strict=True):
        for picture in row:
            assert picture.shape == (*sample["image"].shape[1:], 3)
            near = picture[max(y - 15, 0) : y + 16, max(x - 15, 0) : x + 16].reshape(-1, 3)
            assert (near == 255).all(1).any() and (near < 60).all(1).any(), "a ring"
        plain = np.full(3, 90)
        assert (row[0][y, x] == plain).all(), "the point itself stays visible"


@pytest.mark.parametrize("point", [(-1, 5), (64, 5), (5, 40)])
def test_a_point_outside_and_a_model_without_features_are_named(point):
    distillation = StructuralDistillation(backend=RandomSam(SIDE, pads=True))
    with pytest.raises(InputError, match="a.png.* 64 x 40"):
        similarity_maps_at(sample_of(40, 64), point, {"one": Model(1)}, distillation)
    with pytest.raises(ConfigError, match="Linear"):
        similarity_maps_at(sample_of(8, 8), (1, 1), {"m": torch.nn.Linear(1, 1)}, distillation)


def test_the_point_lies_deepest_in_the_largest_instance():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 2:6, 2:6] = True
    masks[1, 10:31, 20:41] = True
    truth = Instances((40, 60), gt_masks=BitMasks(masks))
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert point_of({"image": image, "instances": truth}) == (30, 20)
    assert point_of({"image": image, "instances": truth[:0]}) == (30, 20)  # the middle
    assert point_of({"image": image, "instances": truth[:1]}) in [(3, 3), (3, 4), (4, 3), (4, 4)]
