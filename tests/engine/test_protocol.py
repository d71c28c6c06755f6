"""What S4MTrainer asks of a model: sound ones pass, and each defect is named."""

import functools
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine import S4MTrainable, S4MTrainer
from s4m_d2.engine.checks.resource_checks import model_blueprint
from s4m_d2.engine.labeling.protocol import check_model, check_predictions
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.modeling import S4MMaskFormer

from .test_pseudo_labeling import CERTAIN, CLASSES, SIZES, labeling, unlabeled


class OnlyLosses(nn.Module):
    """A Detectron2 model as it usually is."""

    def __init__(self, cfg=None):
        super().__init__()

    def forward(self, batched_inputs):
        return {"loss": torch.zeros(())}


class OnlyPredictions(nn.Module):
    def predict_queries(self, batched_inputs):
        return {}


@pytest.fixture
def only_losses(small_config, monkeypatch):
    """Configs of a registered model that has only losses."""
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OnlyLosses", OnlyLosses)
    return functools.partial(small_config, MODEL__META_ARCHITECTURE="OnlyLosses")


def test_what_a_model_lacks_is_named():
    assert issubclass(S4MMaskFormer, S4MTrainable)
    lacking = {OnlyLosses: "no predict_queries", OnlyPredictions: "no forward", nn.Module: "and"}
    for cls, named in lacking.items():
        with pytest.raises(ConfigError, match=f"{cls.__name__} has .*{named}"):
            check_model(cls())


def test_a_run_is_refused_before_stage_1_if_stage_2_could_not_train_the_model(only_losses):
    changes = {"S4M__DISTILL__ENABLED": False}
    with pytest.raises(ConfigError, match="OnlyLosses has no predict_queries"):
        model_blueprint(only_losses(**changes))
    model_blueprint(only_losses(**changes, S4M__STAGE="teacher"))  # losses are all that it needs


def test_distillation_that_a_model_does_not_have_is_never_skipped_silently(only_losses):
    with pytest.raises(ConfigError, match="OnlyLosses .*'distillation'"):
        S4MTrainer.build_model(only_losses())
    cfg = only_losses(S4M__DISTILL__ENABLED=False)
    assert isinstance(S4MTrainer.build_model(cfg), OnlyLosses)
    with pytest.raises(ConfigError, match="OnlyLosses has no predict_queries"):
        S4MTrainer(cfg, "not reached.pth")


def predictions(**changes):
    """Two queries on the first image, one on the second; each masks the left half."""
    masks = torch.full((2, 8, 16), -CERTAIN)
    masks[:, :, :8] = CERTAIN
    logits = torch.tensor([[0.0, CERTAIN, 0.0, 0.0], [0.0, 0.0, 0.0, CERTAIN]])
    return {
        "pred_logits": [logits, logits[:1]],
        "pred_masks": [masks, masks[:1]],
        "image_sizes": SIZES,
        "padded_size": (32, 64),
    } | changes


LOGITS, MASKS = predictions()["pred_logits"], predictions()["pred_masks"]


def test_sound_predictions_pass_as_lists_and_as_tensors():
    check_predictions(predictions(), SIZES, OnlyLosses(), CLASSES)
    logits, masks = (torch.stack([v[:1] for v in values]) for values in (LOGITS, MASKS))
    tensors = predictions(pred_logits=logits, pred_masks=masks)
    check_predictions(tensors, SIZES, OnlyLosses(), CLASSES)


def test_each_defect_of_predictions_is_named():
    for broken, named in (
        (None, "pred_logits and pred_masks and image_sizes and padded_size"),
        ({"pred_logits": LOGITS[0]}, "pred_masks"),
        (predictions(pred_masks=MASKS[:1]), "pred_masks"),
        (predictions(pred_logits=LOGITS[::-1]), r"image 0, .*\(1, 4\) .* \(2, 8"),
        (predictions(pred_logits=[x[0] for x in LOGITS]), r"\(Q, K \+ 1\)"),
        (predictions(pred_logits=[x[:, :3] for x in LOGITS]), "3 classes; expected 4"),
        (predictions(pred_masks=[x > 0 for x in MASKS]), "torch.bool"),
        (predictions(image_sizes=SIZES[::-1]), r"image 0, .*\(24, 48\)"),
        (predictions(padded_size=(32, 60)), r"\(32, 60\)"),
    ):
        with pytest.raises(InputError, match=f"OnlyLosses.predict_queries: .*{named}"):
            check_predictions(broken, SIZES, OnlyLosses(), CLASSES)
    teacher = SimpleNamespace(predict_queries=lambda batch: predictions())
    with pytest.raises(InputError, match="have 4 classes; expected 9"):
        labeling(teacher, num_classes=8)(unlabeled(SIZES))


@pytest.mark.parametrize("half", [(slice(None), slice(32)), (slice(16), slice(None))])
def test_images_may_have_different_numbers_of_queries_and_resolutions(half):
    frame = torch.zeros(32, 64, dtype=torch.bool)  # the padded one
    frame[half] = True
    coarse, fine = (CERTAIN * (2 * frame[None, ::step, ::step].float() - 1) for step in (4, 2))
    found = predictions(pred_masks=[coarse.repeat(2, 1, 1), fine])
    teacher = SimpleNamespace(predict_queries=lambda batch: found)
    views = labeling(teacher)(unlabeled(SIZES))
    for labels, (height, width) in zip(views.refined, SIZES, strict=True):
        assert labels.labels.tolist() == [1]
        assert torch.equal(labels.masks[0], frame[:height, :width])
    assert views.stats["pseudo_labels/dropped_no_object"] == pytest.approx(1 / 3)
