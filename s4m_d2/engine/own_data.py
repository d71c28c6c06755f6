"""Runs on own data (S4M.DATA): checked, split, registered; the settings that follow from them."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from s4m_d2.data import splits
from s4m_d2.data.annotations import Annotations, Findings, read_annotations, targets
from s4m_d2.data.images import copies, list_unlabeled, photograph
from s4m_d2.data.merging import merge_annotations
from s4m_d2.engine.config_file import explicit_keys, load_config
from s4m_d2.engine.derived_settings import (
    SET_BY_USER,
    DataFacts,
    Derived,
    Machine,
    apply,
    data_facts,
    derive,
)
from s4m_d2.engine.stages import run_config, run_folder, runs_stage
from s4m_d2.errors import ConfigError, DatasetError, Finding, S4MError, first_names, raise_all
from s4m_d2.files import digest, write_json
from s4m_d2.report.run import CONFIG
from s4m_d2.tiling import build_tiling

logger = logging.getLogger(__name__)

# OUTPUT_DIR/data: what a run began with, so that it can be continued and looked at.
FOLDER = "data"
TRAIN, VAL, EVALUATED = "train.json", "val.json", "evaluated.json"  # COCO files
UNLABELED = "unlabeled.json"  # list of paths below S4M.DATA.UNLABELED
FRAMES = "frames"  # folder of its videos' frames
SETTINGS = "settings.json"  # written last: with it, the folder is complete
_VERSION = 1

_PATHS = ("LABELED", "IMAGES", "UNLABELED", "VAL", "VAL_IMAGES")


def _read(json_file: str, image_root: str, classes: Sequence[str] = ()) -> Annotations:
    remedy = (
        "--labeled and --val (S4M.DATA.LABELED, VAL) name COCO files of instances, --images and "
        "--val-images (S4M.DATA.IMAGES, VAL_IMAGES) the folders that each 'file_name' starts from."
    )
    return read_annotations(json_file, image_root, classes=classes, remedy=remedy)


@dataclass(frozen=True)
class StoredData:
    """What the run's folder of data holds beside the annotations."""

    classes: tuple[str, ...]  #: names in the order of contiguous ids
    settings: tuple[Derived, ...]  #: that were derived, or set instead
    #: paths below S4M.DATA.UNLABELED, absolute for frames; (): stage 2 was not asked for
    unlabeled: tuple[str, ...]
    labeled_digest: str  #: of the user's files when the run began
    val_digest: str  #: the same; "": drawn
    left_out: dict[str, int]  #: unlabeled images that were left out, by reason
    has_val: bool  #: whether there is a validation set
    image_root: str = ""  #: folder that the file names of TRAIN start from; "": not known
    val_image_root: str = ""  #: of VAL


def is_stored(folder: str) -> bool:
    """Whether a run's data were stored in this folder."""
    return os.path.isfile(os.path.join(folder, SETTINGS))


