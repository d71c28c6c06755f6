"""Data sets are looked at before training starts, so that it does not stop an hour later."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.data import (
    DATASET_MAPPER_REGISTRY,
    ARPDatasetMapper,
    LabeledDatasetMapper,
    labeled_dataset_names,
)
from s4m_d2.engine.checks.findings import Finding, first_of, raise_all
from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import ConfigError, DatasetError, S4MError
from s4m_d2.visualization import evenly_spaced

SAMPLED_IMAGES = 8  # decoded of each data set
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
Mapper = Callable[[dict], dict]


def check_datasets(cfg: CfgNode) -> None:
    """Load every data set of a training run and look at a few images of each.

    Raises:
        ConfigError: the number of classes is not the data set's.
        DatasetError: a data set is unknown, missing or empty; an image or annotation is damaged,
            of another size or of a class out of range; an image is in two sets, or twice in one.
            If there are several problems, all are listed.
    """
    raise_all(error for finding in dataset_findings(cfg) for error in finding.errors)


def dataset_findings(cfg: CfgNode, settings_are_right: bool = True) -> Iterator[Finding]:
    """The same as lines of a report, nothing raised: one a data set, and one for its classes.

    Unreadable unlabeled images are training's business, which skips and counts them, unless no
    image that was looked at can be read. Where settings are wrong, images are decoded only, and
    not augmented.
    """
    try:
        labeled = labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    except S4MError as error:
        yield Finding(
            "labeled data", f"{', '.join(cfg.DATASETS.TRAIN)}: cannot be loaded", (error,)
        )
        labeled = ()
    unlabeled = cfg.DATASETS.UNLABELED if runs_stage(cfg, "student") else ()
    roles = {"labeled": labeled, "unlabeled": unlabeled, "test": cfg.DATASETS.TEST}
    owners: dict[str, tuple[str, str]] = {}
    for role, names in roles.items():
        mapper = _mapper(cfg, role, settings_are_right)
        for name in names:
            try:
                records = load_records(name)
            except S4MError as error:
                yield Finding(f"{role} data", f"{name}: cannot be loaded", (error,))
                continue
            shared = _shared_images(owners, role, name, records)
            if role == "unlabeled":
                yield _unlabeled_finding(name, records, mapper, shared)
            else:
                classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
                yield from _annotated_findings(role, name, records, mapper, shared, classes)


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


def _to_look_at(records: Sequence[dict]) -> list[dict]:
    """A sample, and the narrowest image, of which resizing may leave nothing."""
    sample = evenly_spaced(records, SAMPLED_IMAGES)
    narrowest = max(records, key=_narrowness)
    return sample if any(record is narrowest for record in sample) else [*sample, narrowest]


def _narrowness(record: dict) -> float:
    """Ratio of an image's sides; 0 where its size is not known."""
    sides = [side for key in ("height", "width") if isinstance(side := record.get(key), int)]
    return max(sides) / max(min(sides), 1) if len(sides) == 2 else 0


def _mapper(cfg: CfgNode, role: str, settings_are_right: bool) -> Mapper:
    """The mapper of training, or one that only decodes, to test or where settings are wrong."""
    names = {"labeled": cfg.INPUT.DATASET_MAPPER_NAME, "unlabeled": cfg.S4M.UNLABELED_MAPPER}
    if role in names and settings_are_right:
        return DATASET_MAPPER_REGISTRY.get(names[role])(cfg, True)
    plain = {"geometry": (), "color": None, "image_format": cfg.INPUT.FORMAT}
    if role == "unlabeled":
        return ARPDatasetMapper(**plain)
    return LabeledDatasetMapper(**plain, num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)


def _refused(mapper: Mapper, sample: Sequence[dict]) -> dict[str, str]:
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


def _unlabeled_finding(
    name: str, records: Sequence[dict], mapper: Mapper, shared: list[S4MError]
) -> Finding:
    sample = _to_look_at(records)
    refused = _refused(mapper, sample)
    decoded = len(sample) - len(refused)
    refused |= {r["file_name"]: r["unreadable"] for r in records if "unreadable" in r}
    reasons = _by_reason(refused)
    item, text = "unlabeled data", f"{name}: {len(records):,} images; {decoded} decoded"
    if decoded:
        warnings = (f"Unlabeled data set '{name}': {reason}" for reason in reasons)
        return Finding(item, text, tuple(shared), tuple(warnings))
    whole = DatasetError(
        f"The unlabeled data set '{name}': none of {len(sample)} sampled images can be used. "
        f"{reasons[0]}"
    )
    return Finding(item, text, (*shared, whole))


def _annotated_findings(
    role: str,
    name: str,
    records: Sequence[dict],
    mapper: Mapper,
    shared: list[S4MError],
    num_classes: int,
) -> Iterator[Finding]:
    """A line on the data set, with instances of an image (fewest / mean / most); its classes."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes") or [str(label) for label in range(num_classes)]
    per_image, per_class, errors = _count_instances(name, records, num_classes)
    if len(names) != num_classes:  # then that is the cause of ids that are out of range
        errors = [
            ConfigError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; expected {len(names)}, the "
                f"number of classes of '{name}'."
            )
        ]
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
        refused = _refused(mapper, sample)
        decoded = len(sample) - len(refused)
        errors += map(DatasetError, _by_reason(refused))
    found = metadata.get("findings")  # of our reader
    mean = sum(per_image) / len(per_image)
    text = f"{name}: {len(records):,} images, {sum(per_image):,} instances ({min(per_image)} / "
    text += f"{mean:.1f} / {max(per_image)} an image); {decoded} decoded"
    text += f"; {found.summary}" if found and found.summary else ""
    warnings = tuple(found.warnings) if found else ()
    yield Finding(f"{role} data", text, (*shared, *errors), warnings)
    if not shared and not errors:
        yield _class_finding(role, name, {n: per_class[label] for label, n in enumerate(names)})


def _class_finding(role: str, name: str, counts: dict[str, int]) -> Finding:
    """Instances of each class, or of the rarest and the most frequent one."""
    text = ", ".join(f"{label} {count:,}" for label, count in counts.items())
    if len(counts) > LISTED_CLASSES:
        low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        text = f"{len(counts)} classes, from {low} {counts[low]:,} to {high} {counts[high]:,}"
    absent = [label for label, count in counts.items() if not count]
    if role != "labeled" or not absent:
        return Finding(f"{role} classes", text)
    warning = (
        f"'{name}' has no instance of {', '.join(absent)}: the model cannot learn it. "
        "Label images of it, or choose others: a larger split, S4M.SPLIT_SEED, S4M.SPLIT_FILE."
    )
    return Finding(f"{role} classes", text, (), (warning,))


def _count_instances(
    name: str, records: Sequence[dict], num_classes: int
) -> tuple[list[int], Counter[int], list[S4MError]]:
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
    return per_image, per_class, [DatasetError(first_of(out_of_range))] if out_of_range else []
