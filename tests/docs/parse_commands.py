"""Run in a process of its own: parses commands with their scripts' own parsers, one by one.

Reads {"commands": [words after `python`, ...], "scripts": [...]} as JSON from standard input, and
writes what is wrong with each command ("": nothing), the configs that went through the whole check
before a run, and the options in the help of each script.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import sys
import types
from functools import cache
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from run_commands import ROOT, run

from s4m_d2 import add_s4m_config
from s4m_d2.engine import run_config
from s4m_d2.engine.checks.config_checks import config_errors
from s4m_d2.engine.checks.preflight import preflight
from s4m_d2.engine.command.arguments import check_arguments
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import DatasetError, S4MError, WeightsError

NEEDS_DETECTRON2 = ("mask_rcnn.yaml",)
# Their data sets and schedule come from the reader's files.
FROM_THE_DATA = ("custom", "custom_small")
TRAINS = ("train_net.py", "tools/quickstart.py")  # a whole run, of S4M's own config
# Checked where there is no GPU and no network, too.
ANYWHERE = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
PREFLIGHTS: set[str] = set()  # configs that went through it; once each, as it builds the model
PARSE_ARGS = argparse.ArgumentParser.parse_args


class Parsed(BaseException):
    """Carries what a script's parser made of its arguments out of the script."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace


def stop_after_parsing(parser, *args, **kwargs):
    raise Parsed(PARSE_ARGS(parser, *args, **kwargs))


def run_script(words: list[str]) -> tuple[argparse.Namespace | None, str, str]:
    """A script up to its parsed arguments: (they, None if it ended before; output; errors)."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(words)
    except Parsed as parsed:
        return parsed.namespace, out.getvalue(), err.getvalue()
    except SystemExit:
        pass
    return None, out.getvalue(), err.getvalue()


@cache
def problem(*words: str) -> str:
    """What is wrong with a command, "" if nothing is."""
    namespace, _, errors = run_script([*words])
    if namespace is None:
        last = errors.strip().splitlines()[-1:]
        return (last or ["the script parsed nothing"])[0]
    try:
        return config_problem(words[0], namespace)
    except (AssertionError, KeyError, OSError, S4MError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def config_problem(script: str, namespace: argparse.Namespace) -> str:
    """Load the config that a command names, with its overrides, and check the settings."""
    file, opts = getattr(namespace, "config_file", "") or "", getattr(namespace, "opts", [])
    if script.startswith("examples/"):
        if Path(file).name not in NEEDS_DETECTRON2 or has_detectron2():
            load_with_own_keys(file, opts)
        return ""
    load_config("" if file.startswith("output/") else file, opts)  # a run's own is not here
    if script not in TRAINS or Path(file).stem in FROM_THE_DATA:
        return ""
    if not file:
        return "the command names no config file"
    if script == "train_net.py":
        check_arguments(namespace)
    cfg = run_config(load_config(file, [*opts, *ANYWHERE]))
    eval_only = getattr(namespace, "eval_only", False)
    processes = getattr(namespace, "num_gpus", 1)
    if eval_only or file in PREFLIGHTS:
        errors = config_errors(cfg, eval_only=eval_only, num_processes=processes)
    else:
        errors = preflight(cfg, num_processes=processes).errors
        PREFLIGHTS.add(file)
    # The reader's data and models are not here.
    ours = [str(e) for e in errors if not isinstance(e, DatasetError | WeightsError)]
    return "; ".join(ours)


def has_detectron2() -> bool:
    return importlib.util.find_spec("detectron2.modeling.roi_heads") is not None


def load_with_own_keys(file: str, opts: list[str]) -> CfgNode:
    """A config of an example: ours, with what its modules add."""
    cfg = get_cfg()
    add_s4m_config(cfg)
    modules = [m for m in sys.modules.values() if isinstance(m, types.ModuleType)]
    for module in modules:
        if str(ROOT / "examples") in str(getattr(module, "__file__", "")):
            for name in [n for n in vars(module) if re.fullmatch(r"add_tiny\w+_config", n)]:
                getattr(module, name)(cfg)
    cfg.merge_from_file(file)
    cfg.merge_from_list(opts)
    return cfg


def options(words: list[str]) -> list[str]:
    """The long options that the help of a script, or of one of its commands, names."""
    _, output, _ = run_script([*words, "--help"])
    return sorted(set(re.findall(r"--[a-z][\w-]*", output)))


def main() -> None:
    request = json.load(sys.stdin)
    argparse.ArgumentParser.parse_args = stop_after_parsing
    problems = [problem(*words) for words in request["commands"]]
    known = {" ".join(words): options(words) for words in request["scripts"]}
    answer = {"problems": problems, "preflights": sorted(PREFLIGHTS), "options": known}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
