"""tools/pseudo_label_quality.py: tables on the screen, JSON in a folder."""

import json
import os

import pseudo_label_quality as tool
import pytest
import torch
from helpers import QUICKSTART

from s4m_d2.engine import S4MTrainer


@pytest.fixture
def checkpoint(small_config, tmp_path):
    """Two untrained models in one file; the student sees nothing."""
    models = {"model": small_config(SEED=1), "teacher": small_config(SEED=2)}
    states = {name: S4MTrainer.build_model(cfg).state_dict() for name, cfg in models.items()}
    for name, value in states["model"].items():
        if name.endswith("class_embed.bias"):
            value[-1] = 1e4  # "no object"
    path = tmp_path / "both.pth"
    torch.save(states, path)
    return str(path)


def test_the_tool_prints_tables_and_writes_json(checkpoint, small_options, tmp_path, capsys):
    arguments = ["--config-file", QUICKSTART, "--weights", checkpoint]
    output = tmp_path / "out"
    tool.main([*arguments, "--images", "2", "--output", str(output), *small_options()])
    printed = capsys.readouterr().out
    assert "teacher" in printed and "toyscapes_train_unlabeled" in printed
    found = json.loads((output / "pseudo_label_quality.json").read_text())
    assert found["model"] == "teacher" and found["images"] == 2
    assert set(found["before"]) == {"overall", "by_class", "by_size"}

    assert found["before"]["overall"]["pseudo_labels"] > 0

    tool.main([*arguments, "--images", "1", "--student", *small_options()])
    row = capsys.readouterr().out.splitlines()[4].split("|")
    assert row[2].strip() == "before" and row[4].strip() == "0"  # labels
    assert os.listdir(output) == ["pseudo_label_quality.json"]
