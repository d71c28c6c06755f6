"""Every command in the Markdown files has options and settings that exist.

The config of each training goes through what --check does. The commands that take seconds are
run, in test_short_commands.py.
"""

import os
import re
import shlex
from functools import reduce

import pytest
from detectron2.config import get_cfg
from helpers import ROOT
from markdown_docs import PROGRAMS, Command, answer_of, commands, files, spans

from s4m_d2 import add_s4m_config
from s4m_d2.engine.config_file import load_config

PLACES = ("*.py", "tools/*.py", "datasets/*.py", "examples/*/train_net.py")
PARSES = re.compile(r"ArgumentParser|argument_parser\(|command_parser\(|s4m_d2.commands")
PATHS = [path for place in PLACES for path in sorted(ROOT.glob(place))]
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in PATHS if PARSES.search(path.read_text())]
SEPL = "tools/sepl.py"
OF_THE_WHEEL = {f"s4m-{name}": f"tools/{name}.py" for name in ("label", "report", "review", "sepl")}
OF_THE_WHEEL |= {"s4m-export": "tools/export_weights.py", "s4m-predict": "tools/demo.py"}
OF_THE_WHEEL |= {"s4m-train": "train_net.py"}
HELPS = [[name] for name in SCRIPTS]
HELPS += [[SEPL, command] for command in ("enhance", "evaluate", "visualize")]
KEY = r"(?:DATALOADER|DATASETS|INPUT|MODEL|S4M|SOLVER|TEST)(?:\.[A-Z0-9_]+)+"


def script_words(command: Command) -> list[str] | None:
    """The script of this project that a command starts, and its arguments."""
    program, *rest = command.words
    if program in OF_THE_WHEEL:
        return [OF_THE_WHEEL[program], *rest]
    if program == "sbatch":
        return ["train_net.py", *rest[1:]]  # the batch script passes its arguments on
    if program == "torchrun":
        names = [word.replace("s4m_d2.commands.", "s4m-") for word in rest]
        known = [name in OF_THE_WHEEL or name.endswith(".py") for name in names]
        first = known.index(True)
        return [OF_THE_WHEEL.get(names[first], names[first]), *rest[first + 1 :]]
    if program == "python" and not rest[0].startswith("-"):
        return rest
    return None


PARSED = [c for c in commands() if (words := script_words(c)) and len(words) > 1]


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What the scripts' own parsers say, all in one process."""
    request = {"commands": list(map(script_words, PARSED)), "scripts": HELPS}
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path_factory.mktemp("none"))}
    return answer_of("parse", request, ROOT, environment)


def test_options_exist_and_settings_are_right(answer):
    found = dict(zip(map(str, PARSED), answer["problems"], strict=True))
    assert {command: problem for command, problem in found.items() if problem} == {}


def test_configs_of_trainings_go_through_the_check(answer):
    """Those on own data do so in test_short_commands.py."""
    trainings = [words for words in map(script_words, PARSED) if words[0] == "train_net.py"]
    named = {word for words in trainings for word in words if word.startswith("configs/")}
    named = {file for file in named if not file.startswith("configs/custom")}
    assert len(named) > 3 and named <= set(answer["preflights"])


def test_every_script_explains_itself(answer):
    silent = [words for words in HELPS if "--help" not in answer["options"][" ".join(words)]]
    assert silent == []


def fails(command: Command) -> str:
    """What is wrong with a command's words, its options apart."""
    program, *rest = command.words
    scripts = [word for word in rest if re.fullmatch(r"[\w./-]+\.(py|sh|sbatch)", word)]
    missing = [word for word in scripts if not (ROOT / word).is_file()]
    if missing:
        return f"there is no {missing[0]}"
    if program == "make":
        return make_fails(rest)
    if program == "pip":
        return pip_fails(rest)
    if program == "pytest" or rest[:2] == ["-m", "pytest"]:
        paths = [word for word in rest if "/" in word and not (ROOT / word.split("::")[0]).exists()]
        return f"there is no {paths[0]}" if paths else ""
    return "" if program in PROGRAMS else f"no program that this test knows: {program}"


def make_fails(words: list[str]) -> str:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE))
    for word in words:
        name, is_variable, _ = word.partition("=")
        if name not in (variables if is_variable else targets):
            return f"make knows no {name}"
    return ""


def pip_fails(words: list[str]) -> str:
    extras = re.search(r"extras_require=\{(.+?)\n    \}", (ROOT / "setup.py").read_text(), re.S)[1]
    for word in words[1:]:
        folder, extra = re.fullmatch(r"([^\[]*)(?:\[(\w+)\])?", word).groups()
        if folder.startswith(".") and not any(
            (ROOT / folder / name).is_file() for name in ("setup.py", "pyproject.toml")
        ):
            return f"there is no package in {folder}"
        if extra and f'"{extra}":' not in extras:
            return f"there is no extra {extra}"
    return ""


def test_programs_targets_scripts_and_extras_exist():
    assert {str(c): problem for c in commands() if (problem := fails(c))} == {}


def inline(pattern: str) -> set[str]:
    """All code spans in which a pattern is found."""
    found = {span for file in files() for span in spans(file.read_text())}
    return {span for span in found if re.search(pattern, span)}


def test_options_in_the_text_exist(answer):
    known = {option for options in answer["options"].values() for option in options}
    named = {shlex.split(span)[0].split("=")[0] for span in inline(r"^--[a-z]")}
    assert len(named) > 10 and named <= known


def test_config_keys_and_values_in_the_text_fit():
    cfg = get_cfg()
    add_s4m_config(cfg)
    found = inline(rf"^(--[\w-]+ (\w+ )?)?{KEY}( (?!is )|$)")
    assert len(found) > 50
    for words in map(shlex.split, found):
        start = next(i for i, word in enumerate(words) if re.fullmatch(KEY, word))
        if len(words) > start + 1:
            load_config("", words[start:])
        else:  # a key or a section
            *sections, name = words[start].split(".")
            assert name in reduce(getattr, sections, cfg), f"{words[start]} is no key"
