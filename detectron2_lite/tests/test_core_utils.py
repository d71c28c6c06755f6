"""Point sampling, logging, seeding and paths."""

import random

import numpy as np
import pytest
import torch
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table, setup_logger


def test_points_at_pixel_centers_read_the_pixels():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    y, x = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    centers = torch.stack(((x + 0.5) / 3, (y + 0.5) / 2), dim=-1)[None]
    torch.testing.assert_close(point_sample(image, centers, align_corners=False), image)
    listed = point_sample(image, centers.view(1, 6, 2), align_corners=False)
    torch.testing.assert_close(listed, image.view(1, 1, 6))


def test_points_between_pixels_mix_them_and_outside_lies_zero():
    image = torch.tensor([[[[0.0, 4.0]]]])
    points = torch.tensor([[[0.5, 0.5], [0.375, 0.5], [3.0, 0.5]]])
    got = point_sample(image, points, align_corners=False)
    torch.testing.assert_close(got, torch.tensor([[[2.0, 1.0, 0.0]]]))


def test_uncertain_points_gather_where_a_mask_changes():
    logits = torch.where(torch.arange(16) < 8, -5.0, 5.0).expand(2, 1, 16, 16).contiguous()
    torch.manual_seed(0)
    points = get_uncertain_point_coords_with_randomness(
        logits, lambda x: -x.abs(), 100, oversample_ratio=16, importance_sample_ratio=0.75
    )
    assert points.shape == (2, 100, 2)
    assert (points >= 0).all() and (points <= 1).all()
    doubtful = point_sample(logits, points, align_corners=False)[:, 0].abs() < 4.9
    assert doubtful[:, :75].all()
    assert doubtful[:, 75:].float().mean() < 0.5


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_points_may_be_uncertain_or_random(ratio):
    points = get_uncertain_point_coords_with_randomness(
        torch.randn(3, 1, 4, 4), lambda x: -x.abs(), 7, 3.0, ratio
    )
    assert points.shape == (3, 7, 2)
    with pytest.raises(AssertionError):
        get_uncertain_point_coords_with_randomness(torch.ones(1, 1, 4, 4), torch.abs, 7, 0.5, ratio)


def test_one_seed_sets_every_generator():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    seed_all_rng(3)
    first = draw()
    assert draw() != first
    seed_all_rng(3)
    assert draw() == first
    seed_all_rng()
    assert draw() != first


def test_logs_go_to_the_files_they_are_named(tmp_path):
    for number, (output, written) in enumerate([("run", "run/log.txt"), ("a.log", "a.log")]):
        logger = setup_logger(str(tmp_path / output), name=f"core_test_{number}")
        again = setup_logger(str(tmp_path / output), name=f"core_test_{number}")
        assert logger is again
        logger.getChild("child").info("the %s message", "first")
        for handler in logger.handlers:
            handler.flush()
        text = (tmp_path / written).read_text()
        assert text.count("the first message") == 1
        assert f"core_test_{number}.child INFO" in text


def test_other_ranks_write_their_own_file_and_nothing_to_stdout(tmp_path, capsys):
    logger = setup_logger(str(tmp_path), distributed_rank=2, name="core_test_rank")
    logger.warning("from rank 2")
    assert "from rank 2" not in capsys.readouterr().out
    assert (tmp_path / "log.txt.rank2").exists()


def test_rank_0_marks_warnings_on_stdout(capsys):
    logger = setup_logger(name="core_test_out", color=True)
    logger.getChild("x").warning("careful")
    out = capsys.readouterr().out
    assert "core_test_out.x" in out and "WARNING" in out and "careful" in out


def test_a_small_table_has_one_row():
    header, rule, row = create_small_table({"AP": 12.34567, "AP50": 1.0}).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["AP", "AP50"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["12.346", "1.000"]


def test_the_model_zoos_addresses_are_known():
    handler = PathManager._path_handlers["detectron2://"]
    assert handler.S3_DETECTRON2_PREFIX == "https://dl.fbaipublicfiles.com/detectron2/"
    assert "http://" in PathManager._path_handlers
