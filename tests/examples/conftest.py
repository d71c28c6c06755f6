"""The examples' modules, imported as their scripts import them, with small settings."""

import importlib
import importlib.util
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser

from s4m_d2 import add_s4m_config
from s4m_d2.engine import run_config
from s4m_d2.engine.training.stop_signals import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SMALL = {
    "MODEL.DEVICE": "cpu",
    "DATASETS.TRAIN": "('toyscapes_train_30pct',)",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(64, 72)",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.CROP.SIZE": "(64, 128)",
    "SOLVER.IMS_PER_BATCH": 2,
    "S4M.TEACHER.IMS_PER_BATCH": 2,
    "S4M.PSEUDO_LABEL.SCORE_THRESH": 0.0,
    "S4M.ARP.MIN_AREA_FRACTION": 0.0,
}


@pytest.fixture(scope="session")
def import_example():
    """(project, module) → the module, once: importing it registers models."""

    @cache
    def load(project, module):
        folder = EXAMPLES / project
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        if module != "train_net":
            return importlib.import_module(module)
        file = folder / "train_net.py"  # every project has one
        spec = importlib.util.spec_from_file_location(f"{project}_train_net", file)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


@pytest.fixture(autouse=True)
def keep_signals():
    """The scripts listen to the signals that stop a run; here pytest owns them."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command_line(small_data, monkeypatch, tmp_path):
    """(config file, *flags, KEY=VALUE) → what a script's parser returns for a small run."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_data))

    def parse(config_file, *flags, **changes):
        merged = SMALL | {"OUTPUT_DIR": str(tmp_path / "run")}
        merged |= {key.replace("__", "."): value for key, value in changes.items()}
        opts = [str(item) for pair in merged.items() for item in pair]
        config_file = ["--config-file", str(EXAMPLES / config_file)]
        return default_argument_parser().parse_args([*config_file, *flags, *opts])

    return parse


@pytest.fixture
def example_config(command_line, import_example):
    """(config file, KEY=VALUE) → the config of a small run of examples/own_meta_arch."""

    def config(config_file, **changes):
        args = command_line(config_file, **changes)
        cfg = get_cfg()
        add_s4m_config(cfg)
        import_example("own_meta_arch", "tiny_solo").add_tiny_solo_config(cfg)
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        return run_config(cfg)

    return config
