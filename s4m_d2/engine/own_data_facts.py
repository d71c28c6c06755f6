"""What the labeled images of own data are like."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable

from detectron2.config import CfgNode

from s4m_d2.data.coco_content import class_names, classes_of_images, instance_shares, subset_of
from s4m_d2.data.validation_split import draw_validation
from s4m_d2.engine.derived_settings import DataFacts
from s4m_d2.errors import DatasetError


def drawn_validation(content: dict, fraction: float) -> list[str]:
    """File names of the images to evaluate on; [] with fraction 0."""
    classes = {name: set(found) for name, found in classes_of_images(content).items()}
    return draw_validation(classes, fraction) if fraction and classes else []


def absent_class_notes(content: dict, drawn: Iterable[str]) -> list[str]:
    """A warning about classes that the drawn images have no instance of."""
    found = classes_of_images(content)
    present = {name for image in drawn for name in found[image]}
    absent = [name for name in class_names(content) if name not in present]
    if not absent:
        return []
    return [
        f"The validation set drawn from the labeled images has no instance of {', '.join(absent)}: "
        "its AP says nothing about them. Label more such images, or give your own set with --val."
    ]


def data_facts(content: dict, train: Collection[str], unlabeled: int, validation: int) -> DataFacts:
    """What settings are derived from.

    Args:
        content: of the COCO file of labeled images.
        train: file names of those to train on.
        unlabeled, validation: numbers of images.

    Raises:
        DatasetError: there is no image to train on.
    """
    per_image = {name: len(found) for name, found in classes_of_images(content).items()}
    sizes = [(r["height"], r["width"]) for r in content["images"] if r["file_name"] in train]
    if not sizes:
        raise DatasetError(
            "S4M.DATA.LABELED (--labeled) has no image to train on. Give a json with 'images'."
        )
    shares = list(instance_shares(subset_of(content, train))) or [1.0]
    return DataFacts(
        height=statistics.median(height for height, _ in sizes),
        width=statistics.median(width for _, width in sizes),
        long_side=statistics.median(max(size) for size in sizes),
        short_side=statistics.median(min(size) for size in sizes),
        labeled=sum(per_image[name] > 0 for name in train),
        unlabeled=unlabeled,
        validation=validation,
        most_instances=max(per_image.values()),
        instance_share=statistics.median(shares),
    )


def query_notes(cfg: CfgNode, facts: DataFacts) -> list[str]:
    """A warning if the model has fewer queries than an image has instances."""
    queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    if queries >= facts.most_instances:
        return []
    return [
        f"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES is {queries}, but an image has "
        f"{facts.most_instances} instances: the model cannot find them all. Use more queries."
    ]
