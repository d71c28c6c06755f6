"""tools/benchmark.py --sepl: what is measured, and a complete run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark  # noqa: E402
from benchmarking import plain_sepl, sepl  # noqa: E402


def test_the_scene_is_of_the_promised_size_and_like_sams():
    label, masks = made = sepl.scene()
    assert label.shape == (500, 500) and masks.shape == (150, 500, 500)
    assert set(np.unique(label)) == {*range(21), sepl.VOID}
    areas = masks.sum((1, 2))
    assert (np.diff(areas) <= 0).all() and areas[0] > 50 * areas[-1] > 0
    pixels = masks.reshape(len(masks), -1)[:, ::5].astype(np.float32)
    nested = np.triu(pixels @ pixels.T == pixels.sum(1), 1).sum()
    assert nested > 100 and masks.sum(0).mean() > 2
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
