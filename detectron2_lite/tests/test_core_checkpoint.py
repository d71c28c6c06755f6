"""Checkpoints: round trips, resuming, name matching, refusals."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.checkpoint.c2_model_loading import (
    align_and_update_state_dicts,
    convert_c2_detectron_names,
)
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.conv1 = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)
        self.register_buffer("pixel_mean", torch.zeros(3))


def names(state):
    return {name: float(value.flatten()[0]) for name, value in state.items()}


def test_everything_saved_comes_back(tmp_path):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0", iteration=7)

    other = Toy()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    checkpointer = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    assert checkpointer.has_checkpoint()
    extra = checkpointer.resume_or_load("", resume=True)
    assert extra["iteration"] == 7
    assert other_optimizer.param_groups[0]["lr"] == 0.25
    for name, value in model.state_dict().items():
        assert value.equal(other.state_dict()[name])


def test_loading_without_resuming_takes_the_model_only(tmp_path):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0")
    other = Toy()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    checkpointer = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    checkpointer.resume_or_load(str(tmp_path / "model_0.pth"), resume=False)
    assert other_optimizer.param_groups[0]["lr"] == 1.0
    assert other.head.weight.equal(model.head.weight)


def test_without_a_path_nothing_is_loaded(tmp_path):
    checkpointer = DetectionCheckpointer(Toy(), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True) == {}
    with pytest.raises(AssertionError, match="missing.pth"):
        checkpointer.load(str(tmp_path / "missing.pth"))


def test_a_process_that_is_told_not_to_save_does_not(tmp_path):
    DetectionCheckpointer(Toy(), str(tmp_path), save_to_disk=False).save("model_0")
    assert list(tmp_path.iterdir()) == []


def test_periodic_saving_tags_the_last_file(tmp_path):
    checkpointer = DetectionCheckpointer(Toy(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=2, max_iter=5)
    for iteration in range(5):
        periodic.step(iteration)
    files = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert files == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_final.pth")


def test_bare_and_wrapped_state_dicts_load(tmp_path):
    state = {f"module.{k}": torch.full_like(v, 5.0) for k, v in Toy().state_dict().items()}
    torch.save(state, tmp_path / "bare.pth")
    model = Toy()
    DetectionCheckpointer(model).load(str(tmp_path / "bare.pth"))
    assert set(names(model.state_dict()).values()) == {5.0}


def test_suffixes_are_matched_only_on_request(tmp_path):
    torch.save({"conv1.bias": torch.full((3,), 4.0)}, tmp_path / "backbone.pth")
    model = Toy()
    before = model.backbone.conv1.bias.clone()
    DetectionCheckpointer(model).load(str(tmp_path / "backbone.pth"))
    assert model.backbone.conv1.bias.equal(before)
    DetectionCheckpointer(model).load(f"{tmp_path}/backbone.pth?matching_heuristics=True")
    assert model.backbone.conv1.bias.tolist() == [4.0] * 3
    with pytest.raises(ValueError, match="no_such_query"):
        DetectionCheckpointer(model).load(f"{tmp_path}/backbone.pth?no_such_query=1")


def test_statistics_of_the_input_may_be_absent(tmp_path):
    state = Toy().state_dict()
    del state["pixel_mean"], state["head.bias"]
    checkpointer = DetectionCheckpointer(Toy())
    assert checkpointer._load_model({"model": state}).missing_keys == ["head.bias"]


def test_the_longest_suffix_of_whole_words_wins():
    model = {name: torch.zeros(1) for name in ["m.res2.conv1.w", "m.conv1.w", "m.xconv1.w", "m.b"]}
    file = {name: torch.full((1,), i) for i, name in enumerate(["res2.conv1.w", "conv1.w", "z"])}
    aligned = align_and_update_state_dicts(model, file, c2_conversion=False)
    assert names(aligned) == {"m.res2.conv1.w": 0, "m.conv1.w": 1, "z": 2}


def test_one_tensor_cannot_fill_two_places():
    model = {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}
    with pytest.raises(ValueError, match="multiple keys"):
        align_and_update_state_dicts(model, {"w": torch.zeros(1)}, c2_conversion=False)


def test_a_match_of_another_shape_is_left_out():
    model = {"m.a": torch.zeros(2), "m.b": torch.zeros(1)}
    file = {"a": torch.zeros(3), "b": torch.zeros(1)}
    aligned = align_and_update_state_dicts(model, file, c2_conversion=False)
    assert "m.a" not in aligned
    assert "m.b" in aligned


def test_weights_that_match_nothing_keep_their_names():
    aligned = align_and_update_state_dicts({"m.a": torch.zeros(1)}, {"q": torch.zeros(1)}, False)
    assert list(aligned) == ["q"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("conv1_w", "stem.conv1.weight"),
        ("conv1_b", "stem.conv1.bias"),
        ("res_conv1_bn_s", "stem.conv1.norm.weight"),
        ("res_conv1_bn_b", "stem.conv1.norm.bias"),
        ("res2_0_branch1_w", "res2.0.shortcut.weight"),
        ("res2_0_branch1_bn_b", "res2.0.shortcut.norm.bias"),
        ("res3_1_branch2a_w", "res3.1.conv1.weight"),
        ("res4_22_branch2b_bn_s", "res4.22.conv2.norm.weight"),
        ("res5_2_branch2c_bn_riv", "res5.2.conv3.norm.running_var"),
        ("res5_2_branch2c_bn_rm", "res5.2.conv3.norm.running_mean"),
        ("res5_2_branch2c_bn_gamma", "res5.2.conv3.norm.weight"),
        ("res5_2_branch2c_bn_beta", "res5.2.conv3.norm.bias"),
        ("res5_2_branch2c_bn_running_mean", "res5.2.conv3.norm.running_mean"),
        ("res5_2_branch2c_bn_running_var", "res5.2.conv3.norm.running_var"),
        ("conv1_gn_s", "stem.conv1.norm.weight"),
        ("res2_0_branch2a_gn_s", "res2.0.conv1.norm.weight"),
        ("fc1000_w", "fc1000.weight"),
        ("pred_b", "linear.bias"),
    ],
)
def test_caffe2_names(old, new):
    weights, originals = convert_c2_detectron_names({old: torch.ones(1)})
    assert list(weights) == [new]
    assert originals == {new: old}


def caffe2_name(name):
    """Detectron2's name of a ResNet parameter -> MSRA's."""
    branches = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
    kind = {"weight": "s", "bias": "b"}[name.split(".")[-1]] if ".norm." in name else None
    if name.startswith("stem"):
        return f"res_conv1_bn_{kind}" if kind else "conv1_w"
    stage, block, layer = name.split(".")[:3]
    prefix = f"{stage}_{block}_branch{branches[layer]}"
    return f"{prefix}_bn_{kind}" if kind else f"{prefix}_w"


def test_an_msra_backbone_fills_every_weight_inside_a_model():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    model = nn.Module()
    model.backbone = build_backbone(cfg)
    learned = [k for k in model.state_dict() if not k.split(".")[-1].startswith("running")]
    file = {
        caffe2_name(key.removeprefix("backbone.")): torch.rand_like(model.state_dict()[key]).numpy()
        for key in learned
    }
    assert len(file) == len(learned)
    data = {**file, "fc1000_w": torch.zeros(1000, 2048).numpy()}
    checkpoint = {"model": data, "__author__": "Caffe2", "matching_heuristics": True}
    result = DetectionCheckpointer(model)._load_model(checkpoint)
    assert result.unexpected_keys == ["fc1000.weight"]
    assert result.incorrect_shapes == []
    for key in learned:
        expected = file[caffe2_name(key.removeprefix("backbone."))]
        assert model.state_dict()[key].equal(torch.from_numpy(expected))
    norm = model.backbone.stem.conv1.norm
    torch.testing.assert_close(norm.running_var + norm.eps, torch.ones(64))
