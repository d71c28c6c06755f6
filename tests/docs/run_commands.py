"""Documented commands, one after the other in a process of their own: parsed, or run as they stand.

    python run_commands.py parse      # by their scripts' own parsers
    python run_commands.py run        # in this folder

Reads JSON from standard input and writes JSON. A command is a list, of the words after `python`.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import runpy
import sys
import traceback
import types
from functools import cache
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

sys.path.append(str(Path(__file__).resolve().parents[1]))
from helpers import ROOT, signals_and_logging_kept  # noqa: E402

from s4m_d2 import add_s4m_config  # noqa: E402
from s4m_d2.engine import run_config  # noqa: E402
from s4m_d2.engine.checks.config_checks import config_errors  # noqa: E402
from s4m_d2.engine.checks.preflight import preflight  # noqa: E402
from s4m_d2.engine.command.arguments import check_arguments  # noqa: E402
from s4m_d2.engine.config_file import load_config  # noqa: E402
from s4m_d2.errors import DatasetError, S4MError, WeightsError  # noqa: E402

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


def run(words: list[str]) -> None:
    """A script of the project, or `-c CODE`."""
    if words[0] == "-c":
        exec(compile(words[1], "-c", "exec"), {"__name__": "__main__"})
        return
    script = ROOT / words[0]
    sys.argv = [str(script), *words[1:]]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.path.remove(str(script.parent))


def output_of(words: list[str]) -> tuple[int, str]:
    """Exit status and output."""
    text, status = io.StringIO(), 0
    output = contextlib.redirect_stdout(text), contextlib.redirect_stderr(text)
    with output[0], output[1], signals_and_logging_kept():
        try:
            run(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            text.write("" if isinstance(end.code, int | None) else str(end.code))
        except BaseException:  # of the command alone; the others are run
            status = -1
            traceback.print_exc()
    return status, text.getvalue()


def parse_all(request: dict) -> dict:
    """Of ``commands`` what is wrong with each ("": nothing), and the configs that went through the
    whole check before a run; of ``scripts`` the options that their help names."""
    argparse.ArgumentParser.parse_args = stop_after_parsing
    problems = [problem(*words) for words in request["commands"]]
    known = {" ".join(words): options(words) for words in request["scripts"]}
    return {"problems": problems, "preflights": sorted(PREFLIGHTS), "options": known}


def run_all(request: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and output of each command."""
    return [output_of(words) for words in request]


if __name__ == "__main__":
    answer = {"parse": parse_all, "run": run_all}[sys.argv[1]](json.load(sys.stdin))
    print(json.dumps(answer))
