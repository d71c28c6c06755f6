"""Commands of the guides that take seconds on little data are run, as they are written."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from markdown_docs import ROOT, commands  # noqa: E402

# Little data, and few clicks: option → (value in the guide, value here).
SMALLER = {"--points-per-side": "4"}
SMALL_DATA = ("--train", "1", "--val", "1", "--size", "128", "64")


def run(words, monkeypatch):
    """A script in this process; its exit status."""
    script = ROOT / words[0]
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def of(file, *scripts):
    """The commands of a file that start one of these scripts, in order."""
    found = [c.words[1:] for c in commands() if c.file == file and c.words[0] == "python"]
    return [words for words in found if words[0] in scripts and len(words) > 1]


def smaller(words):
    changed = list(words)
    for i, word in enumerate(words[:-1]):
        changed[i + 1] = SMALLER.get(word, words[i + 1])
    if words[0].endswith("make_toyscapes.py"):
        changed += SMALL_DATA
    return changed


def test_the_example_of_the_guide_to_sepl_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    all_commands = of(
        "docs/sepl.md",
        "datasets/make_toyscapes.py",
        "datasets/make_cam_labels.py",
        "tools/sepl.py",
    )
    example = [words for words in all_commands if "voc" not in words]
    assert len(example) == 5
    for words in example:
        assert run(smaller(words), monkeypatch) == 0, (words, capsys.readouterr().err)
    assert "| mIoU" in capsys.readouterr().out
    with Image.open("output/enhanced.png") as picture:
        assert picture.size > (128, 64)


@pytest.mark.parametrize("script", ["datasets/prepare_cityscapes.py", "datasets/prepare_coco.py"])
def test_checks_of_downloads_say_where_to_get_what_is_missing(
    script, tmp_path, monkeypatch, capsys
):
    assert any(c.words == ("python", script) for c in commands())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    status = run([script], monkeypatch)
    told = f"{status} {''.join(capsys.readouterr())}"
    assert status != 0 and re.search("https?://", told)
