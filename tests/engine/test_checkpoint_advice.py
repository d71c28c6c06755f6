"""Files of other architectures: the first mismatches, and the keys to change."""

import logging
import re

import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from .checkpoint_files import same, save
from .published_files import backbone, mask2former, numpy

LAYERS = {
    "decoder": r"predictor\.transformer_\w+_layers\.[78]\.",
    "encoder": r"pixel_decoder\.transformer\.encoder\.layers\.[2345]\.",
    "backbone": r"backbone\.res4\.[345]\.",
}


def without(part):
    """A renaming that leaves out the last layers of a part."""
    return lambda name: None if re.search(LAYERS[part], name) else name


SIZES = {
    "classes": ({"class_embed": 7, "empty_weight": 7}, "MODEL.SEM_SEG_HEAD.NUM_CLASSES 6"),
    "queries": ({"query_feat": 5, "query_embed": 5}, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 5"),
    "feed-forward": ({"ffn_layers.0.linear1.weight": 6}, "MODEL.MASK_FORMER.DIM_FEEDFORWARD 6"),
    "mask features": ({"pixel_decoder.mask_features.weight": 6}, "MODEL.SEM_SEG_HEAD.MASK_DIM 6"),
}


@pytest.mark.parametrize("change", SIZES)
def test_other_sizes_name_the_first_mismatch_and_the_key_that_fits(tmp_path, change):
    sizes, advice = SIZES[change]
    path = save(tmp_path, {"model": mask2former(1, **sizes).state_dict()})
    loaded, start = mask2former(2), mask2former(2)
    with pytest.raises(WeightsError) as caught:
        S4MCheckpointer(loaded).load(path, require=True)
    assert f"To fit the file, set {advice};" in str(caught.value)
    part, size = next(iter(sizes.items()))
    assert re.search(rf"{re.escape(part)}\S* is \({size},.* in the file", str(caught.value))
    assert same(loaded, start)


def test_heads_of_other_classes_start_anew_in_training_and_that_is_said(tmp_path, caplog):
    saved, loaded, start = mask2former(1, class_embed=7), mask2former(2), mask2former(2)
    with caplog.at_level(logging.WARNING):
        S4MCheckpointer(loaded).load(save(tmp_path, {"model": saved.state_dict()}))
    name = "sem_seg_head.predictor.class_embed.weight"
    assert f"{name} is (7, 12) in the file and (9, 12) in the model" in caplog.text
    assert torch.equal(loaded.state_dict()[name], start.state_dict()[name])
    assert same(loaded, saved, "backbone.")


@pytest.mark.parametrize(
    ("part", "in_file", "in_model"),
    [
        ("decoder", "MODEL.MASK_FORMER.DEC_LAYERS 10", "MODEL.MASK_FORMER.DEC_LAYERS 8"),
        (
            "encoder",
            "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS 6",
            "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS 2",
        ),
    ],
)
def test_other_numbers_of_layers_are_refused_for_evaluation_either_way(
    tmp_path, caplog, part, in_file, in_model
):
    whole, short = mask2former(1), mask2former(2, without(part))
    path = save(tmp_path, {"model": whole.state_dict()}, "whole.pth")
    with pytest.raises(WeightsError, match=f"more layers than the model.*set {in_file};"):
        S4MCheckpointer(short).load(path, require=True)
    with caplog.at_level(logging.WARNING):
        S4MCheckpointer(short).load(path)
    assert "of the file unused" in caplog.text

    path = save(tmp_path, {"model": short.state_dict()}, "short.pth")
    with pytest.raises(WeightsError, match=f"lack .*set {in_model};"):
        S4MCheckpointer(whole).load(path, require=True)


def test_a_deeper_backbone_is_refused_although_all_its_shapes_fit(tmp_path):
    content = {"model": numpy(backbone(mask2former(1))), "matching_heuristics": True}
    path = save(tmp_path, content, "R-101.pkl")
    loaded, start = (mask2former(2, without("backbone")) for _ in range(2))
    with pytest.raises(WeightsError, match=r"res4\.3\.conv1\.weight.*MODEL\.RESNETS\.DEPTH"):
        S4MCheckpointer(loaded).load(path)
    assert same(loaded, start)


def test_a_weight_that_the_config_sets_otherwise_is_reported(tmp_path, caplog):
    saved, loaded = mask2former(1), mask2former(2)
    checkpointer = S4MCheckpointer(loaded)
    with caplog.at_level(logging.WARNING):
        checkpointer.load(save(tmp_path, {"model": saved.state_dict()}), require=True)
    assert checkpointer.last_report.overridden == ("criterion.empty_weight",)
    assert "criterion.empty_weight (MODEL.MASK_FORMER.NO_OBJECT_WEIGHT)" in caplog.text


def test_weights_of_an_extra_head_are_reported_but_do_no_harm(tmp_path, caplog):
    saved, loaded = mask2former(1), mask2former(1)
    state = saved.state_dict() | {"sem_seg_head.extra.weight": torch.ones(2)}
    with caplog.at_level(logging.WARNING):
        S4MCheckpointer(loaded).load(save(tmp_path, {"model": state}), require=True)
    assert "1 of the file unused (sem_seg_head.extra.weight)" in caplog.text


def test_every_name_that_was_not_loaded_is_in_the_detailed_log(tmp_path, caplog):
    path = save(tmp_path, backbone(mask2former(1)) | {"fc.weight": torch.ones(1)}, "b.pth")
    checkpointer = S4MCheckpointer(mask2former(2))
    with caplog.at_level(logging.DEBUG):
        checkpointer.load(f"{path}?matching_heuristics=True")
    assert len(checkpointer.last_report.missing) > 200
    assert all(name in caplog.text for name in checkpointer.last_report.missing)
