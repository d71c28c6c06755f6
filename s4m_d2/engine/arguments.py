"""Command-line options that argparse takes but that cannot work."""

from __future__ import annotations

import argparse

from s4m_d2.errors import ConfigError


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
    misplaced = [word for word in args.opts if word.startswith("--")]
    if misplaced:
        raise ConfigError(
            f"'{misplaced[0]}' comes after overrides, which end the options. Write all options "
            "first, then KEY VALUE pairs."
        )
