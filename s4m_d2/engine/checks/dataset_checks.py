"""Checks of the data sets before training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from s4m_d2.data import DATASET_MAPPER_REGISTRY, LabeledDatasetMapper, labeled_dataset_names
from s4m_d2.data.splits import load_records
from s4m_d2.engine.checks.findings import Finding, attempt, first_of
from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import ConfigError, DatasetError, S4MError
from s4m_d2.visualization import evenly_spaced

SAMPLED_IMAGES = 8  # decoded of each data set
LISTED_CLASSES = 10  # with more, only the rarest and the most frequent are listed
Mapper = Callable[[dict], dict]


def dataset_findings(cfg: CfgNode) -> Iterator[Finding]:
    """Lines of a report: per data set one, and one for its classes. A few images are decoded.

    Images in two sets, or twice in one, are errors too. Unreadable unlabeled images are one only if
    all of the sample are: training skips them.
    """
    train = cfg.DATASETS.TRAIN
    labeled, errors = attempt(labeled_dataset_names, train, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    if errors:
        yield Finding("labeled data", f"{', '.join(train)}: cannot be loaded", errors)
    unlabeled = cfg.DATASETS.UNLABELED if runs_stage(cfg, "student") else ()
    roles = {"labeled": labeled or (), "unlabeled": unlabeled, "test": cfg.DATASETS.TEST}
    owners: dict[str, tuple[str, str]] = {}
    for role, names in roles.items():
        mapper = _mapper(cfg, role)
        for name in names:
            records, errors = attempt(load_records, name)
            if records is None:
                yield Finding(f"{role} data", f"{name}: cannot be loaded", errors)
                continue
            errors = _shared_images(owners, role, name, records)
            if role == "unlabeled":
                yield _unlabeled_finding(name, records, mapper, errors)
            else:
                yield from _annotated_findings(cfg, role, name, records, mapper, errors)


def _shared_images(
    owners: dict[str, tuple[str, str]], role: str, name: str, records: Sequence[dict]
) -> list[S4MError]:
    """Errors of images twice in a role, or in test and training; labeled ones may be unlabeled too.

    ``owners`` maps earlier images to (role, data set), and is updated.
    """
    shared = []
    for record in records:
        path = os.path.abspath(record["file_name"])
        other_role, other = owners.get(path, (None, None))
        if other_role == role or (other_role and role == "test"):
            both = f"'{other}' ({other_role}) and in '{name}' ({role})"
            shared.append(f"{path} is in {both}. Remove it from one, or name other data sets.")
        owners[path] = role, name
    return [DatasetError(first_of(shared))] if shared else []


def _mapper(cfg: CfgNode, role: str) -> Mapper:
    """The mapper of training, or one that only decodes, for testing."""
    names = {"labeled": cfg.INPUT.DATASET_MAPPER_NAME, "unlabeled": cfg.S4M.UNLABELED_MAPPER}
    if role in names:
        return DATASET_MAPPER_REGISTRY.get(names[role])(cfg, True)
    plain = {"geometry": (), "color": None, "image_format": cfg.INPUT.FORMAT}
    return LabeledDatasetMapper(**plain, num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)


def _look_at(records: Sequence[dict], mapper: Mapper) -> tuple[int, list[str]]:
    """Map some images; the number of successes, and messages on others and unreadable headers."""
    sample = evenly_spaced(records, SAMPLED_IMAGES)
    refused = {}
    for seed, record in enumerate(sample):
        try:
            mapper({**record, "seeds": {"augment": seed}})
        except DatasetError as error:
            refused[record["file_name"]] = str(error)
    decoded = len(sample) - len(refused)
    refused |= {r["file_name"]: r["unreadable"] for r in records if "unreadable" in r}
    alike: dict[str, list[str]] = {}  # messages that differ in the image alone
    for file_name, reason in refused.items():
        alike.setdefault(reason.replace(file_name, ""), []).append(reason)
    return decoded, [first_of(reasons) for reasons in alike.values()]


def _unlabeled_finding(
    name: str, records: Sequence[dict], mapper: Mapper, shared: list[S4MError]
) -> Finding:
    decoded, reasons = _look_at(records, mapper)
    item, text = "unlabeled data", f"{name}: {len(records):,} images; {decoded} decoded"
    if decoded:
        return Finding(item, text, shared, [f"Unlabeled data set '{name}': {r}" for r in reasons])
    error = f"The unlabeled data set '{name}': none of the sampled images can be used. {reasons[0]}"
    return Finding(item, text, [*shared, DatasetError(error)])


def _annotated_findings(
    cfg: CfgNode, role: str, name: str, records: Sequence[dict], mapper: Mapper, shared: list
) -> Iterator[Finding]:
    """Lines on the instances per image (minimum / mean / maximum), and on the classes."""
    num_classes, metadata = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, MetadataCatalog.get(name)
    classes = metadata.get("thing_classes") or [str(label) for label in range(num_classes)]
    rows = [[a for a in r.get("annotations", ()) if not a.get("iscrowd", 0)] for r in records]
    labels = [[a.get("category_id") for a in of_image] for of_image in rows]
    error: S4MError | None = None  # that would be every image's, too
    if len(classes) != num_classes:
        expected = f"{len(classes)}, the number of classes of '{name}'"
        error = ConfigError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; expected {expected}."
        )
    elif not any(labels):
        remedy = "Choose a larger split, or check its annotations."
        error = DatasetError(f"'{name}' has {len(records)} images and no instance. {remedy}")
    elif wrong := [
        f"Data set '{name}': an annotation of {record['file_name']} has the class id {label}; "
        f"expected 0 to {num_classes - 1}. Correct it, or the map of the data set's ids."
        for record, of_image in zip(records, labels, strict=True)
        for label in of_image
        if label not in range(num_classes)
    ]:
        error = DatasetError(first_of(wrong))
    decoded, reasons = (0, []) if error else _look_at(records, mapper)
    errors = [*shared, *([error] if error else map(DatasetError, reasons))]
    counts = [len(of_image) for of_image in labels]
    found = metadata.get("findings")  # of our reader
    text = (
        f"{name}: {len(records):,} images, {sum(counts):,} instances ({min(counts)} / "
        f"{sum(counts) / len(counts):.1f} / {max(counts)} per image); {decoded} decoded"
    )
    text += f"; {found.summary}" if found and found.summary else ""
    yield Finding(f"{role} data", text, errors, found.warnings if found else ())
    if not errors:
        number = Counter(dict.fromkeys(classes, 0))
        number.update(classes[label] for of_image in labels for label in of_image)
        yield _class_finding(role, name, number)


def _class_finding(role: str, name: str, number: Mapping[str, int]) -> Finding:
    text = ", ".join(f"{label} {count:,}" for label, count in number.items())
    if len(number) > LISTED_CLASSES:
        low, high = min(number, key=number.__getitem__), max(number, key=number.__getitem__)
        text = f"{len(number)} classes, from {low} {number[low]:,} to {high} {number[high]:,}"
    absent = [label for label in number if not number[label] and role == "labeled"]
    warning = (
        f"'{name}' has no instance of {', '.join(absent)}: the model cannot learn it. Label images "
        "of it, remove the category, or choose another split (S4M.SPLIT_SEED, S4M.SPLIT_FILE)."
    )
    return Finding(f"{role} classes", text, (), [warning] if absent else [])
