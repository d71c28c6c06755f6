"""Commands that take seconds are run as they are written, on little data; all others are named."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT, logged
from make_own_data import make_own_data
from markdown_docs import answer_of, commands
from PIL import Image

from s4m_d2.pretrained import MODULE

# What is not run, by a part of the command, and why. test_commands.py checks the options and
# settings of these too, and takes trainings through what --check does.
LONG = {
    "configs/cityscapes_": "needs Cityscapes",
    "configs/toyscapes_ablation.yaml": "minutes; tests/test_ablation_short.py",
    "tools/ablation.py --output": "an hour; tests/test_ablation_short.py",
    "--set nuclei": "needs nuclei",
    "--set facades": "needs facades",
    "tools/benchmark.py": "minutes; tests/test_benchmark.py",
    "tools/gpu_check.py": "minutes, and needs a GPU",
    "tools/memory.py": "minutes",
    "tests/reference_runs.py": "minutes; tests/test_long_runs.py",
    "tools/sepl_evidence.py": "minutes; tests/sepl/test_evidence.py",
    "tools/train_tiny_sam.py": "hours",
    "examples/": "minutes; tests/examples/",
    "output/labels": "needs the loop's labels",
    "output/corrected": "needs the reader's corrections",
    "output/second": "minutes",
    "--preset voc": "needs the reader's labels",
    "-m build": "downloads; tests/test_packaging.py",
}
# Less data, fewer iterations: options after a script's name, words at the end, other values.
OPTIONS = {
    "datasets/make_toyscapes.py": ["--train", "10", "--val", "1", "--size", "128", "64"],
    "tools/visualize.py": ["--images", "1"],
    "tools/config_reference.py": ["--check"],  # it would write into the checkout
}
SMALL = (
    "MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 0 MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64 "
    "SOLVER.IMS_PER_BATCH 2 S4M.TEACHER.MAX_ITER 1 SOLVER.MAX_ITER 2 S4M.BURN_IN 1 "
    "S4M.DISTILL.NUM_POINTS 2"
).split()
NO_SAM = ["--check", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "S4M.SAM.BACKEND"]
NO_SAM += ["tiny_toyscapes", "S4M.SAM.CHECKPOINT", "", "OUTPUT_DIR", "output/checked"]
NO_WEIGHTS = [] if find_spec(MODULE) else ["MODEL.WEIGHTS", ""]
ENDS = {
    "configs/custom_small.yaml": SMALL + ["S4M.SAM.ADAPT", "1"] + NO_WEIGHTS,
    "configs/custom.yaml": NO_SAM,
}
VALUES = {"--labeled": {"60": "2", "40": "8", "20": "2", "10": "2"}}
VALUES |= {"--unlabeled": {"200": "4", "40": "2"}}
VALUES |= {"--train": {"400": "10"}, "--points-per-side": {"12": "4"}}
# In the place of `make quickstart`, whose result some commands look at.
QUICKSTART = ["train_net.py", "--config-file", "configs/toyscapes_10pct.yaml", *SMALL]
QUICKSTART += ["OUTPUT_DIR", "output/quickstart", "DATASETS.TRAIN", "('toyscapes_train_30pct',)"]
QUICKSTART += ["S4M.QUALITY.PERIOD", "2", "S4M.PSEUDO_LABEL.SCORE_THRESH", "0.0"]
QUICKSTART += ["S4M.PSEUDO_LABEL.DUPLICATE_IOU", "0.9"]
QUICKSTART += ["S4M.PSEUDO_LABEL.MASK_QUALITY_THRESH", "0.001"]
QUICKSTART += ["S4M.PSEUDO_LABEL.CLASS_THRESH", "auto"]
QUICKSTART += ["MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", "0.0"]  # so that there are pseudo-labels
# Nothing is there.
FAILING = tuple(f"datasets/prepare_{name}.py" for name in ("cityscapes", "coco", "nuclei"))
# Guides whose commands need those of the same page before them; the others come afterwards.
ORDER = ("docs/sepl.md", "docs/own-data.md", "docs/looking.md")


def why_not(words: tuple[str, ...]) -> str:
    """Why a command is not run; "": it is."""
    line = " ".join(words)
    return next((reason for part, reason in LONG.items() if part in line), "")


def python_commands() -> list[tuple[str, ...]]:
    """The words after `python` of every command, in the order of :data:`ORDER`."""
    found = [(c.file, c.words[1:]) for c in commands() if c.words[0] == "python"]
    places = {page: place for place, page in enumerate(ORDER)}
    found.sort(key=lambda item: places.get(item[0], len(ORDER)))  # stable
    # Without its arguments, which it needs, sepl.py is only named.
    return list(dict.fromkeys(words for _, words in found if words != ("tools/sepl.py",)))


ALL = python_commands()
SHORT = [words for words in ALL if not why_not(words)]


def smaller(words: tuple[str, ...]) -> list[str]:
    """The same command on little data."""
    changed = list(words)
    for place, (option, value) in enumerate(zip(words, words[1:], strict=False), start=1):
        changed[place] = VALUES.get(option, {}).get(value, value)
    changed[1:1] = OPTIONS.get(words[0], [])
    for file, end in ENDS.items():
        if file in words and "--eval-only" not in words:
            own = words.index("MODEL.DEVICE") if "MODEL.DEVICE" in words else len(words)
            options = [word for word in end if word.startswith("--")]
            changed[own:own] = [word for word in options if word not in words]
            changed += end[len(options) :]
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the commands are run: with configs, a photo, and the reader's own data."""
    folder = tmp_path_factory.mktemp("guides")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "output").mkdir()
    (folder / "output" / "student").symlink_to("quickstart/student")
    Image.new("RGB", (128, 64), "gray").save(folder / "photo.jpg")
    make_own_data(folder / "data", labeled=8, unlabeled=2, seed=1, size=(128, 64), kind="coco")
    shutil.move(folder / "data" / "annotations.json", folder)
    shutil.move(folder / "data" / "labeled", folder / "DIR")
    shutil.move(folder / "data" / "unlabeled", folder / "DIR")
    yield folder
    shutil.rmtree(folder)  # checkpoints, some hundred MB


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple[str, ...], tuple[int, str]]:
    """(exit status, output) of each short command; all in one process, one after the other."""
    sepl = [words for words in SHORT if "sepl.py" in words[0] or "make_" in words[0]]
    first = [*sepl, tuple(QUICKSTART)]
    order = [*first, *(words for words in SHORT if words not in first)]
    environment = {k: v for k, v in os.environ.items() if k != "DETECTRON2_DATASETS"}
    request = [smaller(words) for words in order]
    answers = answer_of("run", request, folder, environment)
    answered = dict(zip(order, answers, strict=True))
    status, output = answered.pop(tuple(QUICKSTART))
    assert status == 0, output
    return answered


