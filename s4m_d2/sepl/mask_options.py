"""The options of the command line that say where masks come from."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from s4m_d2.errors import ConfigError
from s4m_d2.sam import SAM_BACKEND_REGISTRY
from s4m_d2.sam.automatic_masks import AutomaticMaskSettings
from s4m_d2.sam.checkpoint import PUBLISHED_AT, PUBLISHED_WEIGHTS
from s4m_d2.sepl.listing import check_folder
from s4m_d2.sepl.mask_sources import MaskFolder, SamMasks

AUTO_DEVICE = "auto"
_CACHE_FOLDER = "masks"  # in the output folder
_SAM_ONLY = ("sam_type", "sam_checkpoint", "device", "mask_cache")


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`mask_source_from` reads, beside ``--images`` and ``--output``."""
    group = parser.add_argument_group("masks", "either those of a folder, or SAM's own")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="NAME/ with a binary PNG a mask, or NAME.json or NAME.json.gz with COCO RLEs",
    )
    source.add_argument("--sam", choices=sorted(key for key, _ in SAM_BACKEND_REGISTRY))
    group.add_argument("--sam-type", metavar="T", help="vit_b, vit_l, vit_h; hiera_t ... hiera_l")
    group.add_argument("--sam-checkpoint", metavar="FILE", help="the tiny ones are in the package")
    group.add_argument("--device", metavar="D", help="cuda, cuda:1 or cpu; default: cuda if any")
    group.add_argument(
        "--mask-cache",
        type=Path,
        metavar="DIR",
        help=f"where SAM's masks are kept; default: {_CACHE_FOLDER} in the output folder",
    )
    automatic = parser.add_argument_group("SAM's automatic masks", "SAM's own names and defaults")
    for field in fields(AutomaticMaskSettings):
        automatic.add_argument(
            _option(field.name),
            type=type(field.default),
            metavar="N" if isinstance(field.default, int) else "X",
            help=f"default: {field.default:.4g}",
        )


def mask_source_from(args: argparse.Namespace) -> MaskFolder | SamMasks:
    """Where the masks come from that a command line asks for.

    Raises:
        ConfigError: options contradict each other, or one is missing.
        DatasetError: the folder of masks is missing.
        InputError: a setting of SAM's masks is out of range.
    """
    names = [field.name for field in fields(AutomaticMaskSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.masks is not None:
        needless = [name for name in (*_SAM_ONLY, *given) if getattr(args, name) is not None]
        if needless:
            raise ConfigError(
                f"{_option(needless[0])} is for masks that SAM makes, but --masks gives those of a "
                "folder. Leave one of them out."
            )
        return MaskFolder(check_folder(args.masks, "masks"))
    if args.images is None:
        raise ConfigError("--sam needs --images: SAM makes the masks of images")
    _check_model(args)
    return SamMasks(
        backend=args.sam,
        model_type=args.sam_type or "",
        checkpoint=args.sam_checkpoint or "",
        device=_device(args.device or AUTO_DEVICE),
        images=args.images,
        cache=args.mask_cache or args.output / _CACHE_FOLDER,
        automatic=AutomaticMaskSettings(**given),
    )


def _check_model(args: argparse.Namespace) -> None:
    """Before anything is written, and in the options' names."""
    models = PUBLISHED_WEIGHTS.get(args.sam, {})
    if not models and args.sam_type is not None:
        raise ConfigError(f"--sam {args.sam} has no types. Leave --sam-type out.")
    if models and args.sam_type not in models:
        raise ConfigError(
            f"--sam-type is {args.sam_type!r}; --sam {args.sam} expects one of {', '.join(models)}"
        )
    if models and args.sam_checkpoint is None:
        raise ConfigError(
            f"--sam {args.sam} needs --sam-checkpoint: {' or '.join(models[args.sam_type])} from "
            f"{PUBLISHED_AT[args.sam]}"
        )
    if args.sam_checkpoint is not None and not Path(args.sam_checkpoint).is_file():
        raise ConfigError(
            f"--sam-checkpoint '{args.sam_checkpoint}' is no file. Give the path of the weights."
        )


def _device(name: str) -> str:
    if name == AUTO_DEVICE:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is no device; expected cuda, cuda:1 or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: PyTorch finds no GPU here; use --device cpu")
    return name


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
