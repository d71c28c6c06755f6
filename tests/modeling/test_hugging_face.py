"""s4m-export --format transformers: the folder is the same model in Hugging Face's code."""

import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import tiny_timm  # noqa: E402, F401 (registers s4m_swin)
from transformers import (  # noqa: E402
    AutoImageProcessor,
    Mask2FormerForUniversalSegmentation,
)

import s4m_d2.commands.export as export  # noqa: E402

TIMM = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.PRETRAINED", False]
SWIN = [*TIMM, "MODEL.TIMM.NAME", "s4m_swin", "MODEL.TIMM.OUT_NORM", True]
BOTTLENECK = [
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STRIDE_IN_1X1", True,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
    "MODEL.RESNETS.NORM", "FrozenBN",
    "INPUT.FORMAT", "BGR",
    "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD", [57.375, 57.12, 58.395],
    "MODEL.SEM_SEG_HEAD.MASK_DIM", 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM", 32,
]  # fmt: skip
HEADS = ["MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", 4]


def run(tmp_path, output="out"):
    words = [tmp_path / "w.pth", tmp_path / output, "--config-file", tmp_path / "config.yaml"]
    return export.main(["--format", "transformers", *map(str, words)])


@pytest.mark.parametrize("options", [(), BOTTLENECK, SWIN], ids=["r18", "bottleneck", "swin"])
@torch.no_grad()
def test_hugging_face_gives_the_same_logits_for_an_image(saved, tmp_path, capsys, options):
    model = saved(*options)
    run(tmp_path)
    assert "largest difference" in capsys.readouterr().out
    image = torch.randint(0, 256, (3, 160, 224), generator=torch.Generator().manual_seed(2))
    image = image.to(torch.uint8)
    view = image if model.input_format == "RGB" else image.flip(0)
    ours = model.predict_queries([{"image": view}])

    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt", do_resize=False)
    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out")
    theirs = loaded(pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(
        theirs.class_queries_logits, ours["pred_logits"], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        theirs.masks_queries_logits, ours["pred_masks"], atol=1e-4, rtol=1e-4
    )
    assert loaded.config.id2label == {0: "class 0", 1: "class 1"}


MISTAKES = {  # options, and a word of the message
    "no out norm": ([*SWIN, "MODEL.TIMM.OUT_NORM", False], "OUT_NORM"),
    "another backbone": ([*TIMM, "MODEL.TIMM.NAME", "s4m_swinv2"], "SwinTransformerV2"),
    "heads": (HEADS, "heads"),
    "group norm": (["MODEL.RESNETS.NORM", "GN"], "batch norms"),
}


@pytest.mark.parametrize("options, word", MISTAKES.values(), ids=MISTAKES)
def test_another_model_is_refused_and_nothing_is_written(saved, tmp_path, capsys, options, word):
    saved(*options)
    assert run(tmp_path) == 1 and word in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "w.pth"]


def test_the_package_is_missing_or_the_folder_is_full(saved, tmp_path, monkeypatch, capsys):
    saved()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert run(tmp_path) == 1 and "no empty folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(tmp_path, "new") == 1 and "pip install transformers" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
