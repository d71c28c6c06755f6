import json
import math

import numpy as np
import pytest
from label_folders import command, write_images, write_labels
from PIL import Image
from pycocotools import mask as mask_utils

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sepl import evaluate_command, visualize_command
from s4m_d2.sepl.comparison import ImageScore
from s4m_d2.sepl.drawing import draw_image, draw_label, draw_masks
from s4m_d2.sepl.mask_files import write_masks
from s4m_d2.sepl.visualize_command import best_and_worst, evenly_spaced

SIZE = 24, 40
TRUE_WIDTH = 20  # columns of class 1 in the ground truth
# By name: columns of class 1 before and after. By falling gain: a, b, c, d, e.
WIDTHS = {"c": (15, 15), "a": (0, 20), "e": (20, 2), "b": (10, 18), "d": (20, 16)}


def label(columns, index=1):
    values = np.zeros(SIZE, np.uint8)
    values[:, :columns] = index
    return values


def gain(name):
    """By hand: IoU of class 1 is w / 20, of background 20 / (40 - w) for w <= 20 columns."""
    before, after = ((w / TRUE_WIDTH + TRUE_WIDTH / (SIZE[1] - w)) / 2 for w in WIDTHS[name])
    return after - before


@pytest.fixture
def folders(tmp_path):
    write_images(tmp_path / "images", dict.fromkeys(WIDTHS, SIZE))
    write_labels(tmp_path / "cam", {name: label(w) for name, (w, _) in WIDTHS.items()})
    write_labels(tmp_path / "sepl", {name: label(w) for name, (_, w) in WIDTHS.items()})
    write_labels(tmp_path / "truth", dict.fromkeys(WIDTHS, label(TRUE_WIDTH)))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """What the command asks to have drawn; nothing is."""
    calls = {}

    def note(rows, column_titles, path, row_titles, legend):
        calls.update(rows=rows, columns=column_titles, titles=row_titles)
        calls["legend"] = [name for name, _ in legend]
        calls["names"] = [title.split()[0] for title in row_titles]

    monkeypatch.setattr(visualize_command, "panel_grid", note)
    return calls


def visualize(folders, *arguments, truth=True):
    return command(
        visualize_command,
        *["--images", folders / "images", "--pseudo-labels", folders / "cam"],
        *["--enhanced", folders / "sepl", "--output", folders / "out" / "picture.png"],
        *(["--ground-truth", folders / "truth"] if truth else []),
        *arguments,
    )


def mask_rle(size=SIZE):
    mask = np.zeros(size, np.uint8)
    mask[:, :7] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": list(size), "counts": rle["counts"].decode()}


def write_mask(folder, name, size=SIZE):
    write_masks(folder / f"{name}.json.gz", [{"segmentation": mask_rle(size)}], size, "test")


def test_rows_go_from_the_best_to_the_worst_and_say_what_they_gained(folders, drawn, capsys):
    assert visualize(folders) == 0
    assert drawn["names"] == sorted(WIDTHS, key=gain, reverse=True) == list("abcde")
    assert drawn["columns"] == ["image", "CAM pseudo-label", "SEPL", "ground truth"]
    assert drawn["legend"] == ["aeroplane"]
    before = 100 * (0 + 20 / 40) / 2
    assert drawn["titles"][0] == f"a    mIoU {before:.1f} → 100.0 ({100 - before:+.1f})"
    assert drawn["titles"][2].endswith("(+0.0)")
    assert capsys.readouterr().out == f"5 images in {folders / 'out' / 'picture.png'}\n"


