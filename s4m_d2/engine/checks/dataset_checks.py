"""Data sets are looked at before training starts, so that it does not stop an hour later."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from s4m_d2.data import (
    DATASET_MAPPER_REGISTRY,
    ARPDatasetMapper,
    LabeledDatasetMapper,
    labeled_dataset_names,
)
from s4m_d2.data.images import image_size
from s4m_d2.data.mappers import check_image_size
from s4m_d2.engine.checks.findings import Finding, collected, first_of, raise_all
from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import ConfigError, DatasetError, S4MError

logger = logging.getLogger(__name__)

SAMPLED_IMAGES = 8  # decoded of each data set, at equal distances
LISTED_CLASSES = 10  # with more, only the rarest and the most frequent are named
# What loaders of data sets raise when files are missing or malformed.
_LOADER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class DatasetCount:
    """Size of one data set.

    Attributes:
        role: "labeled", "unlabeled" or "test".
        name: in Detectron2's catalog.
        images: number of them; None if the data set cannot be loaded, as all that follows.
        instances: number of them, crowds excluded; None where annotations are not read.
        per_image: the smallest, mean and largest number of instances of an image; None likewise.
        per_class: instances by the name of the class, in the order of ids; None likewise.
        decoded: images (and their masks) that were read as a sample, without an error.
        remarks: what else the annotations hold.
    """

    role: str
    name: str
    images: int | None = None
    instances: int | None = None
    per_image: tuple[int, float, int] | None = None
    per_class: dict[str, int] | None = None
    decoded: int = 0
    remarks: str = ""

    def __str__(self) -> str:
        if self.images is None:
            return f"{self.name}: cannot be loaded"
        text = f"{self.name}: {self.images:,} images"
        if self.per_image is not None:
            low, mean, high = self.per_image
            text += f", {self.instances:,} instances ({low} / {mean:.1f} / {high} an image)"
        return f"{text}; {self.decoded} decoded" + f"; {self.remarks}" * bool(self.remarks)

    def classes(self) -> str:
        """Instances of each class, or of the rarest and the most frequent one."""
        counts = self.per_class or {}
        if len(counts) <= LISTED_CLASSES:
            return ", ".join(f"{name} {count:,}" for name, count in counts.items())
        low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        return f"{len(counts)} classes, from {low} {counts[low]:,} to {high} {counts[high]:,}"


def check_datasets(cfg: CfgNode) -> list[DatasetCount]:
    """Load every data set of a training run and look at a few images of each.

    The counts are logged as a table. Unreadable unlabeled images are training's business, which
    skips and counts them, unless no image that was looked at can be read.

    Raises:
        ConfigError: the number of classes is not the data set's.
        DatasetError: a data set is unknown, missing or empty; an image or annotation is damaged,
            of another size or of a class out of range; an image is in two sets, or twice in one.
            If there are several problems, all are listed.
    """
    results = list(inspect_datasets(cfg))
    raise_all(error for _, errors, _ in results for error in errors)
    for _, _, warnings in results:
        for warning in warnings:
            logger.warning("%s", warning)
    counts = [count for count, _, _ in results]
    rows = [(c.role, c.name, c.images, c.instances) for c in counts]
    table = tabulate(rows, ("role", "data set", "images", "instances"), missingval="not read")
    logger.info("Data sets:\n%s", table)
    return counts


def dataset_findings(cfg: CfgNode, settings_are_right: bool = True) -> Iterator[Finding]:
    """The same as lines of a report, nothing raised: one a data set, and one for its classes.

    Where settings are wrong, images are decoded only, and not augmented.
    """
    for count, errors, warnings in inspect_datasets(cfg, settings_are_right):
        yield Finding(f"{count.role} data", str(count), tuple(errors), tuple(warnings))
        if count.per_class is not None and not errors:
            yield _class_finding(count)


def _class_finding(count: DatasetCount) -> Finding:
    absent = [name for name, number in (count.per_class or {}).items() if not number]
    warnings = []
    if absent and count.role == "labeled":
        warnings.append(
            f"'{count.name}' has no instance of {', '.join(absent)}: the model cannot learn it. "
            "Label images of it, or choose others: a larger split, S4M.SPLIT_SEED, S4M.SPLIT_FILE."
        )
    return Finding(f"{count.role} classes", count.classes(), (), tuple(warnings))


Inspection = tuple[DatasetCount, list[S4MError], list[str]]


def inspect_datasets(cfg: CfgNode, settings_are_right: bool = True) -> Iterator[Inspection]:
    """(size, errors, warnings) of each data set of a run."""
    unlabeled = cfg.DATASETS.UNLABELED if runs_stage(cfg, "student") else ()
    try:
        labeled = labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    except S4MError as error:
        yield DatasetCount("labeled", ", ".join(cfg.DATASETS.TRAIN)), [error], []
        labeled = ()
    roles = {"labeled": labeled, "unlabeled": unlabeled, "test": cfg.DATASETS.TEST}
    owners: dict[str, tuple[str, str]] = {}
    for role, names in roles.items():
        mapper = _mapper(cfg, role, settings_are_right)
        for name in names:
            try:
                records = load_records(name)
            except S4MError as error:
                yield DatasetCount(role, name), [error], []
                continue
            shared = _shared_images(owners, role, name, records)
            if role == "unlabeled":
                count, errors, warnings = _inspect_unlabeled(name, records, mapper)
            else:
                count, errors, warnings = _inspect_annotated(cfg, role, name, records, mapper)
            yield count, [*shared, *errors], warnings


def load_records(name: str) -> list[dict]:
    """A registered data set, or a DatasetError that says what is wrong with it."""
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"The data set '{name}' is not registered. Registered are: "
            f"{', '.join(sorted(DatasetCatalog.list()))}."
        )
    try:
        records = DatasetCatalog.get(name)
    except DatasetError:
        raise
    except _LOADER_ERRORS as error:
        raise DatasetError(
            f"The data set '{name}' cannot be loaded: {error}. Correct its files: relative paths "
            "lie under $DETECTRON2_DATASETS (default: datasets), and datasets/README.md shows the "
            "layout."
        ) from error
    if not records:
        raise DatasetError(
            f"The data set '{name}' has no images. Complete it, or take it out of DATASETS."
        )
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise DatasetError(
                f"The data set '{name}': record {index} has no 'file_name'. Correct its loader, "
                "which must return Detectron2's records: dictionaries with the path of an image."
            )
    return records


def _shared_images(
    owners: dict[str, tuple[str, str]], role: str, name: str, records: Sequence[dict]
) -> list[S4MError]:
    """No image twice in a role, and no test image in training; labeled ones may be unlabeled too.

    ``owners`` maps the images seen so far to (role, data set), and takes up these.
    """
    shared = []
    for record in records:
        path = os.path.abspath(record["file_name"])
        other_role, other = owners.get(path, (None, None))
        if other_role == role or (other_role and role == "test"):
            shared.append(
                f"{path} is in '{other}' ({other_role}) and in '{name}' ({role}). "
                "Remove it from one, or name other data sets."
            )
        owners[path] = role, name
    return [DatasetError(first_of(shared))] if shared else []


def sampled(records: Sequence[dict]) -> list[dict]:
    """A few records at equal distances, the first and the last among them."""
    count = min(SAMPLED_IMAGES, len(records))
    steps = max(count - 1, 1)
    return [records[step * (len(records) - 1) // steps] for step in range(count)]


def _to_look_at(records: Sequence[dict]) -> list[dict]:
    """A sample, and the narrowest image, of which resizing may leave nothing."""
    sample = sampled(records)
    narrowest = max(records, key=_narrowness)
    return sample if any(record is narrowest for record in sample) else [*sample, narrowest]


def _narrowness(record: dict) -> float:
    """Ratio of an image's sides; 0 where its size is not known."""
    sides = [side for key in ("height", "width") if isinstance(side := record.get(key), int)]
    return max(sides) / max(min(sides), 1) if len(sides) == 2 else 0


