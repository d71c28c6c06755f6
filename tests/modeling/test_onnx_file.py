"""s4m-export --format onnx: onnxruntime finds the same instances in images of several sizes."""

import json
import sys

import pytest
import torch

from s4m_d2.commands import export

BGR = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [10.0, 90.0, 150.0]]


def run(tmp_path, *more):
    words = [tmp_path / "w.pth", tmp_path / "out.onnx", "--config-file", tmp_path / "config.yaml"]
    return export.main(["--format", "onnx", *map(str, words), *more])


@torch.no_grad()
def test_onnxruntime_finds_the_same_instances(saved, tmp_path, capsys):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = saved(*BGR, "MODEL.MASK_FORMER.TEST.LARGEST_COMPONENT", True)
    run(tmp_path)
    assert "LARGEST_COMPONENT" in capsys.readouterr().out
    model.largest_component = False
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    names = session.get_modelmeta().custom_metadata_map["classes"]
    assert json.loads(names) == ["class 0", "class 1"]
    generator = torch.Generator().manual_seed(3)
    for size in ((64, 96), (157, 70), (200, 280)):
        image = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        found = session.run(["boxes", "scores", "classes", "masks"], {"image": image.numpy()})
        boxes, scores, classes, masks = map(torch.from_numpy, found)
        ours = model([{"image": image.permute(2, 0, 1).flip(0)}])[0]["instances"]
        assert 0.01 < ours.pred_masks.float().mean() < 0.98
        assert (classes == ours.pred_classes).all()
        torch.testing.assert_close(scores, ours.scores, atol=1e-5, rtol=1e-4)
        assert (masks != ours.pred_masks).float().mean() < 1e-4
        torch.testing.assert_close(boxes, ours.pred_boxes.tensor, atol=1.0, rtol=0)


def test_a_file_is_kept_and_the_missing_package_named(saved, tmp_path, monkeypatch, capsys):
    saved()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(tmp_path) == 1 and "pip install onnx" in capsys.readouterr().err
    (tmp_path / "out.onnx").write_bytes(b"old")
    assert run(tmp_path) == 1 and "--force" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out.onnx", "w.pth"]
