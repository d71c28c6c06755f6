#!/usr/bin/env python
"""Measure what s4m-review's order is worth: AP by number of labeled images, by rank or at random.

    python tools/review_study.py --data datasets --set nuclei --output output/review-nuclei

For each seed, a model is trained on 5 images of a pool of 50. It labels the others (s4m-label), 5
of them, the first of s4m-review or drawn at random, get their true labels, and its training goes on
with 10 images, then in the same way with 20 (--iterations). All models are evaluated on the same
images of val.
What is done is not done again: the same command continues a stopped one. The result is OUT.json
and OUT.png beside the folder OUT.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ablation_study import ROOT
from ablation_study.data_sets import SAMS, link_images, real_folder, write_part
from ablation_study.report import Summary
from ablation_study.training import cores
from matplotlib.figure import Figure

from s4m_d2.engine.command.arguments import command_parser, natural, positive
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import S4MError
from s4m_d2.files import atomic_write, write_json

COUNTS, POOL, EVALUATED = (5, 10, 20), 50, 40  # images
RANDOM = "random"


class Simulation:
    """One seed: models by number of labeled images and order, in a folder.

    ``data`` holds train.json, val.json and the folders train and val.
    """

    def __init__(self, args: argparse.Namespace, data: Path, folder: Path, seed: int) -> None:
        self.data, self.folder, self.seed, self.iterations = data, folder, seed, args.iterations
        self.config = str(ROOT / "tools" / "ablation_study" / f"{args.set}.yaml")
        self.options = ["S4M.SAM.CHECKPOINT", str(SAMS.get(args.set, "")), *args.options]
        self.truth = json.loads((data / "train.json").read_text())
        rng = np.random.default_rng([seed, 24])
        names = sorted(image["file_name"] for image in self.truth["images"])
        self.pool = [names[i] for i in rng.permutation(len(names))[:POOL]]
        self.val = folder.parent / "val.json"
        truth = json.loads((data / "val.json").read_text())
        chosen = np.random.default_rng(0).permutation(len(truth["images"]))[:EVALUATED]
        write_part(self.val, truth, [truth["images"][i]["file_name"] for i in chosen])

    def run(self, orders: Sequence[str]) -> Iterator[tuple[str, int, float]]:
        """Order, number of labeled images and AP of each model, once it is trained."""
        first = self.pool[: COUNTS[0]]
        ap = self._train("first", first, None)
        for order in orders:
            yield order, COUNTS[0], ap
            labeled, name = first, "first"
            for count in COUNTS[1:]:
                labeled = labeled + self._choose(name, labeled, order, count - len(labeled))
                name, before = f"{order}-{count}", name
                yield order, count, self._train(name, labeled, before)

    def _choose(self, name: str, labeled: Sequence[str], order: str, count: int) -> list[str]:
        """Images of the pool to label next; the pool's own order is random."""
        left = [image for image in self.pool if image not in labeled]
        if order == RANDOM:
            return left[:count]
        pool, labels = (self.folder / f"{kind}-{order}-{name}" for kind in ("pool", "labels"))
        link_images(pool, left, self.data / "train")
        weights = str(self.folder / name / "teacher" / "model_final.pth")
        source = ["--weights", weights, "--images", str(pool), "--output", str(labels)]
        self._command("tools/label.py", *source, "SEED", str(self.seed), *self.options)
        self._command("tools/review.py", str(labels), "--by", order, "--count", str(count))
        with open(labels / "review.csv", newline="") as file:
            ranked = [row["file_name"] for row in csv.DictReader(file)]
        return ranked[:count]

    def _train(self, name: str, labeled: Sequence[str], before: str | None) -> float:
        """AP of a model that is trained on ``labeled``, from the model ``before`` on."""
        folder = self.folder / name
        results, annotations = folder / "teacher" / "results.json", self.folder / f"{name}.json"
        if not results.exists():
            write_part(annotations, self.truth, labeled)
            link_images(self.folder / "pool", self.pool, self.data / "train")
            start = ["--start-from", str(self.folder / before)] if before else []
            self._command(
                *("train_net.py", "--resume", "--config-file", self.config, *start),
                *("--labeled", str(annotations), "--images", str(self.data / "train")),
                *("--unlabeled", str(self.folder / "pool"), "--val", str(self.val)),
                *("--val-images", str(self.data / "val"), "OUTPUT_DIR", str(folder)),
                *("S4M.STAGE", "teacher", "S4M.DISTILL.ENABLED", "False"),
                *("S4M.TEACHER.MAX_ITER", str(self.iterations[before is not None])),
                *("SEED", str(self.seed), *self.options),
            )
        return json.loads(results.read_text())["segm"]["AP"] or 0.0  # None: nothing was predicted

    def _command(self, script: str, *arguments: str) -> None:
        log = self.folder / "log.txt"
        with open(log, "ab") as output:
            command = [sys.executable, str(ROOT / script), *arguments]
            environment = {"OMP_NUM_THREADS": str(cores())} | os.environ
            status = subprocess.run(command, stdout=output, stderr=output, env=environment)
        if status.returncode:
            raise S4MError(f"{script} ended with status {status.returncode}: see '{log}'")


def draw(found: dict[str, dict[int, dict[int, float]]], path: Path) -> None:
    """AP by number of labeled images: a line an order, and its sample deviation over the seeds."""
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for order, by_count in found.items():
        ap = [Summary(by_seed) for by_seed in by_count.values()]
        means, deviations = [x.mean for x in ap], [x.deviation or 0.0 for x in ap]
        axes.errorbar(list(by_count), means, deviations, marker="o", capsize=3, label=order)
    axes.set(xlabel="labeled images", ylabel="mask AP", xticks=COUNTS)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="holds the folder of the set")
    parser.add_argument("--set", choices=("nuclei", "facades"), default="nuclei")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2])
    words = "of the first training, and of each that goes on"
    parser.add_argument("--iterations", type=positive, nargs=2, default=[900, 300], help=words)
    parser.add_argument("--by", nargs="+", default=["mask"], help="orders beside random")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="after --: config")
    args = parser.parse_args(arguments)
    found: dict[str, dict[int, dict[int, float]]] = {}
    data, output = real_folder(args.set, args.data), args.output.absolute()
    for seed in args.seeds:
        simulation = Simulation(args, data, output / f"seed{seed}", seed)
        for order, count, ap in simulation.run([RANDOM, *args.by]):
            print(f"seed {seed}, {count} images, {order}: AP {ap:.1f}", flush=True)
            found.setdefault(order, {}).setdefault(count, {})[seed] = ap
            content = {key: getattr(args, key) for key in ("set", "iterations", "options")}
            write_json(output.with_suffix(".json"), content | {"AP": found}, indent=1)
            draw(found, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
