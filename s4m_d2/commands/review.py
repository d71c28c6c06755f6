"""Rank the images that s4m-label labeled: those first whose labels are probably worst.

    s4m-review output/labels

Writes OUT/review.csv, and OUT/review.html with pictures of the first ones, which OUT/review holds.
--by: what counts, as mean of the ranks: mask (SAM expects a low IoU of its masks: the default, if
SAM drew any), class (scores are low: otherwise), number (unusually few or many instances), rare
(rare classes). Among images of similar rank those come first that look different from the ones
before.
"""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.stats import rankdata
from tqdm import tqdm

from s4m_d2.commands.label import labeled_rows, read_settings
from s4m_d2.data.images import read_image
from s4m_d2.engine.command.arguments import command_parser, natural, print_problems
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import ConfigError, DatasetError, printable
from s4m_d2.files import atomic_write
from s4m_d2.report.page import render
from s4m_d2.structures import RLEMasks
from s4m_d2.visualization import overlay, write_png

SIGNALS = ("class", "mask", "number", "rare")
DIVERSITY = 0.5  # of the largest distance between images, in ranks of the signals


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 an error, or images that cannot be read."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", metavar="OUT", help="--output of s4m-label")
    parser.add_argument("--by", nargs="+", choices=SIGNALS)
    parser.add_argument("--count", type=natural, default=50, help="pictures (default: 50)")
    args = parser.parse_args(arguments)
    folder, settings = args.folder, read_settings(args.folder)
    rows, features, problems = [], [], {}
    for row in tqdm(list(labeled_rows(folder)), unit="image", disable=None):
        try:
            image = read_image(os.path.join(settings["images"], row["file_name"]), "RGB")
        except DatasetError as error:
            problems[row["file_name"]] = str(error)
            continue
        rows.append(row)
        features.append(cv2.resize(image, (6, 6), interpolation=cv2.INTER_AREA).ravel() / 255)
    if not rows:
        raise ConfigError(f"'{folder}': no labeled image can be read. Label first.")
    signals = review_signals(rows)
    # Rank correlation with the error, 1 - PQ, of 40 generated images: mask 0.57, the others -0.13.
    has_sam = any("sam_iou" in instance for row in rows for instance in row["instances"])
    by = args.by or ["mask" if has_sam else "class"]
    order, value = review_order(signals, by, np.array(features), args.count)
    table = []
    for rank, i in enumerate(order, start=1):
        about = {"rank": rank, "file_name": printable(rows[i]["file_name"])}
        about |= {"value": round(value[i], 3), "instances": len(rows[i]["instances"])}
        table.append(about | {name: round(of_all[i], 3) for name, of_all in signals.items()})
    with atomic_write(os.path.join(folder, "review.csv")) as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    _write_page(folder, table, [rows[i] for i in order[: args.count]], settings)
    table_file = os.path.join(folder, "review.csv")
    print(f"{len(rows):,} images by {', '.join(by)}: {table_file}, review.html")
    return print_problems(problems, "cannot be read")


def review_signals(rows: Sequence[dict]) -> dict[str, np.ndarray]:
    """Signs that labels of an image are wrong, (N,) each by name, higher where they probably are.

    Rows are of labeled images, see :mod:`s4m_d2.formats`. class: mean of 1 - score of the image's
    instances. mask: the same of sam_iou; 1 where SAM drew no mask. Without instances, both are 1:
    something may be missed. number: how much the number of instances differs from the median,
    abs(log(ratio)). rare: -log of the frequency of the image's rarest class.
    """
    instances = [row["instances"] for row in rows]
    count = np.array([len(of_image) for of_image in instances])
    classes = Counter(i["class"] for of_image in instances for i in of_image)
    frequency = {index: number / max(count.sum(), 1) for index, number in classes.items()}

    def doubt(key: str) -> list[float]:
        of_images = ([1 - i.get(key, 0.0) for i in of_image] for of_image in instances)
        return [float(np.mean(values)) if values else 1.0 for values in of_images]

    rarest = (min((frequency[i["class"]] for i in x), default=1.0) for x in instances)
    return {
        "class": np.array(doubt("score")),
        "mask": np.array(doubt("sam_iou")),
        "number": np.abs(np.log((count + 1) / (np.median(count) + 1))),
        "rare": np.log(1 / np.fromiter(rarest, dtype=float)),
    }


def review_order(
    signals: dict[str, np.ndarray], by: Sequence[str], features: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images in the order in which to look at them, and their values.

    The value is the mean of an image's ranks in the signals ``by``, in (0, 1]. Each of the first
    ``count`` images is the one with the highest value plus distance to those before it, by (N, D)
    ``features``; the others follow by value. Returns (N,) positions, and (N,) values by image.
    """
    value = np.mean([rankdata(signals[name]) / len(features) for name in by], axis=0)
    scale = np.linalg.norm(features - features.mean(axis=0), axis=1).max(initial=0.0) or 1.0
    distance = np.ones(len(features))
    left = np.ones(len(features), dtype=bool)
    first = []
    for _ in range(min(count, len(features))):
        chosen = int(np.where(left, value + DIVERSITY * distance, -1.0).argmax())
        first.append(chosen)
        left[chosen] = False
        to_chosen = np.linalg.norm(features - features[chosen], axis=1) / (2 * scale)
        distance = np.minimum(distance, to_chosen)
    others = np.argsort(-value, kind="stable")
    return np.array([*first, *others[left[others]]], dtype=int), value


def _write_page(folder: str, table: list[dict], shown: list[dict], settings: dict) -> None:
    pictures = Path(folder, "review")  # which may also hold LabelMe's files
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("[0-9]*.png"):
        old.unlink()
    for number, row in enumerate(shown, start=1):
        image = read_image(os.path.join(settings["images"], row["file_name"]), "RGB")
        size, found = image.shape[:2], row["instances"]
        masks = RLEMasks([i["segmentation"] for i in found], size)
        scores = [i["score"] for i in found]
        drawn = overlay(image, masks, [i["class"] for i in found], settings["names"], scores)
        picture = Image.fromarray(drawn)
        picture.thumbnail((320, 320))  # px
        write_png(np.asarray(picture), pictures / f"{number:04d}.png")
    with atomic_write(os.path.join(folder, "review.html")) as file:
        file.write(render("review.html", rows=table[: len(shown)], signals=SIGNALS))