def class_lists(cfg: CfgNode, weights: str) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the classes of a file of weights and of the run; (), if no run on own data wrote the
    file."""
    folder = os.path.join(run_folder(weights), FOLDER)
    if not (weights and is_stored(folder)):
        return (), ()
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", ())
    return read_stored(folder).classes, classes


def store(folder: str, stored: StoredData, train: dict) -> None:
    """Write what a run begins with, after VAL; ``train`` is the content of a COCO file."""
    write_json(os.path.join(folder, TRAIN), train)
    content = {"version": _VERSION, **asdict(stored)}
    frames = os.path.join(os.path.abspath(folder), FRAMES)
    names = [path.removeprefix(frames) for path in content.pop("unlabeled")]  # of a frame: /...
    write_json(os.path.join(folder, UNLABELED), names, indent=0)
    write_json(os.path.join(folder, SETTINGS), content, indent=2)


def read_stored(folder: str) -> StoredData:
    """What :func:`store` wrote; DatasetError if a file is missing or was changed."""
    try:
        files = (Path(folder, name).read_text("utf-8") for name in (SETTINGS, UNLABELED))
        content, unlabeled = map(json.loads, files)
        frames = os.path.join(os.path.abspath(folder), FRAMES)  # where the folder is now
        content["unlabeled"] = tuple(frames * os.path.isabs(name) + name for name in unlabeled)
        if (version := content.pop("version")) != _VERSION:
            raise ValueError(f"version {version}, expected {_VERSION}")
        content["classes"] = tuple(content["classes"])
        content["settings"] = tuple(Derived(**setting) for setting in content["settings"])
        return StoredData(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f"'{folder}', what the run began with, cannot be read: {error!r}. Restore the folder, "
            "or start a new run in another OUTPUT_DIR."
        ) from error


@dataclass(frozen=True)
class OwnData:
    """What a run on own data trains and is evaluated on."""

    stored: StoredData  #: classes, derived settings and unlabeled images
    labeled: Annotations
    validation: Annotations | None  #: None: no evaluation
    ground_truth: str  #: COCO file that evaluation compares with; exists after :meth:`save`
    folder: str  #: where the run keeps its data
    is_new: bool  #: the run begins: everything is to be stored there
    notes: Sequence[str]  #: what the user should know

    def save(self, *, warn: bool = False) -> None:
        """Write what the run begins with, where that is not done; all processes call it.

        ``warn``: also log the notes, where no check before the run has shown them.
        """
        if comm.is_main_process():
            if self.validation is not None and self.ground_truth != self.validation.json_file:
                write_json(self.ground_truth, self.validation.to_coco())
            if self.is_new:
                store(self.folder, self.stored, self.labeled.to_coco())
            for note in self.notes if warn else ():
                logger.warning("%s", note)
        comm.synchronize()  # the others read the ground truth when they build an evaluator

    def findings(self) -> list[Finding]:
        """Lines of the report before training: the classes, then each derived setting."""
        names, settings = self.stored.classes, self.stored.settings
        text = f"{len(names)} class{'es' * (len(names) > 1)}: {first_names(names, 20)}"
        for reason, count in self.stored.left_out.items():
            text += f"; left out of the unlabeled folder: {count:,} {reason}"
        if not self.is_new:
            text += f"; as the run began, in {os.path.relpath(self.folder)}"
        derived = [f"{s.key} {s.value}: {s.reason}" for s in settings if s.reason != SET_BY_USER]
        kept = [f"{s.key} {s.value}" for s in settings if s.reason == SET_BY_USER]
        lines = [Finding("own data", text, (), self.notes)]
        lines += [Finding("derived", line) for line in derived]
        return lines + [Finding(SET_BY_USER, ", ".join(kept))] * bool(kept)


def load_run(
    config_file: str,
    opts: Sequence[str],
    *,
    resume: bool = False,
    eval_only: bool = False,
    num_processes: int = 1,
    frames_dir: str = "",
) -> tuple[CfgNode, OwnData | None]:
    """The config of a run as this machine runs it, frozen, and its own data, registered in this
    process; None where DATASETS names the data sets.

    Args:
        config_file, opts: as :func:`~s4m_d2.engine.config_file.load_config` takes them.
        resume: the run continues what OUTPUT_DIR holds: images, annotations, split and settings
            that it began with; what has changed since is noted.
        eval_only: with the settings of the run that MODEL.WEIGHTS comes from, where it is known.
        num_processes: that share a batch, on all machines.
        frames_dir: of videos' frames; "": OUTPUT_DIR/data/frames, where the run keeps them.

    S4MError: keys, files or folders are missing, malformed or do not fit each other.
    """
    cfg, explicit = load_config(config_file, opts), explicit_keys(config_file, opts)
    cfg.defrost()
    cfg.S4M.ARP.GATED &= "S4M.ARP.ENABLED" not in explicit or "S4M.ARP.GATED" in explicit
    former = _former_paths(cfg) if resume else {}
    cfg.S4M.DATA.update({key: former[key] for key in former if not cfg.S4M.DATA[key]})
    if not any(getattr(cfg.S4M.DATA, key) for key in _PATHS):
        return run_config(cfg), None
    for key in filter(cfg.S4M.DATA.get, _PATHS):
        paths = cfg.S4M.DATA[key]
        cfg.S4M.DATA[key] = _full(paths) if isinstance(paths, str) else tuple(map(_full, paths))
    folders = [os.path.join(cfg.OUTPUT_DIR, FOLDER)] if resume or eval_only else []
    if eval_only and cfg.MODEL.WEIGHTS:
        folders.insert(0, os.path.join(run_folder(cfg.MODEL.WEIGHTS), FOLDER))
    folder = next(filter(is_stored, folders), None)
    raise_all(_key_errors(cfg, opts[::2], needs_labeled=not (eval_only and folder)))
    explicit -= {"MODEL.SEM_SEG_HEAD.NUM_CLASSES"} - {*opts[::2]}  # of a file: of other data
    if folder is None:
        data = _begin(cfg, explicit, num_processes, eval_only, frames_dir)
    else:
        data = _continue(cfg, explicit, folder, eval_only, former)
    unlabeled = data.stored.unlabeled if cfg.S4M.DATA.UNLABELED else ()
    cfg.DATASETS.TRAIN = (splits.OWN_LABELED,)
    cfg.DATASETS.UNLABELED = (splits.OWN_UNLABELED,) if unlabeled else ()
    cfg.DATASETS.TEST = (splits.OWN_VALIDATION,) if data.validation else ()
    splits.register_own_data(
        data.labeled, data.validation, data.ground_truth, cfg.S4M.DATA.UNLABELED, unlabeled
    )
    return run_config(cfg), data


def _former_paths(cfg: CfgNode) -> dict[str, Any]:
    """Paths of own data when the run in OUTPUT_DIR was last started; {}: there is none."""
    path = os.path.join(cfg.OUTPUT_DIR, CONFIG)
    former = load_config(path).S4M.DATA if os.path.isfile(path) else {}
    return {key: former[key] for key in _PATHS if key in former}


def _full(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _key_errors(cfg: CfgNode, overrides: Sequence[str], needs_labeled: bool) -> Iterator[S4MError]:
    data = cfg.S4M.DATA
    if needs_labeled and not data.LABELED:
        yield ConfigError("--labeled (S4M.DATA.LABELED) is missing. Give a COCO json of instances.")
    if len(data.IMAGES) not in (0, 1, len(data.LABELED)):
        yield ConfigError(
            f"--images (S4M.DATA.IMAGES) names {len(data.IMAGES)} folders for {len(data.LABELED)} "
            "files of --labeled. Give one for all files, or one for each, in their order."
        )
    if data.EVERY < 1:
        yield ConfigError(f"--every (S4M.DATA.EVERY) is {data.EVERY}; expected at least 1.")
    for key in ("DATASETS.TRAIN", "DATASETS.UNLABELED", "DATASETS.TEST"):
        if key in overrides:
            yield ConfigError(f"{key} and S4M.DATA.LABELED (--labeled) are both given: give one.")


def _image_dirs(cfg: CfgNode) -> tuple[list[str], str]:
    data = cfg.S4M.DATA
    images = data.IMAGES or tuple(map(os.path.dirname, data.LABELED))
    only = data.IMAGES[0] if len(data.IMAGES) == 1 else os.path.dirname(data.VAL)
    return [*images] * (len(data.LABELED) // max(len(images), 1)), data.VAL_IMAGES or only


def _labeled_digest(cfg: CfgNode) -> str:
    return " ".join(map(digest, cfg.S4M.DATA.LABELED))


def _drawn(labeled: Annotations, own: Mapping[str, str], fraction: float) -> list[str]:
    """Names of the images held out, which depend on their ``own`` names, in their files."""
    names: dict[str, list[str]] = defaultdict(list)  # of the copies of a photograph
    classes_of: dict[str, set[str]] = defaultdict(set)
    taken: set[str] = set()
    for record in labeled.records:
        name, key = labeled.name(record), own[record["file_name"]]
        shown = photograph(name if key in taken else key)
        taken.add(key)
        names[shown].append(name)
        classes_of[shown] |= {labeled.classes[a["category_id"]] for a in targets(record)}
    return [name for key in splits.draw_validation(classes_of, fraction) for name in names[key]]


@dataclass(frozen=True)
class _Split:
    """The labeled images of a new run."""

    labeled: Annotations  #: all of them
    train: Annotations
    validation: Annotations
    held_out: dict[str, str]  #: paths of the validation images: their names in the user's files
    notes: list[str]  #: what the user should know


def _split(cfg: CfgNode) -> _Split:
    data = cfg.S4M.DATA
    images, val_images = _image_dirs(cfg)
    parts = [_read(*pair) for pair in zip(data.LABELED, images, strict=True)]
    labeled, notes = merge_annotations(parts)
    own = {record["file_name"]: part.name(record) for part in parts for record in part.records}
    if data.VAL:
        train, validation = labeled, _read(data.VAL, val_images, classes=labeled.classes)
        own = {record["file_name"]: validation.name(record) for record in validation.records}
    else:
        draws = bool(labeled.records and data.VAL_FRACTION)
        held_out = _drawn(labeled, own, data.VAL_FRACTION) if draws else []
        train = labeled.part({labeled.name(record) for record in labeled.records} - {*held_out})
        validation = replace(labeled.part(held_out), findings=Findings())  # labeled has them
    known, given = ({r["file_name"] for r in s.records} for s in (train, validation))
    if again := copies(given - known, known):
        notes.append(
            f"{len(again):,} images of {data.VAL or 'the drawn validation set'} are copies of "
            f"labeled ones, such as {min(again)}: they raise AP. Remove one of each."
        )
    return _Split(labeled, train, validation, {path: own[path] for path in given}, notes)


def _begin(
    cfg: CfgNode, explicit: Collection[str], num_processes: int, eval_only: bool, frames_dir: str
) -> OwnData:
    """The data of a new run; derived settings go into ``cfg``."""
    data, folder = cfg.S4M.DATA, os.path.join(cfg.OUTPUT_DIR, FOLDER)
    split = _split(cfg)
    unlabeled: list[str] = []
    left_out: dict[str, int] = {}
    if runs_stage(cfg, "student") and not eval_only:
        if not data.UNLABELED:
            remedy = "Name a folder of images, or train stage 1 alone: S4M.STAGE teacher."
            raise ConfigError(f"--unlabeled (S4M.DATA.UNLABELED) is missing. {remedy}")
        unlabeled, left_out = list_unlabeled(
            data.UNLABELED,
            frames_dir or os.path.join(folder, FRAMES),
            data.EVERY,
            validation=split.held_out,
            labeled=[record["file_name"] for record in split.train.records],
        )
    tiling = build_tiling(cfg) if "INPUT.TILE.SIZE" in explicit else None
    facts = data_facts(split.labeled, split.train, len(unlabeled), len(split.held_out), tiling)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    settings = derive(cfg, facts, Machine(memory, num_processes), explicit)
    notes = [*split.notes, *_notes(cfg, facts, split, eval_only)]
    evaluated = split.validation if data.VAL or split.held_out else None
    stored = StoredData(
        classes=tuple(split.labeled.classes),
        settings=tuple(settings),
        unlabeled=tuple(unlabeled),
        labeled_digest=_labeled_digest(cfg),
        val_digest=digest(data.VAL),
        left_out=left_out,
        has_val=evaluated is not None,
        image_root=split.labeled.image_root,
        val_image_root=split.validation.image_root,
    )
    truth = os.path.join(folder, EVALUATED if eval_only else VAL)
    return OwnData(stored, split.train, evaluated, truth, folder, not eval_only, notes)


def _continue(
    cfg: CfgNode, explicit: Collection[str], folder: str, eval_only: bool, former: Mapping[str, Any]
) -> OwnData:
    """The data of a run that began before; its settings go into ``cfg``."""
    stored, data = read_stored(folder), cfg.S4M.DATA
    if runs_stage(cfg, "student") and not (stored.unlabeled or eval_only):
        weights = os.path.join(cfg.OUTPUT_DIR, "teacher", "model_final.pth")
        raise DatasetError(
            f"The run in '{cfg.OUTPUT_DIR}' has stage 1 alone: --resume cannot go on with stage 2. "
            f"Start that in another OUTPUT_DIR: S4M.STAGE student S4M.TEACHER_WEIGHTS {weights}"
        )
    stored = replace(stored, settings=tuple(apply(cfg, stored.settings, explicit)))
    folders, val_images = _image_dirs(cfg)
    has_changed = _labeled_digest(cfg) != stored.labeled_digest  # other files, of other folders
    images = os.path.commonpath(folders or [folder])
    if has_changed and os.path.isdir(stored.image_root):
        images = stored.image_root
    train = _read(os.path.join(folder, TRAIN), images, classes=stored.classes)
    validation, truth = None, os.path.join(folder, VAL)
    if eval_only and data.VAL:
        validation = _read(data.VAL, val_images, classes=train.classes)
        truth = os.path.join(cfg.OUTPUT_DIR, FOLDER, EVALUATED)
    elif stored.has_val:
        root = images
        if stored.val_digest:
            is_given = data.VAL or data.VAL_IMAGES
            root = val_images if is_given else stored.val_image_root or val_images
        validation = _read(truth, root, classes=train.classes)
    notes = [*(_evaluation_notes(validation) if eval_only else _changes(cfg, stored, former))]
    if eval_only and validation and has_changed and data.LABELED and not data.VAL:
        notes.append(
            f"{', '.join(data.LABELED)} is not what the run was trained on, and is not looked at: "
            f"evaluated are the run's validation images, {truth}. --val names others."
        )
    return OwnData(stored, train, validation, truth, folder, False, notes)


def _notes(cfg: CfgNode, facts: DataFacts, split: _Split, eval_only: bool) -> Iterator[str]:
    labeled, validation = split.labeled, split.validation
    absent = [labeled.classes[i] for i in sorted(labeled.indices() - validation.indices())]
    if validation.records and absent and not cfg.S4M.DATA.VAL:
        yield (
            f"The drawn validation set has no instance of {', '.join(absent)}: its AP says nothing "
            "about them. Label more such images, or give your own set with --val."
        )
    queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    if eval_only:
        yield from _evaluation_notes(validation)
    elif queries < facts.most_instances:
        yield (
            f"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES is {queries}, but one {facts.unit} has "
            f"{facts.most_instances} instances: the model cannot find them all. Use more queries."
        )


def _evaluation_notes(validation: Annotations | None) -> Iterator[str]:
    """What an evaluation alone says about its annotations; before training, the checks do."""
    if validation is not None:
        yield from validation.findings.warnings
        if not validation.indices():
            yield f"{validation.json_file} has no instance to evaluate on: every AP is nan."


def _changes(cfg: CfgNode, stored: StoredData, former: Mapping[str, Any]) -> Iterator[str]:
    data = cfg.S4M.DATA
    for key in ("IMAGES", "UNLABELED"):
        if former.get(key) and former[key] != data[key]:
            yield (
                f"S4M.DATA.{key} is {data[key]}, and was {former[key]}: the run goes on with the "
                "images that it began with, by their names. To use others, start in another "
                "OUTPUT_DIR."
            )
    labeled = ", ".join(data.LABELED), stored.labeled_digest, _labeled_digest(cfg)
    for paths, known, found in (labeled, (data.VAL, stored.val_digest, digest(data.VAL))):
        if paths and known and found != known:
            yield (
                f"{paths} is not what it was when the run began, which goes on with what it stored "
                f"in {cfg.OUTPUT_DIR}/{FOLDER}. To use the new one, start in another OUTPUT_DIR."
            )
