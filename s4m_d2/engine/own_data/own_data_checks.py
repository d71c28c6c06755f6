"""Keys of S4M.DATA that cannot work, and files and folders that are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode

from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import ConfigError, DatasetError, S4MError

_NAMES = ("DATASETS.TRAIN", "DATASETS.UNLABELED", "DATASETS.TEST")


def own_data_errors(
    cfg: CfgNode, overrides: Sequence[str], *, eval_only: bool
) -> Iterator[S4MError]:
    """Keys of S4M.DATA that are out of range, or do not fit each other or the overridden keys."""
    data = cfg.S4M.DATA
    if not data.LABELED:
        yield ConfigError(
            "S4M.DATA names own data, but S4M.DATA.LABELED (--labeled) is empty. Give the COCO "
            "json of the labeled images."
        )
    if runs_stage(cfg, "student") and not data.UNLABELED and not eval_only:
        yield ConfigError(
            "S4M.DATA.UNLABELED (--unlabeled) is empty: stage 2 needs a folder of unlabeled "
            "images. (S4M.STAGE teacher runs stage 1 alone.)"
        )
    if not 0 <= data.VAL_FRACTION < 1:
        yield ConfigError(
            f"S4M.DATA.VAL_FRACTION is {data.VAL_FRACTION}; expected at least 0 and below 1."
        )
    for key in _NAMES:
        if key in overrides:
            yield ConfigError(
                f"{key} and S4M.DATA.LABELED (--labeled) are both given. Name registered data "
                "sets, or your own files: not both."
            )
    if cfg.S4M.SPLIT_FILE or cfg.S4M.SPLIT_SEED:
        yield ConfigError(
            "S4M.SPLIT_FILE and S4M.SPLIT_SEED choose from registered data sets, not from "
            "S4M.DATA.LABELED. Leave them; give validation images of your choice with --val."
        )


def missing_errors(cfg: CfgNode, *, eval_only: bool) -> Iterator[S4MError]:
    """Files and folders that are not there."""
    options = {"LABELED": "labeled", "IMAGES": "images", "VAL": "val", "VAL_IMAGES": "val-images"}
    if not eval_only:
        options["UNLABELED"] = "unlabeled"
    for key, option in options.items():
        path = cfg.S4M.DATA[key]
        is_json = key in ("LABELED", "VAL")
        if path and not (os.path.isfile if is_json else os.path.isdir)(path):
            what = "file: give a COCO json of instances" if is_json else "folder: give one"
            yield DatasetError(f"--{option} (S4M.DATA.{key}): {path} is no {what}.")
