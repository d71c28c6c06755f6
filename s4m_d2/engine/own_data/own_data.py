"""Runs on own data (S4M.DATA): checked, split, registered; the settings that follow from them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence

import torch
from detectron2.config import CfgNode

from s4m_d2.data import custom
from s4m_d2.data.annotations import Annotations, read_annotations
from s4m_d2.data.listing import list_unlabeled
from s4m_d2.engine.checks.findings import raise_all
from s4m_d2.engine.config_file import explicit_keys, load_config
from s4m_d2.engine.own_data import own_data_files as files
from s4m_d2.engine.own_data.derived_settings import Derived, Machine, apply, derive
from s4m_d2.engine.own_data.own_data_checks import missing_errors, own_data_errors
from s4m_d2.engine.own_data.own_data_facts import (
    absent_class_notes,
    data_facts,
    drawn_validation,
    query_notes,
)
from s4m_d2.engine.own_data.own_data_sets import OwnData
from s4m_d2.engine.stages import run_config, runs_stage
from s4m_d2.errors import DatasetError
from s4m_d2.files import digest
from s4m_d2.tiling import build_tiling

_PATHS = ("LABELED", "IMAGES", "UNLABELED", "VAL", "VAL_IMAGES")
_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
_REMEDY = (
    "--images and --val-images (S4M.DATA.IMAGES, VAL_IMAGES) name the folders that each "
    "'file_name' of the json starts from."
)


def load_run(
    config_file: str,
    opts: Sequence[str],
    *,
    resume: bool = False,
    eval_only: bool = False,
    num_processes: int = 1,
) -> tuple[CfgNode, OwnData | None]:
    """The config of a run as this machine runs it, and its own data, registered in this process.

    Args:
        config_file, opts: as :func:`~s4m_d2.engine.config_file.load_config` takes them.
        resume: the run continues what OUTPUT_DIR holds: images, annotations, split and settings
            that it began with; what has changed since is noted.
        eval_only: with the settings of the run that MODEL.WEIGHTS comes from, where it is known.
        num_processes: that share a batch, on all machines.

    Returns:
        a frozen config, and None where DATASETS names the data sets.

    Raises:
        ConfigError: keys do not fit each other.
        DatasetError: files or folders are missing, malformed or do not fit each other.
    """
    cfg = load_config(config_file, opts)
    if not any(getattr(cfg.S4M.DATA, key) for key in _PATHS):
        return run_config(cfg), None
    cfg = cfg.clone()
    cfg.defrost()
    for key in filter(cfg.S4M.DATA.get, _PATHS):
        cfg.S4M.DATA[key] = os.path.abspath(os.path.expanduser(cfg.S4M.DATA[key]))
    raise_all(own_data_errors(cfg, opts[::2], eval_only=eval_only))
    explicit = explicit_keys(config_file, opts)
    if _CLASSES not in opts[::2]:  # of a file it is another data set's
        explicit.discard(_CLASSES)
    folder = _stored_folder(cfg, resume=resume, eval_only=eval_only)
    if folder is None:
        raise_all(missing_errors(cfg, eval_only=eval_only))
        data = _begin(cfg, explicit, _machine(cfg, num_processes), eval_only)
    else:
        data = _continue(cfg, explicit, folder, eval_only)
    cfg.DATASETS.TRAIN = (custom.LABELED,)
    cfg.DATASETS.UNLABELED = (custom.UNLABELED,) if data.unlabeled_dir else ()
    cfg.DATASETS.TEST = (custom.VALIDATION,) if data.validation is not None else ()
    data.register()
    return run_config(cfg), data


def _machine(cfg: CfgNode, num_processes: int) -> Machine:
    if not cfg.MODEL.DEVICE.startswith("cuda") or not torch.cuda.is_available():
        return Machine(0, num_processes)
    return Machine(torch.cuda.get_device_properties(0).total_memory, num_processes)


def _stored_folder(cfg: CfgNode, *, resume: bool, eval_only: bool) -> str | None:
    """Where the data of the run lie that is continued or evaluated; None if nowhere."""
    if not (resume or eval_only):
        return None
    runs = [cfg.OUTPUT_DIR]
    if eval_only and cfg.MODEL.WEIGHTS:  # OUTPUT_DIR/student/model_final.pth
        runs.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(cfg.MODEL.WEIGHTS))))
    folders = [os.path.join(run, files.FOLDER) for run in runs]
    return next(filter(files.is_stored, folders), None)


def _image_dirs(cfg: CfgNode) -> tuple[str, str]:
    """Folders of the labeled images and of those of S4M.DATA.VAL."""
    data = cfg.S4M.DATA
    images = data.IMAGES or os.path.dirname(data.LABELED)
    return images, data.VAL_IMAGES or data.IMAGES or os.path.dirname(data.VAL)


def _begin(cfg: CfgNode, explicit: Collection[str], machine: Machine, eval_only: bool) -> OwnData:
    """The data of a new run; derived settings go into ``cfg``."""
    data = cfg.S4M.DATA
    images, val_images = _image_dirs(cfg)
    labeled = read_annotations(data.LABELED, images, remedy=_REMEDY)
    notes: list[str] = []
    if data.VAL:
        validation = read_annotations(data.VAL, val_images, classes=labeled.classes, remedy=_REMEDY)
    else:
        validation = labeled.part(drawn_validation(labeled, data.VAL_FRACTION))
        notes += absent_class_notes(validation) if validation.records else []
    held_out = {validation.name(record) for record in validation.records}
    train = {labeled.name(record) for record in labeled.records} - (set() if data.VAL else held_out)
    unlabeled: list[str] = []
    left_out: dict[str, int] = {}
    unlabeled_dir = data.UNLABELED if runs_stage(cfg, "student") and not eval_only else ""
    if unlabeled_dir:
        val_root = validation.image_root
        unlabeled, left_out = list_unlabeled(unlabeled_dir, [*held_out], val_root)
    tiling = build_tiling(cfg) if "INPUT.TILE.SIZE" in explicit else None
    facts = data_facts(labeled, train, len(unlabeled), len(held_out), tiling)
    classes = Derived(_CLASSES, len(labeled.classes), "categories of the json")
    settings = [classes] if _CLASSES not in explicit else []
    apply(cfg, settings)
    derived, kept = derive(cfg, facts, machine, explicit)
    stored = files.StoredData(
        classes=tuple(labeled.classes),
        settings=(*settings, *derived),
        unlabeled=tuple(unlabeled),
        labeled_digest=digest(data.LABELED),
        val_digest=digest(data.VAL) if data.VAL else "",
        left_out=left_out,
        has_val=bool(data.VAL or held_out),
    )
    folder = os.path.join(cfg.OUTPUT_DIR, files.FOLDER)
    return OwnData(
        stored=stored,
        labeled=labeled.part(train),
        validation=validation if stored.has_val else None,
        ground_truth=os.path.join(folder, files.EVALUATED if eval_only else files.VAL),
        unlabeled_dir=unlabeled_dir,
        folder=folder,
        is_new=not eval_only,
        notes=(*_evaluation_notes(validation), *notes)
        if eval_only
        else (*notes, *query_notes(cfg, facts)),
        kept=tuple(kept),
    )


def _continue(cfg: CfgNode, explicit: Collection[str], folder: str, eval_only: bool) -> OwnData:
    """The data of a run that began before; its settings go into ``cfg``."""
    stored = files.read_stored(folder)
    if runs_stage(cfg, "student") and not (stored.unlabeled or eval_only):
        weights = os.path.join(cfg.OUTPUT_DIR, "teacher", "model_final.pth")
        raise DatasetError(
            f"The run in '{cfg.OUTPUT_DIR}' began with stage 1 alone, without unlabeled images, so "
            "--resume cannot go on with stage 2. Start that in another OUTPUT_DIR, without "
            f"--resume, with S4M.STAGE student S4M.TEACHER_WEIGHTS {weights}"
        )
    apply(cfg, [setting for setting in stored.settings if setting.key not in explicit])
    images, val_images = _image_dirs(cfg)
    train = read_annotations(os.path.join(folder, files.TRAIN), images, remedy=_REMEDY)
    validation, truth = None, os.path.join(folder, files.VAL)
    classes = train.classes
    if eval_only and cfg.S4M.DATA.VAL:
        path = cfg.S4M.DATA.VAL
        validation = read_annotations(path, val_images, classes=classes, remedy=_REMEDY)
        truth = os.path.join(cfg.OUTPUT_DIR, files.FOLDER, files.EVALUATED)
    elif stored.has_val:
        folder_of_val = val_images if stored.val_digest else images
        validation = read_annotations(truth, folder_of_val, classes=classes, remedy=_REMEDY)
    unlabeled_dir = cfg.S4M.DATA.UNLABELED if stored.unlabeled and not eval_only else ""
    notes = (
        _evaluation_notes(validation) if eval_only else _changes(cfg, stored, folder, validation)
    )
    kept = tuple(setting.key for setting in stored.settings if setting.key in explicit)
    return OwnData(
        stored=stored,
        labeled=train,
        validation=validation,
        ground_truth=truth,
        unlabeled_dir=unlabeled_dir,
        folder=folder,
        is_new=False,
        notes=tuple(notes),
        kept=kept,
    )


def _evaluation_notes(validation: Annotations | None) -> list[str]:
    """What an evaluation alone says about its annotations; before training, the checks do."""
    if validation is None:
        return []
    none = f"{validation.json_file} has no instance to evaluate on: every AP is nan."
    found = next(iter(validation.instances()), None)
    return [*validation.findings.warnings, *[none] * (found is None)]


def _changes(
    cfg: CfgNode, stored: files.StoredData, folder: str, validation: Annotations | None
) -> Iterator[str]:
    """What is another than when the run began, and what that means."""
    digests = {cfg.S4M.DATA.LABELED: stored.labeled_digest, cfg.S4M.DATA.VAL: stored.val_digest}
    for path, before in digests.items():
        if before and digest(path) != before:
            yield (
                f"{path} is not what it was when the run began, which goes on with the annotations "
                f"in {folder}. To use the new ones, start a new run in another OUTPUT_DIR."
            )
    if not stored.unlabeled:
        return
    held_out = [validation.name(r) for r in validation.records] if validation else []
    val_root = validation.image_root if validation else ""
    found = set(list_unlabeled(cfg.S4M.DATA.UNLABELED, held_out, val_root)[0])
    added, gone = len(found - {*stored.unlabeled}), len({*stored.unlabeled} - found)
    if added:
        yield (
            f"Since the run began, {added:,} image(s) were added to {cfg.S4M.DATA.UNLABELED}: it "
            "goes on without them. To use them, start a new run in another OUTPUT_DIR."
        )
    if gone:
        yield (
            f"Since the run began, {gone:,} image(s) have gone from {cfg.S4M.DATA.UNLABELED}: each "
            "is skipped, up to S4M.MAX_SKIPPED_IMAGES. Put them back."
        )
