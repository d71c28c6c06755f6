"""Small runs through train_net.py, on own data mostly, in this process."""

import json
import shutil
import sys
from pathlib import Path

from helpers import ROOT, key_values, signals_and_logging_kept

from s4m_d2.commands import train
from s4m_d2.engine.command.arguments import read_config

from .conftest import SMALL

CONFIG = str(ROOT / "configs" / "custom_small.yaml")
# What the small runs of other tests have, but for the data and what follows from them.
_MODEL = {k: v for k, v in SMALL.items() if k.startswith(("MODEL.", "S4M.DISTILL", "S4M.PSEUDO"))}
# A backbone of few weights: to write checkpoints takes most of the time of a short run.
LIGHT = {"MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.TIMM.NAME": "test_resnet"}
OPTIONS = _MODEL | {
    **LIGHT,
    "MODEL.WEIGHTS": "",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "S4M.BURN_IN": 1,
    "S4M.SAM.ADAPT": 0,
}


def make_data(folder: Path) -> Path:
    """The generator's data: annotations.json, labeled/ and unlabeled/, of 128 x 64 pixels."""
    sys.path.insert(0, str(ROOT / "datasets"))
    from make_own_data import make_own_data

    make_own_data(folder, labeled=8, unlabeled=4, seed=3, size=(128, 64), kind="coco")
    return folder


def copied(data: Path, target: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(data, target))


def change_json(path: Path, change) -> None:
    """Let ``change`` alter the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def only(chosen):
    """A change of a COCO json that leaves a slice of its images."""

    def change(content):
        content["images"] = content["images"][chosen]
        ids = {row["id"] for row in content["images"]}
        content["annotations"] = [r for r in content["annotations"] if r["image_id"] in ids]

    return change


def own_options(data: Path, **others) -> list[str]:
    """--labeled, --images and --unlabeled; ``others`` replace them or add to them; None: not."""
    paths = {
        "labeled": data / "annotations.json",
        "images": data / "labeled",
        "unlabeled": data / "unlabeled",
    }
    given = {name: path for name, path in (paths | others).items() if path is not None}
    return [word for n, path in given.items() for word in (f"--{n.replace('_', '-')}", str(path))]


def overrides(output: Path, **changes) -> list[str]:
    """KEY VALUE of a small run into ``output``; ``changes`` with __ for dots; None: not given."""
    return key_values(OPTIONS | {"OUTPUT_DIR": output}, **changes)


def parsed(config: str, *arguments):
    return train.parse_args(["--config-file", config, *map(str, arguments)])


def read(*arguments, config: str = CONFIG):
    """Config and own data, as train_net.py reads them."""
    return read_config(parsed(config, *arguments))


def train_net(*arguments, config: str = CONFIG) -> int:
    """Run train_net.py with a config; its exit status."""
    with signals_and_logging_kept():
        return train.start(parsed(config, *arguments))
