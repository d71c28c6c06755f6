"""Make toyscapes, train both stages on it, and show the result.

    python tools/quickstart.py --output output/quickstart

Prints a table (stage-1 teacher, student, EMA teacher), which it also writes as ``results.md`` into
the output folder, beside ``report.html`` and, in ``student/figures``, the picture of the method. A
stopped run continues where it stopped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from s4m_d2.files import atomic_write
from s4m_d2.report import read_results

ROOT = Path(__file__).resolve().parent.parent
# Tell glibc to keep freed memory: on a CPU, fetching the same pages from the system again in every
# iteration takes a large part of the time. Other systems ignore these variables.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_ARENA_MAX": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "toyscapes_10pct.yaml"))
    parser.add_argument("--output", default=str(ROOT / "output" / "quickstart"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    args = parser.parse_args()
    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opts = ["MODEL.DEVICE", device, *args.opts, "OUTPUT_DIR", args.output]

    data = Path(os.environ["DETECTRON2_DATASETS"]) / "toyscapes"
    _run("datasets/make_toyscapes.py", "--output", str(data))
    _run("train_net.py", "--config-file", args.config_file, "--resume", *opts)

    table = quickstart_table(args.output)
    with atomic_write(os.path.join(args.output, "results.md")) as file:
        file.write(table + "\n")
    print(f"\n{table}\n", flush=True)
    for path in sorted(Path(args.output, "student", "figures").glob("pseudo_labels_*.png")):
        print(f"Picture: {path}")
    print(f"Report: {os.path.join(args.output, 'report.html')}")


def _run(script: str, *arguments: str) -> None:
    """Run one of the project's scripts; its failure is ours, its own message is enough."""
    command = [sys.executable, str(ROOT / script), *arguments]
    status = subprocess.run(command, env=KEEP_MEMORY | os.environ).returncode
    if status:
        sys.exit(status)


def quickstart_table(output: str) -> str:
    """AP and AP50 of the three models, in Markdown."""
    first = read_results(os.path.join(output, "teacher", "results.json"))
    second = read_results(os.path.join(output, "student", "results.json"))
    models = {"stage-1 teacher": first, "student": second, "EMA teacher": second["teacher"]}
    rows = [(name, *map(found["segm"].get, ("AP", "AP50"))) for name, found in models.items()]
    heads = ("model", "AP", "AP50")
    return tabulate(rows, heads, tablefmt="github", floatfmt=".1f", missingval="–")


if __name__ == "__main__":
    main()
