"""What the labeled images of own data are like."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection

from detectron2.config import CfgNode

from s4m_d2.data.annotations import Annotations
from s4m_d2.data.validation_split import draw_validation
from s4m_d2.engine.own_data.derived_settings import DataFacts
from s4m_d2.errors import DatasetError


def drawn_validation(labeled: Annotations, fraction: float) -> list[str]:
    """File names of the images to evaluate on; [] with fraction 0."""
    names = labeled.classes
    classes = {
        labeled.name(r): {names[a["category_id"]] for a in r["annotations"] if not a["iscrowd"]}
        for r in labeled.records
    }
    return draw_validation(classes, fraction) if fraction and classes else []


def absent_class_notes(validation: Annotations) -> list[str]:
    """A warning about classes that the drawn images have no instance of."""
    present = {annotation["category_id"] for _, annotation in validation.instances()}
    absent = [name for index, name in enumerate(validation.classes) if index not in present]
    if not absent:
        return []
    return [
        f"The validation set drawn from the labeled images has no instance of {', '.join(absent)}: "
        "its AP says nothing about them. Label more such images, or give your own set with --val."
    ]


def data_facts(
    labeled: Annotations, train: Collection[str], unlabeled: int, validation: int
) -> DataFacts:
    """What settings are derived from.

    Args:
        labeled: all labeled images.
        train: file names of those to train on.
        unlabeled, validation: numbers of images.

    Raises:
        DatasetError: there is no image to train on.
    """
    part = labeled.part(train)
    if not part.records:
        raise DatasetError(
            "S4M.DATA.LABELED (--labeled) has no image to train on. Give a json with 'images'."
        )
    sizes = [(record["height"], record["width"]) for record in part.records]
    shares = [min(a["area"] / (r["height"] * r["width"]), 1.0) for r, a in part.instances()]
    per_image = Counter(record["image_id"] for record, _ in labeled.instances())
    return DataFacts(
        height=statistics.median(height for height, _ in sizes),
        width=statistics.median(width for _, width in sizes),
        long_side=statistics.median(max(size) for size in sizes),
        short_side=statistics.median(min(size) for size in sizes),
        labeled=len({record["image_id"] for record, _ in part.instances()}),
        unlabeled=unlabeled,
        validation=validation,
        most_instances=max(per_image.values(), default=0),
        instance_share=statistics.median(shares or [1.0]),
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
