"""examples/own_meta_arch: TinySOLO by itself, and trained by the teacher–student trainer."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, stage_config
from s4m_d2.engine.labeling.protocol import check_model, check_predictions

PROJECT = "own_meta_arch"
CONFIG = "own_meta_arch/tiny_solo.yaml"
TINY = {"MODEL__RESNETS__OUT_FEATURES": "['res2', 'res3']", "MODEL__TINY_SOLO__CHANNELS": 32}
FEW_CELLS = {"MODEL__TINY_SOLO__GRID_SIZE": "(2, 3)"}  # SAM is asked about each


@pytest.fixture
def model(example_config):
    torch.manual_seed(0)
    return build_model(example_config(CONFIG, **TINY, MODEL__TINY_SOLO__GRID_SIZE="(4, 8)"))


def instances(size, boxes, labels):
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return Instances(size, gt_masks=BitMasks(masks), gt_classes=torch.tensor(labels))


def scene(boxes, labels, size=(64, 128)):
    """A gray image with a bright rectangle of another color for each class."""
    targets = instances(size, boxes, labels)
    image = torch.full((3, *size), 90, dtype=torch.uint8)
    for mask, label in zip(targets.gt_masks.tensor, labels, strict=True):
        image[label % 3, mask] = 250
    return {"image": image, "instances": targets}


SCENES = [
    scene([(4, 8, 40, 56), (72, 0, 124, 36)], [1, 2]),
    scene([(16, 20, 60, 60)], [3], size=(64, 96)),  # padded to the first
]


def test_it_is_what_the_protocol_asks_for(model):
    check_model(model)
    sizes = [tuple(sample["image"].shape[-2:]) for sample in SCENES]
    with torch.no_grad():
        found = model.eval().predict_queries(SCENES)
    check_predictions(found, sizes, model, model.num_classes)
    assert found["pred_masks"].shape == (2, 4 * 8, 64 // 4, 128 // 4)


@pytest.fixture
def trainer(example_config, tmp_path):
    changes = {"SOLVER__MAX_ITER": 4, "S4M__BURN_IN": 2, "DATASETS__TEST": "()"}
    cfg = example_config(CONFIG, **TINY, **FEW_CELLS, **changes)
    cfg = stage_config(cfg, "student")
    teacher = S4MTrainer.build_model(cfg.clone())
    with torch.no_grad():  # another model than the student starts as
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    S4MCheckpointer(teacher, str(tmp_path)).save("stage_1")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return S4MTrainer(cfg, str(tmp_path / "stage_1.pth"))


def test_pseudo_labels_are_what_the_students_unsupervised_loss_sees(trainer):
    seen, views = [], []
    losses, labeling = trainer.trained_model.losses, trainer.pseudo_labeling

    def spy(outputs, targets):
        seen.append(targets)
        return losses(outputs, targets)

    trainer.trained_model.losses = spy
    trainer._trainer.labeling = lambda batch: views.append(labeling(batch)) or views[0]
    trainer.max_iter = 1
    trainer.train()
    supervised, unsupervised = seen
    assert sum(map(len, views[0].arp_labels)) > 0
    for targets, labels in zip(unsupervised, views[0].arp_labels, strict=True):
        assert torch.equal(targets.gt_classes, labels.labels)
        assert torch.equal(targets.gt_masks.tensor, labels.masks)
    assert len(supervised) == len(unsupervised) == 2


def test_the_script_trains_both_stages_and_evaluates_what_they_wrote(
    import_example, command_line, tmp_path
):
    script = import_example(PROJECT, "train_net")
    tiny = TINY | FEW_CELLS
    changes = tiny | {"S4M__TEACHER__MAX_ITER": 1, "SOLVER__MAX_ITER": 2, "S4M__BURN_IN": 1}
    script.main(command_line(CONFIG, **changes))
    student = Path(tmp_path, "run", "student")
    lines = (student / "metrics.json").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"loss_class", "unsup/loss_class", "unsup/loss_dice", "teacher/segm/AP"} <= logged
    results = json.loads((student / "results.json").read_text())
    weights = str(student / "model_final.pth")
    again = script.main(command_line(CONFIG, "--eval-only", **tiny, MODEL__WEIGHTS=weights))
    assert again["segm"]["AP"] == pytest.approx(results["segm"]["AP"], nan_ok=True)
