"""Options of commands, and overrides KEY VALUE after them."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from detectron2.config import CfgNode, get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.engine.checks.config_checks import value_errors
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.own_data import OwnData, load_run
from s4m_d2.engine.stages import last_weights, run_config, run_folder
from s4m_d2.errors import ConfigError, printable, raise_all
from s4m_d2.report.run import CONFIG

# Options for own data (keys of S4M.DATA), with metavar and help.
_OWN_DATA = {
    "labeled": ("JSON", "COCO json of instances to train on; may be repeated, the last counts"),
    "images": ("DIR", "folder of its file names (default: the json's); one for all, or for each"),
    "unlabeled": ("DIR", "folder of unlabeled images and videos, searched recursively; or a video"),
    "every": ("N", "of a video, every N-th frame is an image (default: 10)"),
    "val": ("JSON", "COCO json to evaluate on (default: a share of the labeled images)"),
    "val_images": ("DIR", "folder of its file names (default: as --images)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options to Detectron2's parser."""
    words = "report on settings, data, weights, disk and memory; train nothing, write nothing"
    parser.add_argument("--check", action="store_true", help=words)
    words = "OUTPUT_DIR of a run or weights, to start from its last model (MODEL.WEIGHTS)"
    parser.add_argument("--start-from", default="", metavar="RUN", help=words)
    group = parser.add_argument_group("own data (docs/own-data.md); the same as S4M.DATA's keys")
    for name, (metavar, words) in _OWN_DATA.items():
        option = f"--{name.replace('_', '-')}"
        kind = int if name == "every" else str
        group.add_argument(option, action="append", type=kind, metavar=metavar, help=words)


def read_config(args: argparse.Namespace, frames_dir: str = "") -> tuple[CfgNode, OwnData | None]:
    """Load the config, and register the own data that it names; see :func:`load_run`."""
    words: list[str] = []
    for name in filter(vars(args).get, _OWN_DATA):
        given = getattr(args, name)
        if name not in ("labeled", "images"):
            if len(given) > 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} takes one value; {len(given)} are given: "
                    f"{', '.join(map(str, given))}. Folders are searched, with links in them."
                )
            given = given[0]
        # Quoted, as values are parsed as Python literals: a folder may be called 2024.
        words += [f"S4M.DATA.{name.upper()}", repr(given)]
    if args.start_from:
        words += ["MODEL.WEIGHTS", repr(last_weights(args.start_from))]
    return load_run(
        args.config_file,
        words + args.opts,
        resume=args.resume,
        eval_only=args.eval_only,
        num_processes=num_processes(args),
        frames_dir=frames_dir,
    )


def num_processes(args: argparse.Namespace) -> int:
    """Number of processes of the run, on all machines: torchrun's, or from the options."""
    return int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines))


def command_parser(description: str | None, *, overrides: bool = False) -> argparse.ArgumentParser:
    """Make a parser whose help shows a docstring as it is; ``overrides``: KEY VALUE pairs too."""
    return argparse.ArgumentParser(
        usage="%(prog)s [options] [KEY VALUE ...]" if overrides else None,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def model_parser(description: str, *, model: str, required: bool) -> argparse.ArgumentParser:
    """Make one with the options of a trained model, by default the student or the teacher."""
    parser = command_parser(description, overrides=True)
    add = parser.add_argument
    add("--weights", required=required, help="checkpoint, weights of one model, or OUTPUT_DIR")
    add("--model", choices=("student", "teacher"), default=model, help=f"default: {model}")
    add("--config-file", metavar="FILE", help="default: config.yaml of the weights' run")
    words = "one name per line, by class id (default: the run's, or DATASETS.TEST's)"
    add("--class-names", default="", metavar="FILE", help=words)
    return parser


def model_config(config_file: str | None, weights: str, overrides: Sequence[str]) -> CfgNode:
    """Load and check the config of a run whose model is used without a data set.

    Without a file, that of the run that wrote the weights, which may have been moved or copied.
    """
    found = config_file or os.path.join(run_folder(weights), CONFIG)
    if not config_file and not os.path.isfile(found):
        raise ConfigError(
            f"The weights '{weights}' do not exist, or are not in OUTPUT_DIR/stage/ of a run: no "
            f"'{found}'. Correct the path, or give their config as --config-file."
        )
    cfg = run_config(load_config(found, overrides))
    raise_all(value_errors(cfg))
    return cfg


def split_overrides(words: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Split a command line (None: this one's) before the first config key into options and pairs.

    So an option may take several values. A key starts with a section of the config (IMG_1.JPG does
    not). ConfigError: an option follows overrides.

    >>> split_overrides(["--input", "a.jpg", "b.jpg", "MODEL.DEVICE", "cpu"])
    (['--input', 'a.jpg', 'b.jpg'], ['MODEL.DEVICE', 'cpu'])
    """
    words, cfg = list(sys.argv[1:] if words is None else words), get_cfg()
    add_s4m_config(cfg)

    def is_key(word: str) -> bool:
        section, dot, _ = word.partition(".")
        return section in cfg and isinstance(cfg[section], CfgNode) == bool(dot)

    first = next((i for i, word in enumerate(words) if is_key(word)), len(words))
    _check_overrides(words[first:])
    return words[:first], words[first:]


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse options of Detectron2's argument parser that are out of range or misplaced."""
    for option, count in (("--num-gpus", args.num_gpus), ("--num-machines", args.num_machines)):
        if count < 1:
            expected = "1 or more (MODEL.DEVICE cpu needs no GPU)"
            raise ConfigError(f"{option} is {count}; expected {expected}.")
    if args.machine_rank not in range(args.num_machines):
        expected = f"one from 0 to {args.num_machines - 1}, below --num-machines"
        raise ConfigError(f"--machine-rank is {args.machine_rank}; expected {expected}.")
    _check_overrides(args.opts)


def _check_overrides(words: Sequence[str]) -> None:
    if misplaced := [word for word in words if word.startswith("--")]:
        raise ConfigError(
            f"'{misplaced[0]}' comes after overrides, which end the options. Write all options "
            f"before '{words[0]}', then KEY VALUE pairs (--labeled is repeated for each file)."
        )


def natural(text: str, least: int = 0) -> int:
    """Type of an option: whole number, at least 0."""
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def positive(text: str) -> int:
    """Type of an option: whole number, at least 1."""
    return natural(text, 1)


def share(text: str) -> float:
    """Type of an option: number in [0, 1]."""
    with suppress(ValueError):
        if 0.0 <= (value := float(text)) <= 1.0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")


def print_problems(problems: Mapping[str, str], what: str) -> int:
    """Print to standard error to how many images ``what`` applies, and why; 1 if any, else 0."""
    lines = [f"  {printable(f'{name}: {problem}')}" for name, problem in problems.items()]
    if lines:
        title = f"{len(lines)} image{'s' * (len(lines) != 1)} {what}:"
        more = [f"  and {len(lines) - 20} more"] * (len(lines) > 20)
        print(title, *lines[:20], *more, sep="\n", file=sys.stderr)
    return int(bool(lines))