def test_short_commands_run(results):
    for words, (status, output) in results.items():
        if words[0] in FAILING:
            assert status == 1 and re.search("https?://", output), words  # where to get it
        else:
            assert status == 0, f"{' '.join(words)}\n{output[-3000:]}"


def test_they_leave_and_print_what_the_guides_show(folder, results):
    def printed(*parts):
        (text,) = [out for words, (_, out) in results.items() if all(p in words for p in parts)]
        return text

    assert "| mIoU" in printed("tools/sepl.py", "evaluate")
    assert "own data" in printed("--check", "configs/custom_small.yaml")
    assert (folder / "output/own/student/results.json").is_file()
    assert re.search(r"\d\.\d", printed("-c"))
    for path in ("enhanced.png", "annotations.png", "found.png", "figures/similarity.png"):
        with Image.open(folder / "output" / path) as picture:
            assert min(picture.size) >= 64, path
    for path in ("datasets/own_via/annotations.json", "datasets/own_labelme/annotations.json"):
        assert len(json.loads((folder / path).read_text())["images"]) == 2
    assert (folder / "student.safetensors").is_file() and (folder / "teacher.pth").is_file()


def test_what_is_logged_has_the_names_that_the_method_gives(folder, results):
    text = (ROOT / "docs" / "method.md").read_text()
    section = text.split("## What is logged\n")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    run = folder / "output" / "quickstart"
    keys = {*logged(run / "teacher"), *logged(run / "student")}
    assert len(names) > 15
    for name in names:
        start, more = name.removesuffix("…"), name.endswith("…")
        found = [key for key in keys if key == start or (more and key.startswith(start))]
        assert found or (name[0] == "_" and any(key.endswith(name) for key in keys)), name


def test_every_reason_not_to_run_a_command_is_one():
    unused = [part for part in LONG if not any(part in " ".join(words) for words in ALL)]
    assert not unused
