"""SAM on labeled images: measured, refined masks compared, fine-tuned; what follows from it."""

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import QUICKSTART

from s4m_d2.engine import FineTuneTrainer, PseudoLabeling, S4MTrainer, TeacherTrainer
from s4m_d2.engine.checks.resource_checks import sam_blueprint
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.labeling import gate, sam_adaptation, sam_quality
from s4m_d2.engine.labeling.sam_quality import held_out_share, labeled_quality
from s4m_d2.engine.own_data import load_run
from s4m_d2.engine.stages import stage_config
from s4m_d2.engine.training.stop_signals import Stopped
from s4m_d2.report import read_results
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.automatic_masks import AutomaticMasks
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.refinement import TeacherMasks

from .test_quality import Oracle

SHIFT = 3  # px


class Shifted(Oracle):
    """Its masks are right, but too far to the right."""

    def predict_queries(self, batch):
        found = super().predict_queries(batch)
        return found | {"pred_masks": found["pred_masks"].roll(SHIFT, dims=3)}


class Shift:
    """A refiner that moves masks to the left, if it is asked with a box, else to the right."""

    def __init__(self, cfg):
        self.masks, self.prompt = TeacherMasks(), "points"

    def __call__(self, *args):
        found = self.masks(*args)
        by = -SHIFT if self.prompt == "box" else SHIFT
        labels = [replace(x, masks=x.masks.roll(by, dims=2), areas=None) for x in found.labels]
        return replace(found, labels=labels)


@pytest.fixture
def gate_config(small_config):
    def make(gate="auto", prompt="points", **changes):
        base = {"DATASETS__TRAIN": ("toyscapes_train",), "S4M__PSEUDO_LABEL__MIN_AREA": 0.0}
        changes = {"S4M__REFINE__GATE": gate, "S4M__REFINE__PROMPT": prompt} | changes
        return small_config(**base | changes)

    return make


@pytest.mark.parametrize(
    ("teacher", "mode", "prompt", "choice"),
    [
        (Oracle, "warn", "points", "points"),
        (Oracle, "auto", "auto", "off"),
        (Shifted, "auto", "auto", "box"),
        (Shifted, "auto", "both", "off"),
    ],
)
def test_what_makes_masks_worse_is_switched_off_and_the_best_prompt_taken(
    gate_config, teacher, mode, prompt, choice
):
    cfg = gate_config(mode, prompt)
    labeling = PseudoLabeling(cfg, EMATeacher(teacher(), 0.5))
    labeling.refiner = Shift(cfg)
    decision = gate.compare_refinement(cfg, labeling)
    assert decision["choice"] == choice and decision["images"] == 2
    assert (decision["pq"]["before"] == 1.0) == (teacher is Oracle)
    assert len(decision["pq"]) == (4 if prompt == "auto" else 2)
    again = PseudoLabeling(cfg, EMATeacher(teacher(), 0.5))  # of a run that continues
    for part in (labeling, again):
        gate.apply_decision(decision, part)
        assert isinstance(part.refiner, TeacherMasks) == (part.arp is None) == (choice == "off")
        assert choice == "off" or part.refiner.prompt == choice


def test_a_refiner_without_prompts_is_measured_as_it_is(gate_config):
    cfg = gate_config("auto", "auto")
    labeling = PseudoLabeling(cfg, EMATeacher(Oracle(), 0.5))
    labeling.refiner = TeacherMasks().__call__  # takes no attributes
    decision = gate.compare_refinement(cfg, labeling)
    assert decision["pq"] == {"before": 1.0, cfg.S4M.REFINE.METHOD: 1.0}
    gate.apply_decision(decision, labeling)
    assert labeling.arp is not None


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ([], False),
        (["S4M.ARP.ENABLED", "True"], True),
        (["S4M.ARP.ENABLED", "True", "S4M.ARP.GATED", "True"], False),
    ],
)
def test_arp_that_the_user_set_stays_without_refinement(small_options, options, stays):
    changes = {"DATASETS__TRAIN": ("toyscapes_train",), "S4M__PSEUDO_LABEL__MIN_AREA": 0.0}
    words = [*small_options(**changes), "S4M.REFINE.GATE", "auto"]
    cfg, _ = load_run(QUICKSTART, [*words, *options])
    labeling = PseudoLabeling(cfg, EMATeacher(Oracle(), 0.5))
    labeling.refiner = Shift(cfg)
    gate.apply_decision(gate.compare_refinement(cfg, labeling), labeling)
    assert isinstance(labeling.refiner, TeacherMasks) and (labeling.arp is not None) == stays


