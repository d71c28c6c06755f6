"""From unlabeled batches to the student's targets, and what is asked of a model for that."""

import functools
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine import BadSteps, S4MTrainable, S4MTrainer, StudentStep
from s4m_d2.engine.checks.resource_checks import model_blueprint
from s4m_d2.engine.labeling.protocol import check_model, check_predictions
from s4m_d2.engine.labeling.pseudo_labeling import AMP, FLOAT32, PseudoLabeling
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.modeling import S4MMaskFormer
from s4m_d2.semi.arp import ARP
from s4m_d2.semi.refinement import TeacherMasks

STRIDE = 4
CLASSES = 3
CERTAIN = 20.0


class KnownTeacher:
    """Finds a rectangle of class 1 in each image, and remembers what it was shown."""

    def __init__(self, boxes, padded_size) -> None:
        self.boxes, self.padded_size = boxes, padded_size
        self.seen: list[torch.Tensor] = []

    def predict_queries(self, batch):
        self.seen = [sample["image"] for sample in batch]
        height, width = (side // STRIDE for side in self.padded_size)
        logits = torch.zeros(len(batch), 2, CLASSES + 1)
        masks = torch.full((len(batch), 2, height, width), -CERTAIN)
        for i, box in enumerate(self.boxes):
            logits[i, 0, 1] = CERTAIN
            logits[i, 1, CLASSES] = CERTAIN  # the second query sees nothing
            if box is None:
                logits[i, 0] = torch.tensor([0.0, 0.0, 0.0, CERTAIN])
                continue
            x0, y0, x1, y1 = (side // STRIDE for side in box)
            masks[i, 0, y0:y1, x0:x1] = CERTAIN
        sizes = [tuple(sample["image"].shape[-2:]) for sample in batch]
        return {
            "pred_logits": logits,
            "pred_masks": masks,
            "image_sizes": sizes,
            "padded_size": self.padded_size,
        }


def unlabeled(sizes):
    """Samples whose views are constant: 10 * (i + 1), and 200 in the weak view."""
    return [
        {
            "file_name": f"image_{i}.png",
            "height": 2 * height,
            "width": 2 * width,
            "image": torch.full((3, height, width), 10 * (i + 1), dtype=torch.uint8),
            "image_weak": torch.full((3, height, width), 200, dtype=torch.uint8),
            "seeds": sample_seeds(0, "unlabeled", i),
        }
        for i, (height, width) in enumerate(sizes)
    ]


class ComputingTeacher(nn.Linear):
    """The same with weights; remembers in which precision it computes."""

    def predict_queries(self, batch):
        self.computed = self(torch.ones(1, 1)).dtype
        return KnownTeacher(BOXES, SIZES[0]).predict_queries(batch)


def labeling(
    teacher, arp=None, refiner=None, strong_view=lambda images, generators: images, **changes
):
    settings = {"score_thresh": 0.7, "min_area": 5.0, "mask_thresh": 0.5, "num_classes": CLASSES}
    return PseudoLabeling(
        teacher=SimpleNamespace(model=teacher),
        refiner=refiner or TeacherMasks(),
        arp=arp,
        strong_view=strong_view,
        **settings | changes,
    )


SIZES = [(32, 64), (24, 48)]  # the second is padded to the first
BOXES = [(8, 0, 32, 32), (0, 0, 16, 24)]  # no corners inside, which resizing would round


def inside(box, size):
    mask = torch.zeros(size, dtype=torch.bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def test_pseudo_labels_reach_the_student_in_the_frame_of_its_image():
    teacher = KnownTeacher(BOXES, SIZES[0])
    views = labeling(teacher)(unlabeled(SIZES))
    for sample, size, box in zip(views.student_batch, SIZES, BOXES, strict=True):
        instances = sample["instances"]
        assert instances.image_size == size == tuple(sample["image"].shape[-2:])
        assert instances.gt_classes.tolist() == [1]
        assert torch.equal(instances.gt_masks.tensor[0], inside(box, size))
        assert instances.gt_boxes.tensor.tolist() == [list(map(float, box))]


def test_the_teacher_sees_the_weak_view_and_the_student_the_undistorted_one():
    teacher = KnownTeacher(BOXES, SIZES[0])
    batch = unlabeled(SIZES)
    views = labeling(teacher)(batch)
    assert all((image == 200).all() for image in teacher.seen)
    for i, sample in enumerate(views.student_batch):
        assert (sample["image"] == 10 * (i + 1)).all()
        assert sample["seeds"] == batch[i]["seeds"]
        assert "image_weak" not in sample


@pytest.mark.parametrize(
    ("precision", "computed"), [(FLOAT32, torch.float32), (AMP, torch.bfloat16)]
)
def test_in_float32_the_teacher_labels_outside_autocast(precision, computed):
    teacher = ComputingTeacher(1, 1)
    pipeline = labeling(teacher)
    pipeline.precision = precision
    with torch.autocast("cpu", torch.bfloat16):
        views = pipeline(unlabeled(SIZES))
        assert teacher(torch.ones(1, 1)).dtype == torch.bfloat16  # again, for the student
    assert teacher.computed == computed and len(views.student_batch[0]["instances"]) == 1


def test_the_refiner_sees_the_weak_view_in_rgb():
    shown = []

    class Spy(TeacherMasks):
        def __call__(self, selections, images, image_sizes, generators=None):
            shown.append((images, list(map(tuple, image_sizes))))
            return super().__call__(selections, images, image_sizes, generators)

    batch = unlabeled(SIZES)
    for sample in batch:
        sample["image_weak"][0] = 1  # blue first
    pipeline = labeling(KnownTeacher(BOXES, SIZES[0]), refiner=Spy())
    pipeline.input_format = "BGR"
    pipeline(batch)
    images, sizes = shown[0]
    assert sizes == SIZES
    assert (images[0, 2] == 1).all() and (images[0, 0] == 200).all()


def test_arp_exchanges_pixels_and_labels_before_the_strong_view():
    sizes = [(32, 64)] * 2
    views = labeling(
        KnownTeacher([BOXES[0], (40, 0, 64, 32)], sizes[0]),
        arp=ARP(min_area=1, pair_fraction=0.5),
        strong_view=lambda images, generators: [image + 100 for image in images],
    )(unlabeled(sizes))
    first = views.student_batch[0]
    pasted = inside((40, 0, 64, 32), sizes[0])
    assert (first["image"][:, pasted] == 120).all() and (first["image"][:, ~pasted] == 110).all()
    assert len(first["instances"]) == 2
    assert views.stats["pseudo_labels/per_image"] == 1
    assert views.stats["pseudo_labels/per_image_after_arp"] == 2


def test_statistics_are_shares_of_all_queries():
    views = labeling(KnownTeacher([BOXES[0], None], SIZES[0]))(unlabeled(SIZES))
    assert views.stats == {
        "pseudo_labels/per_image": 0.5,
        "pseudo_labels/per_image_after_arp": 0.5,
        "pseudo_labels/dropped_no_object": 0.75,
        "pseudo_labels/dropped_score": 0.0,
        "pseudo_labels/dropped_area": 0.0,
        "pseudo_labels/dropped_non_finite": 0.0,
    }


class TwiceTheSame(KnownTeacher):
    """Its second query sees the same rectangle, less certain, as class 2."""

    def predict_queries(self, batch):
        predictions = super().predict_queries(batch)
        predictions["pred_logits"][:, 1] = torch.tensor([0.0, 0.0, 5.0, 0.0])
        predictions["pred_masks"][:, 1] = predictions["pred_masks"][:, 0]
        return predictions


def test_duplicates_reach_the_student_only_if_nobody_looks_for_them():
    pipeline = labeling(TwiceTheSame(BOXES, SIZES[0]))
    for thresh, classes, logged in ((1.0, [1, 2], None), (0.7, [1], 1)):
        pipeline.duplicate_iou = thresh
        views = pipeline(unlabeled(SIZES))
        assert [s["instances"].gt_classes.tolist() for s in views.student_batch] == [classes] * 2
        assert views.stats.get("pseudo_labels/duplicates_per_image") == logged


def test_low_quality_is_dropped_and_weights_reach_the_student():
    """Of the certain masks; the second image's is redrawn with half of the pixels."""

    class Half(TeacherMasks):
        def __call__(self, *args):
            refinement = super().__call__(*args)
            masks = refinement.labels[1].masks.clone()
            masks[:, : BOXES[1][3] // 2] = False
            refinement.labels[1] = refinement.labels[1].with_masks(masks)
            return refinement

    pipeline = labeling(KnownTeacher(BOXES, SIZES[0]), refiner=Half())
    pipeline.label_weight = pipeline.pixel_weight = True
    views = pipeline(unlabeled(SIZES))
    weights = [sample["instances"].gt_weights.item() for sample in views.student_batch]
    assert weights == pytest.approx([1.0, 0.5])
    for sample, size in zip(views.student_batch, SIZES, strict=True):
        assert sample["instances"].gt_doubts.shape == (1, *size)
    pipeline.mask_quality_thresh, pipeline.label_weight = 0.6, False
    views = pipeline(unlabeled(SIZES))
    assert [len(sample["instances"]) for sample in views.student_batch] == [1, 0]
    assert not views.student_batch[0]["instances"].has("gt_weights")
    assert views.stats["pseudo_labels/low_quality_per_image"] == 0.5


def test_views_depend_on_the_samples_seeds_only():
    def noise(images, generators):
        return [
            torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)
            for image, generator in zip(images, generators, strict=True)
        ]

    pipeline = labeling(KnownTeacher(BOXES, SIZES[0]), strong_view=noise)
    torch.manual_seed(1)
    first = pipeline(unlabeled(SIZES)).student_batch
    torch.manual_seed(2)
    second = pipeline(unlabeled(SIZES)).student_batch
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["image"][:, :24, :48], first[1]["image"])


class TwoLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss_ce": self.weight * len(batch), "loss_mask": self.weight * 10.0}


def test_the_unsupervised_losses_are_weighted_and_named():
    model = TwoLosses()
    views = SimpleNamespace(student_batch=[4], stats={"n": 2})
    step = StudentStep(
        model,
        [([{}] * 3, [{}] * 2)],
        torch.optim.SGD(model.parameters(), lr=0.5),
        BadSteps(0, "unused", 0),
        labeling=lambda batch: views,
        unsup_loss_weight=2.0,
    )
    step.train(0, 1)
    logged = {name: value for name, (value, _) in step.storage.latest().items()}
    losses = {"loss_ce": 3, "loss_mask": 10, "unsup/loss_ce": 2, "unsup/loss_mask": 20}
    assert {name: logged[name] for name in losses} == pytest.approx(losses)
    assert logged["n"] == 2
    assert model.weight.item() == pytest.approx(1 - 0.5 * (3 + 10 + 2 + 20))


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
