"""A small model, and the files that the tests of the checkpointer make of it."""

import pickle

import torch
from torch import nn


class Model(nn.Module):
    """A backbone with Detectron2's names, and a head."""

    def __init__(self, width=4, classes=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            stem = nn.Module()
            stem.conv1 = nn.Conv2d(3, width, 7, bias=False)
            stem.conv1.norm = nn.BatchNorm2d(width)
            block = nn.Module()
            block.conv1 = nn.Conv2d(width, width, 1, bias=False)
            block.conv1.norm = nn.BatchNorm2d(width)
            block.shortcut = nn.Conv2d(width, width, 1, bias=False)
            block.shortcut.norm = nn.BatchNorm2d(width)
            self.backbone = nn.Module()
            self.backbone.stem = stem
            self.backbone.res2 = nn.Sequential(block)
            self.head = nn.Linear(width, classes)
            for parameter in self.parameters():
                nn.init.normal_(parameter)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))


class Counter:
    """A checkpointable object."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def same(model, other, prefix=""):
    state = other.state_dict()
    return all(
        torch.equal(value, state[name])
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    )


def save(tmp_path, content, name="weights.pth"):
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return str(path)
