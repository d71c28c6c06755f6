"""What is said about weights that did not fit."""

import logging

import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from .checkpoint_files import Model, same, save


def test_the_report_says_what_became_of_each_weight(tmp_path, caplog):
    state = Model(seed=1, classes=5).state_dict()
    state["extra"] = state.pop("backbone.res2.0.shortcut.norm.running_mean")
    checkpointer = S4MCheckpointer(Model(seed=2))
    with caplog.at_level(logging.WARNING):
        checkpointer.load(save(tmp_path, state))
    report = checkpointer.last_report
    assert report.unexpected == ("extra",)
    assert report.missing == ("backbone.res2.0.shortcut.norm.running_mean",)
    assert report.mismatched == (("head.weight", (5, 4), (3, 4)), ("head.bias", (5,), (3,)))
    assert len(report.matched) == len(state) - 3
    assert "head.weight is (5, 4) in the file and (3, 4) in the model" in caplog.text


def test_a_bare_backbone_is_no_cause_for_a_warning(tmp_path, caplog):
    state = {k: v for k, v in Model(seed=1).state_dict().items() if k.startswith("backbone.")}
    with caplog.at_level(logging.INFO):
        S4MCheckpointer(Model(seed=2)).load(save(tmp_path, state))
    assert [r.levelname for r in caplog.records if "parameters loaded" in r.message] == ["INFO"]


def remove_head(state):
    del state["head.bias"]


def change_head(state):
    state["head.bias"] = torch.zeros(9)


def change_backbone(state):
    state["backbone.stem.conv1.weight"] = torch.zeros(8, 3, 3, 3)


def halve_backbone(state):
    for name in [name for name in state if "backbone.res2" in name]:
        del state[name]


def rename_all(state):
    for name in list(state):
        state[f"other.{name}"] = state.pop(name)


@pytest.mark.parametrize(
    ("change", "require", "message"),
    [
        (remove_head, True, r"lack 1 of the model's .* head\.bias"),
        (change_head, True, r"head\.bias is \(9,\) in the file and \(3,\) in the model"),
        (change_backbone, False, r"another architecture: backbone\.stem\.conv1\.weight"),
        (halve_backbone, False, r"hold only 3 of the backbone's 9"),
        (rename_all, False, r"hold nothing of this model: .*the file has other\."),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(
    tmp_path, change, require, message
):
    state = Model(seed=1).state_dict()
    change(state)
    loaded, start = Model(seed=2), Model(seed=2)
    with pytest.raises(WeightsError, match=message):
        S4MCheckpointer(loaded).load(save(tmp_path, state), require=require)
    assert same(loaded, start)