def test_the_picture_is_a_png_with_the_labels_in_their_colors(folders):
    assert visualize(folders, "--names", "a") == 0
    assert [entry.name for entry in (folders / "out").iterdir()] == ["picture.png"]
    with Image.open(folders / "out" / "picture.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    is_red = pixels[..., 0] - pixels[..., 1:].max(-1) > 60  # aeroplane
    shares = [is_red[height // 2, part * width // 4 :][: width // 4].mean() for part in range(4)]
    np.testing.assert_allclose(shares[1:], [0, 0.5, 0.5], atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--best", 2], "ab"),
        (["--worst", 2], "de"),
        (["--best", 1, "--worst", 1], "ae"),
        (["--best", 4, "--worst", 4], "abcde"),
        (["--names", "e", "b", "e"], "eb"),
        (["--count", 2], "ac"),
        (["--count", 99], "abcde"),
    ],
)
def test_options_choose_the_images(folders, drawn, arguments, names):
    assert visualize(folders, *arguments) == 0
    assert drawn["names"] == list(names)


def test_every_picture_stands_in_its_column(folders, drawn):
    write_mask(folders / "sepl" / "masks", "b")
    write_labels(folders / "truth", {"b": label(TRUE_WIDTH, 255)})
    assert visualize(folders, "--names", "b", "c") == 0
    assert drawn["columns"][2] == "SAM's masks"
    assert drawn["rows"][1][2] is None, "c has no masks"
    image = np.asarray(Image.open(folders / "images" / "b.png"))
    expected = [
        draw_image(image),
        draw_label(image, label(10)),
        draw_masks(image, [mask_rle()]),
        draw_label(image, label(18)),
        draw_label(image, label(TRUE_WIDTH, 255)),
    ]
    for picture, other in zip(drawn["rows"][0], expected, strict=True):
        np.testing.assert_array_equal(picture, other)
    assert drawn["legend"] == ["aeroplane", "void"]


def test_without_a_ground_truth_images_are_evenly_spaced(folders, drawn):
    write_images(folders / "images", {f"x{number:02}": SIZE for number in range(16)})
    for kind in ("cam", "sepl"):
        write_labels(folders / kind, {f"x{number:02}": label(3) for number in range(15)})
    assert visualize(folders, truth=False) == 0
    assert drawn["names"] == ["a", "c", "x00", "x02", "x05", "x07", "x10", "x12"]
    assert drawn["titles"] == drawn["names"] and len(drawn["columns"]) == 3


def test_a_report_of_evaluate_replaces_the_scoring(folders, drawn):
    report = folders / "report.json"
    compared = ["--pseudo-labels", folders / "cam", "--ground-truth", folders / "truth"]
    command(evaluate_command, "--enhanced", folders / "sepl", *compared, "--json", report)
    assert visualize(folders, "--report", report, "--best", 1, "--worst", 1, truth=False) == 0
    assert drawn["names"] == ["a", "e"]
    assert drawn["titles"][0].endswith("mIoU 25.0 → 100.0 (+75.0)")
    assert "ground truth" not in drawn["columns"]

    content = json.loads(report.read_text())
    for image in content["images"]:
        image["gain"] = image["before"] = None if image["name"] == "a" else 0.0
    report.write_text(json.dumps(content))
    assert visualize(folders, "--report", report, "--best", 1) == 0
    assert drawn["names"] == ["b"], "an image without a score before has no gain"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": [{"name": "a", "after": 1}]}'])
def test_what_is_no_report_of_a_comparison_is_refused(folders, content):
    (folders / "report.json").write_text(content)
    with pytest.raises(DatasetError, match="report.json is no report of labels before and after"):
        visualize(folders, "--report", folders / "report.json")
    assert not (folders / "out").exists()


def cut_image(folders):
    path = folders / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


def other_image_size(folders):
    write_images(folders / "images", {"b": (SIZE[0], 50)})


def other_label_size(folders):
    write_labels(folders / "sepl", {"b": np.zeros((3, 3))})


def unknown_class(folders):
    write_labels(folders / "cam", {"b": label(4, 99)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folders: (folders / "images" / "b.png").unlink(), "no image of this name"),
        (lambda folders: (folders / "cam" / "b.png").unlink(), "no pseudo-label in"),
        (lambda folders: (folders / "truth" / "b.png").unlink(), "no ground truth in"),
        (cut_image, "b.png"),
        (other_image_size, r"size (24, 50) (H, W), but its labels have (24, 40)"),
        (other_label_size, "sizes (H, W) disagree"),
        (unknown_class, "class indices [99]"),
    ],
)
def test_an_image_that_cannot_be_drawn_is_named_and_the_others_are_drawn(
    folders, drawn, capsys, damage, message
):
    damage(folders)
    assert visualize(folders, "--names", "a", "b", "c") == 1
    assert drawn["names"] == ["a", "c"]
    error = capsys.readouterr().err
    assert error.startswith("1 image with problems:\n  b: ") and message in error


def test_a_damaged_file_does_not_hide_the_best_of_the_others(folders, drawn, capsys):
    unknown_class(folders)
    assert visualize(folders, "--best", 2) == 1
    assert drawn["names"] == ["a", "c"]
    assert "class indices [99]" in capsys.readouterr().err


def test_masks_that_were_asked_for_and_cannot_be_read_are_named(folders, drawn, capsys):
    write_mask(folders / "masks", "a")
    write_mask(folders / "masks", "b", size=(5, 5))
    assert visualize(folders, "--names", "a", "b", "c", "--masks", folders / "masks") == 1
    assert [row[2] is not None for row in drawn["rows"]] == [True, False, False]
    error = capsys.readouterr().err
    assert error.count("drawn without masks") == 2 and "  a: " not in error


def test_with_no_row_there_is_no_picture(folders, capsys):
    with pytest.raises(DatasetError, match="no image could be drawn"):
        visualize(folders, "--names", "nowhere")
    assert "nowhere: no image of this name" in capsys.readouterr().err
    write_labels(folders / "truth", dict.fromkeys(WIDTHS, label(SIZE[1], 255)))
    with pytest.raises(DatasetError, match="no image could be drawn"):
        visualize(folders)
    for path in (folders / "images").iterdir():
        path.rename(path.with_stem(f"other_{path.stem}"))
    with pytest.raises(DatasetError, match="no image has a file of each kind"):
        visualize(folders)
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--best", 1, "--count", 2], "exclude each other"),
        (["--names", "a", "--worst", 2], "exclude each other"),
        (["--names", "a", "--report", "report.json"], "exclude each other"),
        (["--best", 0, "--worst", 0], "nothing to draw"),
        (["--worst", 0], "nothing to draw"),
        (["--output", "picture.jpg"], "picture.jpg.*PNG"),
    ],
)
def test_options_that_contradict_are_refused(folders, arguments, message):
    with pytest.raises(InputError, match=message):
        visualize(folders, *arguments)


def test_gains_need_a_ground_truth(folders):
    with pytest.raises(InputError, match="--ground-truth"):
        visualize(folders, "--best", 1, truth=False)


def test_ties_go_by_name_and_unknown_gains_do_not_count():
    scores = [ImageScore("d", 0.5, 0.6), ImageScore("b", 0.5, 0.6), ImageScore("c", 0.1, 0.1)]
    scores += [ImageScore("a", math.nan, math.nan), ImageScore("e", 0.9, 0.2)]
    assert best_and_worst(scores, 1, 0) == ["b"]
    assert best_and_worst(scores, 2, 1) == ["b", "d", "e"]
    assert best_and_worst(scores, 0, 9) == ["b", "d", "c", "e"]
    assert best_and_worst(scores, 3, 3) == ["b", "d", "c", "e"]


def test_evenly_spaced_names_are_distinct_and_in_order():
    names = list("abcdefghij")
    assert evenly_spaced(names, 3) == ["a", "d", "g"]
    assert evenly_spaced(names, 10) == evenly_spaced(names, 11) == names
    assert evenly_spaced(names, 1) == ["a"]