def test_stage_1_leaves_out_what_is_measured_and_later_stages_do_not(gate_config):
    cfg = gate_config()
    held_out = {record["file_name"] for record in gate.held_out_records(cfg)}
    assert len(held_out) == 2
    seen = {}
    for trainer in (TeacherTrainer, S4MTrainer, FineTuneTrainer):
        loader = trainer.build_train_loader(cfg)
        labeled = loader.labeled if trainer is S4MTrainer else loader
        batches = itertools.islice(iter(labeled), 20 // cfg.SOLVER.IMS_PER_BATCH)
        seen[trainer] = {sample["file_name"] for batch in batches for sample in batch}
    assert not held_out & seen[TeacherTrainer]
    assert held_out <= seen[S4MTrainer] & seen[FineTuneTrainer]


def test_the_last_image_of_a_class_and_copies_of_others_are_not_taken_apart():
    def record(name, *classes):
        segmentation = [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]
        rows = [{"category_id": index, "segmentation": segmentation} for index in classes]
        return {"file_name": name, "annotations": rows}

    def held_out(records):
        return [record["file_name"] for record in held_out_share(records)]

    rare = [record("0", 0, 1), record("1", 0, 2), record("2", 2)]
    others = [record(f"{i}", 0) for i in range(3, 10)]
    assert held_out(rare + others) == ["1", "3"]  # class 2 is then of one image alone
    copied = [record("a_jpg.rf.1.jpg", 0), record("a_jpg.rf.2.jpg", 0), *others]
    assert held_out(copied) == ["a_jpg.rf.1.jpg", "a_jpg.rf.2.jpg"]
    assert held_out([record("x", 0), record("y", 1)]) == ["x"]  # none that leaves others


def test_nothing_is_left_out_where_nothing_is_measured(gate_config):
    for changes in (
        {"gate": "off"},
        {"S4M__REFINE__ENABLED": False},
        {"S4M__STAGE": "teacher"},
        {"S4M__TEACHER_WEIGHTS": "teacher.pth"},
        {"DATASETS__TRAIN": ("toyscapes_train_30pct",)},  # 3 images
    ):
        assert gate.held_out_records(gate_config(**changes)) == []


def test_groups_are_parts_of_all_masks_of_images_or_tiles(small_config):
    whole = labeled_quality(small_config())
    everything, *parts = whole["groups"]
    sizes = [group for group in parts if group["name"].split()[1:]]
    classes = [group for group in parts if group not in sizes]
    assert whole["images"] == 3 and everything["iou"] == whole["iou"] > 0.6
    for groups in (sizes, classes):
        assert sum(group["masks"] for group in groups) == everything["masks"]
        total = sum(group["masks"] * group["iou"] for group in groups)
        assert total == pytest.approx(everything["masks"] * everything["iou"])
    state = torch.get_rng_state()
    tiled = labeled_quality(small_config(INPUT__TILE__SIZE=48))
    assert tiled["images"] > 3 and tiled["groups"][0]["masks"] > everything["masks"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("mode", "useful", "stays"),
    [("auto", 1.0, False), ("auto", 0.1, True), ("warn", 1.0, True), ("off", 1.0, True)],
)
def test_a_sam_whose_masks_are_poor_is_not_used(small_config, monkeypatch, mode, useful, stays):
    """Refinement is decided so with the three labeled images that there are."""
    monkeypatch.setattr(gate, "USEFUL_IOU", useful)
    cfg = small_config(S4M__REFINE__GATE=mode)
    teacher, student = (
        gate.decide_by_sam(stage_config(cfg, stage), stage, resume=False).S4M
        for stage in ("teacher", "student")
    )
    assert teacher.DISTILL.ENABLED == stays and teacher.REFINE.ENABLED
    assert (student.REFINE.ENABLED, student.ARP.ENABLED) == (stays, stays)
    assert cfg.S4M.DISTILL.ENABLED and cfg.S4M.REFINE.ENABLED  # unchanged
    labeling = gate.labeling_of_run(cfg, f"{cfg.OUTPUT_DIR}/student/model_final.pth", Oracle())
    assert isinstance(labeling.refiner, TeacherMasks) != stays and (labeling.arp is None) != stays
    assert Path(cfg.OUTPUT_DIR, "teacher", gate.SAM_RESULT).is_file() == (mode != "off")
    # So do weights elsewhere with the run's config, and those of a run of stage 1 alone.
    for path in ("copied.pth", f"{cfg.OUTPUT_DIR}/teacher/model_final.pth"):
        labeling = gate.labeling_of_run(cfg, path, Oracle())
        assert isinstance(labeling.refiner, TeacherMasks) != stays
        Path(cfg.OUTPUT_DIR, "student", gate.RESULT).unlink(missing_ok=True)
    # A decision of the weights' own run counts, not the config's.
    other = Path(cfg.OUTPUT_DIR).parent / "other" / "student"
    other.mkdir(parents=True)
    (other / gate.RESULT).write_text(json.dumps({"choice": "box"}))
    labeling = gate.labeling_of_run(cfg, f"{other}/model_final.pth", Oracle())
    assert mode == "off" or labeling.refiner.prompt == "box"
    own = small_config(S4M__REFINE__GATE=mode, S4M__ARP__GATED=False)
    assert gate.decide_by_sam(stage_config(own, "student"), "student", resume=False).S4M.ARP.ENABLED


def test_a_continued_run_keeps_what_it_began_with(small_config, monkeypatch):
    cfg = stage_config(small_config(S4M__REFINE__GATE="auto"), "teacher")
    monkeypatch.setattr(gate, "USEFUL_IOU", 1.0)
    gate.decide_by_sam(cfg, "teacher", resume=False)
    torch.save({}, Path(cfg.OUTPUT_DIR, "model_0000001.pth"))
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000001.pth")
    monkeypatch.setattr(gate, "labeled_quality", None)  # it would be called
    assert not gate.decide_by_sam(cfg, "teacher", resume=True).S4M.DISTILL.ENABLED
    Path(cfg.OUTPUT_DIR, gate.SAM_RESULT).unlink()  # of a run that began without
    assert gate.decide_by_sam(cfg, "teacher", resume=True).S4M.DISTILL.ENABLED


def test_the_check_measures_where_that_is_quick(small_config, monkeypatch):
    cfg = small_config()
    sam = sam_blueprint(cfg)
    assert sam_quality.sam_findings(cfg, None) == []
    [measured] = sam_quality.sam_findings(cfg, sam)
    assert f"IoU {labeled_quality(cfg)['iou']:.2f}" in measured.text
    [unread] = sam_quality.sam_findings(small_config(DATASETS__TRAIN=("nothing",)), sam)
    assert unread.status == "warning"
    monkeypatch.setattr(sam_quality, "labeled_quality", None)  # it would be called
    monkeypatch.setattr(sam_quality, "_QUICK_BYTES", 0)
    assert sam_quality.sam_findings(cfg, sam)[0].status == "ok"


@pytest.fixture
def adapting(small_config, tmp_path):
    (tmp_path / "run").mkdir()

    def make(**changes):
        sam = {"S4M__SAM__BACKEND": "tiny_toyscapes", "S4M__SAM__CHECKPOINT": ""}
        base = {"DATASETS__TRAIN": ("toyscapes_train",), "S4M__SAM__ADAPT": 1, **sam}
        return small_config(**base | changes)

    return make


@pytest.fixture
def measured(monkeypatch):
    """IoUs that the measure gives in turn, and the names of the images that it saw."""
    ious, seen = [], []

    def measure(backend, records, **_):
        seen.append({record["file_name"] for record in records})
        return SimpleNamespace(rated=np.array([ious.pop(0)]))

    monkeypatch.setattr(sam_adaptation, "measure_sam", measure)
    return ious, seen


def test_a_better_sam_is_kept_and_serves_all(adapting, measured, tmp_path):
    ious, seen = measured
    ious += [0.5, 0.6]
    cfg = adapting()
    found = sam_adaptation.adapted_config(cfg, resume=False)
    assert found.S4M.SAM.CHECKPOINT == str(tmp_path / "run/sam_adapted.pth")
    before, after = (AutomaticMasks(build_sam_backend(c)).fingerprint() for c in (cfg, found))
    assert before != after
    assert load_config(str(tmp_path / "run/config.yaml")).S4M == found.S4M
    assert (tmp_path / "run/config.yaml").read_text() == found.dump()
    trained, held_out = sam_quality.split_labeled(cfg)
    assert seen == [{record["file_name"] for record in held_out}] * 2
    assert not seen[0] & {record["file_name"] for record in trained}
    assert len(trained) + len(held_out) == 10 and len(held_out) == 2
    # Continued, nothing is measured or trained again; the weights follow from the seed.
    assert sam_adaptation.adapted_config(cfg, resume=True) == found
    ious += [0.5, 0.6]
    again = sam_adaptation.adapted_config(cfg, resume=False)
    assert AutomaticMasks(build_sam_backend(again)).fingerprint() == after


def test_what_is_not_better_is_not_kept(adapting, measured, tmp_path):
    measured[0].extend([0.5, 0.5])
    cfg = adapting()
    assert sam_adaptation.adapted_config(cfg, resume=False) == cfg
    assert not (tmp_path / "run/sam_adapted.pth").exists()
    assert read_results(tmp_path / "run/sam_adapted.json")["kept"] is False
    assert sam_adaptation.adapted_config(cfg, resume=True) == cfg


def test_the_gates_images_are_held_out(adapting):
    cfg = adapting(S4M__REFINE__GATE="auto")
    _, held_out = sam_quality.split_labeled(cfg)
    gates = {record["file_name"] for record in gate.held_out_records(cfg)}
    assert gates and {record["file_name"] for record in held_out} == gates


def test_nothing_is_done_where_nobody_asks(adapting, tmp_path):
    without_sam = {"S4M__STAGE": "teacher", "S4M__DISTILL__ENABLED": False}
    for changes in ({"S4M__SAM__ADAPT": 0}, without_sam):
        cfg = adapting(**changes)
        assert sam_adaptation.adapted_config(cfg, resume=False) == cfg
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("during", ["fine-tuning", "measurement", "start"])
def test_a_signal_ends_what_is_done_before_training_at_once(
    adapting, listening, monkeypatch, tmp_path, during
):
    def measure(*_, **__):
        if during != "start":
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    for module in (sam_quality, sam_adaptation):
        monkeypatch.setattr(module, "measure_sam", measure)
    cfg = adapting(S4M__REFINE__GATE="auto")
    if during == "start":
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped):
        if during == "measurement":
            gate.decide_by_sam(stage_config(cfg, "teacher"), "teacher", resume=False)
        sam_adaptation.adapted_config(cfg, resume=False)
    assert not [*(tmp_path / "run").rglob("*.json")]


@pytest.mark.parametrize("small_part", [0, 1])  # what is trained on; what is held out
def test_masks_too_small_to_learn_from_leave_sam_as_it_is(adapting, monkeypatch, small_part):
    cfg, split = adapting(), sam_quality.split_labeled
    dot = {"segmentation": [[0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]]}

    def with_dots(cfg):
        parts = list(split(cfg))
        parts[small_part] = [
            {**record, "annotations": [a | dot for a in record["annotations"]]}
            for record in parts[small_part]
        ]
        return parts

    monkeypatch.setattr(sam_adaptation, "split_labeled", with_dots)
    monkeypatch.setattr(sam_adaptation, "MOST_TRIES", 3)
    assert sam_adaptation.adapted_config(cfg, resume=False) == cfg


def test_one_labeled_image_is_too_few(adapting, measured, monkeypatch):
    records = sam_quality.true_records
    monkeypatch.setattr(sam_quality, "true_records", lambda names: records(names)[:1])
    cfg = adapting()
    assert sam_adaptation.adapted_config(cfg, resume=False) == cfg
