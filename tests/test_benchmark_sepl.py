"""tools/benchmark.py --sepl: the plain form by hand, what is measured, and a complete run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark  # noqa: E402
from benchmarking import plain_sepl, sepl  # noqa: E402

from s4m_d2.sepl import select_masks  # noqa: E402


def masks_of(*rows):
    return np.array(rows, dtype=bool)[:, None]


@pytest.mark.parametrize(
    ("label", "masks", "expected"),
    [
        pytest.param([1, 1, 0, 0, 0], [[1, 1, 1, 0, 0]], [1, 1, 1, 0, 0], id="redrawn"),
        pytest.param([1, 1, 0, 0, 2], [[1, 1, 1, 0, 0]], [1, 1, 1, 0, 2], id="2 has no mask"),
        pytest.param([1, 0, 0, 0, 0], [[1, 1, 0, 0, 0]], [1, 1, 0, 0, 0], id="by o_p"),
        pytest.param([1, 1, 0, 0, 0], [[0, 1, 1, 0, 0]], [1, 1, 0, 0, 0], id="half is too little"),
        pytest.param([1, 0, 0, 255, 0], [[1, 1, 0, 0, 0]], [1, 1, 0, 255, 0], id="void stays"),
        pytest.param(
            [3, 3, 2, 2, 2],
            [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]],
            [3, 3, 3, 2, 2],
            id="the smaller mask wins",
        ),
        pytest.param([2, 1, 0, 0, 0], [[1, 1, 1, 0, 0]], [2, 1, 1, 0, 0], id="1 before 2"),
        pytest.param(
            [1, 1, 1, 2, 2, 1, 1],
            [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]],
            [0, 1, 1, 2, 2, 1, 1],
            id="2 covered, so put back",
        ),
    ],
)
def test_the_plain_form_by_hand(label, masks, expected):
    found = plain_sepl.enhance(np.array([label], np.uint8), masks_of(*masks))
    assert found.tolist() == [expected]


def test_the_scene_is_of_the_promised_size_and_like_sams():
    label, masks = made = sepl.scene()
    assert label.shape == (500, 500) and masks.shape == (150, 500, 500)
    assert set(np.unique(label)) == {*range(21), sepl.VOID}
    areas = masks.sum((1, 2))
    assert (np.diff(areas) <= 0).all() and areas[0] > 50 * areas[-1] > 0
    pixels = masks.reshape(len(masks), -1)[:, ::5].astype(np.float32)
    nested = np.triu(pixels @ pixels.T == pixels.sum(1), 1).sum()
    assert nested > 100 and masks.sum(0).mean() > 2
    selection = select_masks(label, masks)
    assert 50 < selection.selected.sum() < 125 and len(selection.unmatched_classes) < 5
    assert all(np.array_equal(*pair) for pair in zip(made, sepl.scene(), strict=True))


def small_scene():
    return sepl.scene((50, 50), classes=4)


def test_a_complete_run(tmp_path, capsys, monkeypatch):
    made = small_scene()
    monkeypatch.setattr(sepl, "scene", lambda: made)
    options = ["--sepl", "--device", "cpu", "--repeats", "3", "--warmup", "0"]
    assert benchmark.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text())
    found = result["sepl"]
    assert found["size"] == [50, 50] and found["masks"] == len(made.masks)
    assert list(found["forms"]) == [sepl.DENSE, sepl.RLE, sepl.PLAIN]
    assert all(form["repeats"] == 3 for form in found["forms"].values())
    assert list(found["ratios"]) == [sepl.DENSE, sepl.RLE] and not result["stages"]
    text = capsys.readouterr().out
    for name, ratio in found["ratios"].items():
        assert f"{name}" in text and f"{ratio['median']:.1f}x" in text
    assert not (tmp_path / "benchmark.png").exists()


@pytest.mark.parametrize("broken", ["enhance", "plain"])
def test_a_form_that_gives_something_else_is_not_timed(broken, capsys, tmp_path, monkeypatch):
    """One pixel is enough."""

    def changed(label, masks):
        result = plain_sepl.enhance(*made)
        result[3, 4] ^= 1
        return result

    made = small_scene()
    monkeypatch.setattr(sepl, "scene", lambda: made)
    if broken == "enhance":
        monkeypatch.setattr(sepl, "enhance", changed)
    else:
        right = plain_sepl.enhance
        monkeypatch.setattr(plain_sepl, "enhance", lambda *args: ~right(*args))
    options = ["--sepl", "--device", "cpu", "--output", str(tmp_path)]
    assert benchmark.main(options) == 1
    assert "Mismatch: sepl, dense masks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
