"""The examples' modules, imported as their scripts import them, with small settings."""

import importlib
import runpy
import sys
from functools import cache
from types import SimpleNamespace

import pytest
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from helpers import ROOT, SMALL_RUN, key_values, signals_and_logging_kept

from s4m_d2 import add_s4m_config
from s4m_d2.engine import run_config

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="session")
def import_example():
    """(project, module) → the module, once: importing it registers models."""

    @cache
    def load(project, module):
        folder = EXAMPLES / project
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        if module == "train_net":  # every project has one
            return SimpleNamespace(**runpy.run_path(str(folder / "train_net.py")))
        return importlib.import_module(module)

    return load


@pytest.fixture(autouse=True)
def keep_signals():
    """The scripts listen to the signals that stop a run; here pytest owns them."""
    with signals_and_logging_kept():
        yield


@pytest.fixture
def command_line(small_data, monkeypatch, tmp_path):
    """(config file, *flags, KEY=VALUE) → what a script's parser returns for a small run."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_data))

    def parse(config_file, *flags, **changes):
        opts = key_values(SMALL_RUN | {"OUTPUT_DIR": tmp_path / "run"}, **changes)
        words = ["--config-file", str(EXAMPLES / config_file), *flags, *opts]
        return default_argument_parser().parse_args(words)

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
