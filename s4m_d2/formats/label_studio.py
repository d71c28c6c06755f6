"""Label Studio: tasks with pre-annotations, and the labeling interface that fits them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from s4m_d2.files import atomic_write
from s4m_d2.formats.coco import mask_polygons, write_list


def write(
    rows: Callable[[], Iterable[dict]], names: Sequence[str], folder: str, image_root: str
) -> str:
    """Write ``folder``/tasks.json and interface.xml.

    Images are named as Label Studio serves local files if the folder that holds ``image_root`` is
    its LOCAL_FILES_DOCUMENT_ROOT; it refuses that root itself as a storage. Each piece of a mask is
    a region of its own, as its polygons have neither pieces nor holes. A task's score is the least
    of its instances.
    """
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    with atomic_write(os.path.join(folder, "interface.xml")) as file:
        file.write(
            '<View>\n  <Image name="image" value="$image"/>\n'
            f'  <PolygonLabels name="label" toName="image">\n{labels}  </PolygonLabels>\n</View>\n'
        )
    path = os.path.join(folder, "tasks.json")
    with atomic_write(path) as file:
        write_list(file, (_task(row, os.path.basename(image_root), names) for row in rows()))
        file.write("\n")
    return path


def _task(row: dict, folder: str, names: Sequence[str]) -> dict:
    least = min((instance["score"] for instance in row["instances"]), default=0.0)
    regions = list(_regions(row, names))
    prediction = {"model_version": "s4m_d2", "score": least, "result": regions}
    image = quote(os.fsencode(os.path.join(folder, row["file_name"])))
    address = f"/data/local-files/?d={image}"
    return {"data": {"image": address}, "predictions": [prediction]}


def _regions(row: dict, names: Sequence[str]) -> Iterator[dict]:
    for number, instance in enumerate(row["instances"]):
        labels = [names[instance["class"]]]
        for part, piece in enumerate(mask_polygons(instance["segmentation"])):
            share = piece * 100 / (row["width"], row["height"])
            yield {
                "id": f"{number}-{part}",
                "type": "polygonlabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": row["width"],
                "original_height": row["height"],
                "image_rotation": 0,
                "score": instance["score"],
                "value": {"points": share.tolist(), "closed": True, "polygonlabels": labels},
            }