def _mapper(cfg: CfgNode, role: str, settings_are_right: bool) -> Callable[[dict], dict]:
    """The mapper of training, or one that only decodes, to test or where settings are wrong."""
    names = {"labeled": cfg.INPUT.DATASET_MAPPER_NAME, "unlabeled": cfg.S4M.UNLABELED_MAPPER}
    if role in names and settings_are_right:
        return DATASET_MAPPER_REGISTRY.get(names[role])(cfg, True)
    plain = {"geometry": (), "color": None, "image_format": cfg.INPUT.FORMAT}
    if role == "unlabeled":
        return ARPDatasetMapper(**plain)
    return LabeledDatasetMapper(**plain, num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)


def _refused(mapper: Callable[[dict], dict], sample: Sequence[dict]) -> dict[str, str]:
    """The images that a mapper refuses, by path, and why."""
    refused = {}
    for seed, record in enumerate(sample):
        try:
            mapper({**record, "seeds": {"augment": seed}})
        except DatasetError as error:
            refused[record["file_name"]] = str(error)
    return refused


def _by_reason(refused: dict[str, str]) -> list[str]:
    """Of messages that differ in the image alone, the first and the number of the others."""
    alike: dict[str, list[str]] = {}
    for file_name, reason in refused.items():
        alike.setdefault(reason.replace(file_name, ""), []).append(reason)
    return [first_of(reasons) for reasons in alike.values()]


