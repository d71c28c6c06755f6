"""Loading: a batch of image files through the mappers of the config."""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np

from benchmarking import synthetic
from benchmarking.bench import Bench
from benchmarking.parts import Part
from benchmarking.timing import Form
from s4m_d2.data import DATASET_MAPPER_REGISTRY
from s4m_d2.engine.rng import sample_seeds

FILES = 4  # image files, which a batch reads in turn


def data_part(bench: Bench) -> Part:
    """One batch of a step, in one process; workers load it while another step runs."""
    cfg = bench.cfg
    mappers = [(DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, True), "labeled")]
    if bench.stage == 2:
        mappers.append(
            (DATASET_MAPPER_REGISTRY.get(cfg.S4M.UNLABELED_MAPPER)(cfg, True), "unlabeled")
        )
    folder = tempfile.TemporaryDirectory()
    records = write_images(Path(folder.name), bench)
    position = 0

    def load() -> None:
        nonlocal position
        for mapper, stream in mappers:
            for _ in bench.labeled:
                record = dict(records[position % len(records)])
                if stream == "unlabeled":
                    record.pop("annotations")
                mapper({**record, "seeds": sample_seeds(0, stream, position)})
                position += 1

    load.folder = folder  # the files live as long as the part
    return Part("data", Form(load), in_step=False)


def write_images(folder: Path, bench: Bench) -> list[dict]:
    """A few PNG files of the data set's size, and Detectron2's records of them."""
    size, classes = bench.case.raw_size, bench.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    records = []
    for index in range(FILES):
        draws = synthetic.generator("files", index)
        pixels = synthetic.image(size, draws).permute(1, 2, 0).numpy()
        name = folder / f"{index}.png"
        cv2.imwrite(str(name), np.ascontiguousarray(pixels[..., ::-1]))
        masks = synthetic.instance_logits(bench.case.instances, size, draws) > 0
        records.append(
            {
                "file_name": str(name),
                "height": size[0],
                "width": size[1],
                "image_id": index,
                "annotations": [
                    {"category_id": number % classes, "iscrowd": 0, "segmentation": polygons(mask)}
                    for number, mask in enumerate(masks)
                ],
            }
        )
    return records


def polygons(mask) -> list[list[float]]:
    """COCO's polygons around a (H, W) bool mask."""
    found, _ = cv2.findContours(
        mask.numpy().astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    return [contour.reshape(-1).astype(float).tolist() for contour in found if len(contour) > 2]
