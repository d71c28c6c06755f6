"""Small files with the names of published ones, whose models have Mask2Former's own names."""

import json
import re
from functools import cache
from pathlib import Path

import torch
from torch import nn

KEYS = Path(__file__).parents[1] / "data_reference" / "mask2former_r50_cityscapes_keys.json"
LARGEST = 12  # of a dimension here
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "empty_weight")


@cache
def _shapes() -> dict[str, list[int]]:
    return json.loads(KEYS.read_text())


def mask2former(seed, lacks="") -> nn.Module:
    """Modules of the names of Mask2Former R50 for Cityscapes, with few numbers in each.

    ``lacks`` is a pattern of names that are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in _shapes().items():
        if lacks and re.search(lacks, name):
            continue
        shape = [min(size, LARGEST) for size in shape]
        value = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.randint(100, shape, generator=generator)
        owner, _, leaf = name.rpartition(".")
        module = model
        for word in owner.split("."):
            if not hasattr(module, word):
                module.add_module(word, nn.Module())
            module = getattr(module, word)
        if leaf in BUFFERS:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value))
    return model


def backbone(model) -> dict[str, torch.Tensor]:
    """The backbone's weights without its name, as Detectron2's ResNet names them."""
    return {
        name.removeprefix("backbone."): value
        for name, value in model.state_dict().items()
        if name.startswith("backbone.")
    }


def numpy(state) -> dict:
    return {name: value.numpy() for name, value in state.items()}


def msra_name(name: str) -> str:
    """Of ImageNetPretrained/MSRA/R-50.pkl, which has no running statistics."""
    stem = name.startswith("stem.")
    name = name.removeprefix("stem.")
    for old, new in {
        ".shortcut.": ".branch1.",
        ".conv1.": ".branch2a.",
        ".conv2.": ".branch2b.",
        ".conv3.": ".branch2c.",
        "norm.weight": "bn.s",
        "norm.bias": "bn.b",
    }.items():
        name = name.replace(old, new)
    name = name.replace(".weight", ".w").replace(".", "_")
    return f"res_{name}" if stem and "bn" in name else name


def torchvision_name(name: str) -> str:
    name = name.removeprefix("stem.")
    for i in (1, 2, 3, 4):
        name = name.replace(f"res{i + 1}.", f"layer{i}.")
    for i in (1, 2, 3):
        name = name.replace(f"conv{i}.norm", f"bn{i}")
    return name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


def early_name(name: str) -> str:
    """Before 2022: the pixel decoder directly under the head, and another name of the queries."""
    name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
    return name.replace("query_feat", "static_query")


def deep_name(name: str) -> str:
    """After Mask2Former has moved the pixel decoder of a file that states no version."""
    return name.replace("pixel_decoder.", "pixel_decoder.pixel_decoder.")


def renamed(state, rename) -> dict:
    return {rename(name): value for name, value in state.items()}


def without_criterion(state) -> dict:
    return {name: value for name, value in state.items() if not name.startswith("criterion")}


def ensemble(student=None, teacher=None, before="", after="") -> dict:
    """Guided Distillation's and S4M's checkpoints: two models (or the teacher alone) in one."""
    state = {}
    for model, prefix in ((teacher, "modelTeacher"), (student, "modelStudent")):
        if model is not None:
            names = model.state_dict().items()
            state |= {f"{before}{prefix}.{after}{name}": value for name, value in names}
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
    trainer = {"iteration": 9, "_trainer": {"iteration": 9, "optimizer": optimizer}}
    return {"model": state, "trainer": trainer, "iteration": 9}