def _inspect_unlabeled(
    name: str, records: Sequence[dict], mapper: Callable[[dict], dict]
) -> Inspection:
    sample = _to_look_at(records)
    refused = _refused(mapper, sample)
    decoded = len(sample) - len(refused)
    refused |= {r["file_name"]: r["unreadable"] for r in records if "unreadable" in r}
    reasons = _by_reason(refused)
    count = DatasetCount("unlabeled", name, len(records), decoded=decoded)
    if decoded:
        return count, [], [f"Unlabeled data set '{name}': {reason}" for reason in reasons]
    whole = DatasetError(
        f"The unlabeled data set '{name}': none of {len(sample)} sampled images can be used. "
        f"{reasons[0]}"
    )
    return count, [whole], []


def _inspect_annotated(
    cfg: CfgNode, role: str, name: str, records: Sequence[dict], mapper: Callable[[dict], dict]
) -> Inspection:
    errors: list[S4MError] = []
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is not None and len(classes) != num_classes:
        errors.append(
            ConfigError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; expected {len(classes)}, the "
                f"number of classes of '{name}'."
            )
        )
    per_image, per_class, out_of_range = _count_instances(name, records, num_classes)
    if out_of_range and not errors:  # with another number of classes, that is the cause
        errors.append(DatasetError(first_of(out_of_range)))
    if not any(per_image):
        errors.append(
            DatasetError(
                f"The data set '{name}' has {len(records)} images and no instance: there is "
                "nothing to learn from or to evaluate. Choose a larger split, or check its "
                "annotations."
            )
        )
    decoded = 0
    if not errors:  # else every image would repeat them
        sample = _to_look_at(records)
        if any(map(_size_errors, sample)):
            errors += _all_size_errors(records)
        else:
            refused = _refused(mapper, sample)
            decoded = len(sample) - len(refused)
            errors += [DatasetError(reason) for reason in _by_reason(refused)]
    findings = MetadataCatalog.get(name).get("findings")  # of our reader
    names = classes if classes is not None else [str(label) for label in range(num_classes)]
    count = DatasetCount(
        role,
        name,
        len(records),
        sum(per_image),
        (min(per_image), sum(per_image) / len(per_image), max(per_image)),
        {class_name: per_class[label] for label, class_name in enumerate(names)},
        decoded,
        findings.summary if findings else "",
    )
    return count, errors, findings.warnings if findings else []


def _size_errors(record: dict) -> list[S4MError]:
    """None or one, from the header of the image; one that is damaged has another error."""
    try:
        size = image_size(record["file_name"])
    except DatasetError:
        return []
    return collected(check_image_size, record, size)


def _all_size_errors(records: Sequence[dict]) -> list[S4MError]:
    wrong = [error for record in records for error in _size_errors(record)]
    text = f"{len(wrong)} of {len(records)} images have another size than their annotations."
    return [DatasetError(f"{text} {wrong[0]}")]


def _count_instances(
    name: str, records: Sequence[dict], num_classes: int
) -> tuple[list[int], Counter[int], list[str]]:
    """Instances of each image and of each class, crowds excluded; ids that are out of range."""
    per_image: list[int] = []
    per_class: Counter[int] = Counter()
    out_of_range: list[str] = []
    for record in records:
        annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        per_image.append(len(annotations))
        for label in (annotation.get("category_id") for annotation in annotations):
            if label in range(num_classes):
                per_class[label] += 1
            else:
                out_of_range.append(
                    f"Data set '{name}': an annotation of {record['file_name']} has the class id "
                    f"{label}; expected one from 0 to {num_classes - 1}. Correct the annotation, "
                    "or the map of the data set's ids to contiguous ones."
                )
    return per_image, per_class, out_of_range
