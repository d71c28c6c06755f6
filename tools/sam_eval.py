#!/usr/bin/env python
"""Measure a SAM on labeled images: IoU of its masks for prompt points with the labels.

    python tools/sam_eval.py --labeled val.json --images val --clicks 3 --crop 256

SAM is prompted with points drawn uniformly inside each mask of at least 40 px (if the image's
longer side is scaled to 256 px). As in S4M, the mask with the highest predicted IoU of three is
used; "best" is the one with the highest true IoU. Sizes are the side of a square of the mask's
area, in the same px.
"""

import argparse
import sys

from tabulate import tabulate
from tiny_sam_data import load_records
from tqdm import tqdm

from s4m_d2.commands.sepl import DEVICES
from s4m_d2.engine.command.arguments import command_parser, natural, positive
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.labeling.sam_quality import measure_sam
from s4m_d2.sam import SAM_BACKEND_REGISTRY, build_sam_backend


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--labeled", required=True, metavar="JSON", help="COCO annotations")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--held-out", action="store_true",
                        help="only the fifth that tools/train_tiny_sam.py leaves out")  # fmt: skip
    parser.add_argument("--clicks", type=positive, default=3, help="per mask (default: 3)")
    parser.add_argument("--crop", type=natural, default=0, help="px; 0, the default: whole images")
    parser.add_argument("--seed", type=int, default=0, help="of the clicks")
    backends = sorted(key for key, _ in SAM_BACKEND_REGISTRY)
    parser.add_argument("--sam", choices=backends, default="tiny", help="default: tiny")
    parser.add_argument("--sam-type", default="", metavar="T", help="vit_b ... hiera_l")
    parser.add_argument("--sam-checkpoint", default="", metavar="FILE")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    return parser.parse_args(arguments)


@exit_status
def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    options = {"BACKEND": args.sam, "MODEL_TYPE": args.sam_type, "CHECKPOINT": args.sam_checkpoint}
    words = [word for key, value in options.items() for word in (f"S4M.SAM.{key}", repr(value))]
    cfg = load_config("", ["MODEL.DEVICE", args.device, *words])
    classes, trained, held_out = load_records(args.labeled, args.images)
    records = held_out if args.held_out else [*trained, *held_out]
    backend, progress = build_sam_backend(cfg), tqdm(records, disable=None)
    quality = measure_sam(backend, progress, clicks=args.clicks, crop=args.crop, seed=args.seed)
    print(f"{len(records)} images, {args.clicks} clicks per mask, seed {args.seed}:")
    rows = [group.values() for group in quality.groups(classes)]
    print(tabulate(rows, ["", "masks", "IoU", "best"], floatfmt=".3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
