"""Command-line options that argparse takes but that cannot work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line before the first config key, and the KEY VALUE pairs from it on.

    An option that takes several values may so stand last: argparse alone would take keys for them.
    A key is what begins with a section of the config (so that IMG_1.JPG is none).

    Raises:
        ConfigError: an option comes after overrides.

    >>> split_overrides(["--input", "a.jpg", "b.jpg", "MODEL.DEVICE", "cpu"])
    (['--input', 'a.jpg', 'b.jpg'], ['MODEL.DEVICE', 'cpu'])
    """
    words, cfg = list(words), get_cfg()
    add_s4m_config(cfg)
    first = next((i for i, word in enumerate(words) if _is_key(cfg, word)), len(words))
    _check_overrides(words[first:])
    return words[:first], words[first:]


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse options of Detectron2's argument parser that are out of range or misplaced.

    Raises:
        ConfigError: names the option and what was expected.
    """
    for option in ("num_gpus", "num_machines"):
        if getattr(args, option) < 1:
            raise ConfigError(
                f"--{option.replace('_', '-')} is {getattr(args, option)}; expected 1 or more "
                "(processes; MODEL.DEVICE cpu trains without a GPU)."
            )
    if args.machine_rank not in range(args.num_machines):
        raise ConfigError(
            f"--machine-rank is {args.machine_rank}; expected one from 0 to "
            f"{args.num_machines - 1}, as --num-machines is {args.num_machines}."
        )
    _check_overrides(args.opts)


def _is_key(cfg: CfgNode, word: str) -> bool:
    section, dot, _ = word.partition(".")
    return section in cfg and isinstance(cfg[section], CfgNode) == bool(dot)


def _check_overrides(words: Sequence[str]) -> None:
    misplaced = [word for word in words if word.startswith("--")]
    if misplaced:
        raise ConfigError(
            f"'{misplaced[0]}' comes after overrides, which end the options. Write all options "
            "first, then KEY VALUE pairs."
        )
