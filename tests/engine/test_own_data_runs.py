"""Own data from the command line: both stages, continued, evaluated."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
import torch

from s4m_d2 import __version__
from s4m_d2.engine import own_data
from s4m_d2.engine.checkpointing.weight_names import model_weights
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.figures.predictor import class_names
from s4m_d2.engine.stages import stage_config
from s4m_d2.engine.training.trainer import S4MTrainer, TeacherTrainer
from s4m_d2.errors import DatasetError
from s4m_d2.report import read_results
from s4m_d2.visualization import write_video

from .own_runs import change_json, copied, make_data, only, overrides, own_options, read, train_net


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The data and the output folder of a run of both stages."""
    root = tmp_path_factory.mktemp("own_runs")
    data = make_data(root / "data")
    assert train_net(*own_options(data), *overrides(root / "run", S4M__SAM__ADAPT=1)) == 0
    return data, root / "run"


def stamps(run):
    """When each file of a run's data and weights was written."""
    found = [*run.glob("data/*"), *run.glob("*/model_final.pth")]
    return {path.relative_to(run): path.stat().st_mtime_ns for path in found}


def test_both_stages_train_on_what_is_stored_beside_them(finished):
    data, run = finished
    assert (run / "teacher" / "model_final.pth").is_file()
    results = read_results(str(run / "student" / "results.json"))
    assert {"segm", "bbox"} <= set(results)
    train, val = (
        json.loads((run / "data" / f"{part}.json").read_text()) for part in ("train", "val")
    )
    files = [{row["file_name"] for row in part["images"]} for part in (train, val)]
    assert not files[0] & files[1] and len(files[0] | files[1]) == 8
    unlabeled = [f"street_{i:05d}.png" for i in range(8, 12)]
    assert json.loads((run / "data" / "unlabeled.json").read_text()) == unlabeled
    cfg = load_config(str(run / "config.yaml"))
    assert cfg.INPUT.IMAGE_SIZE == 128
    assert class_names(cfg) == [row["name"] for row in train["categories"]]


def test_a_finished_run_is_not_begun_again_and_has_nothing_to_continue(finished, capsys):
    data, run = finished
    before, words = stamps(run), overrides(run, S4M__SAM__ADAPT=1)
    capsys.readouterr()
    assert train_net(*own_options(data), *words) == 1 and "--resume" in capsys.readouterr().err
    assert train_net(*own_options(data), "--resume", *words) == 0
    assert stamps(run) == before


def test_the_report_has_both_stages_facts_of_the_check_and_the_final_models_pictures(finished):
    _, run = finished
    page = html.unescape((run / "report.html").read_text())
    sam, adapted = (
        read_results(str(run / f"{name}.json")) for name in ("teacher/sam_quality", "sam_adapted")
    )
    said = "Every stage was trained", "EMA teacher", "own_val: ", f">{__version__}"
    assert all(text in page for text in (*said, sam["text"], adapted["text"]))
    checkpoint = load_config(str(run / "config.yaml")).S4M.SAM.CHECKPOINT
    assert checkpoint == (str(run / "sam_adapted.pth") if adapted["kept"] else "")
    for drawn in ("student/figures/predictions", "student/figures/pseudo_labels",
                  "teacher/figures/predictions"):  # fmt: skip
        assert (run / f"{drawn}_0000002.png").is_file()
    assert page.count("data:image/jpeg") >= 3


def test_a_check_tells_settings_and_reasons_and_writes_nothing(finished, tmp_path, capsys):
    data, _ = finished
    output = tmp_path / "checked"
    words = overrides(output, SOLVER__MAX_ITER=None, S4M__BURN_IN=None)
    videos = copied(data / "unlabeled", tmp_path / "videos")
    with write_video(videos / "clip.mp4", fps=5) as write:
        write(np.zeros((64, 128, 3), np.uint8))
    options = own_options(data, unlabeled=videos)
    assert train_net(*options, "--check", *words) == 0
    assert not output.exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "SOLVER.MAX_ITER 800: 8 times 5 unlabeled images in batches of 2" in said
    assert "set by you" in said and "S4M.TEACHER.MAX_ITER" in said and "own_val" in said
    assert re.search(r"SAM's masks IoU 0\.\d\d of \d+ masks", said)


def test_a_run_continues_with_the_data_that_it_began_with(finished, tmp_path, capsys):
    data, run = copied(finished[0], tmp_path / "data"), copied(finished[1], tmp_path / "run")
    (run / "student" / "results.json").unlink()  # as if stage 2's evaluation had been stopped
    before = stamps(run)
    change_json(data / "annotations.json", lambda c: c.update(annotations=c["annotations"][:-5]))
    capsys.readouterr()
    assert train_net(*own_options(data), "--resume", *overrides(run)) == 0
    said = " ".join((run / "log.txt").read_text().split())
    assert "annotations.json is not what it was when the run began" in said
    after = stamps(run)
    assert {path: after[path] for path in before} == before  # the data and the weights stay
    results = [read_results(str(r / "student" / "results.json")) for r in (finished[1], run)]
    assert repr(results[0]["segm"]) == repr(results[1]["segm"])  # may be NaN


def test_without_changes_a_continued_run_says_nothing(finished, tmp_path):
    data, run = finished
    cfg, own = read(*own_options(data), "--resume", *overrides(run))
    assert not own.notes and not own.is_new
    assert cfg == read(*own_options(data), *overrides(run))[0]
    # Of what was derived, nothing follows another length.
    longer, own = read(*own_options(data), "--resume", *overrides(run, SOLVER__MAX_ITER=4000))
    longer.defrost()
    longer.SOLVER.MAX_ITER = cfg.SOLVER.MAX_ITER
    assert longer == cfg and {"S4M.EMA_DECAY", "TEST.EVAL_PERIOD"} <= {
        setting.key for setting in own.stored.settings
    }


def test_a_run_continues_without_its_paths_and_tells_of_other_folders(finished, tmp_path):
    data, run = finished
    cfg, own = read("--resume", *overrides(run))
    assert not own.notes and cfg == read(*own_options(data), "--resume", *overrides(run))[0]
    others = copied(data, tmp_path / "others") / "unlabeled"
    cfg, own = read("--unlabeled", str(others), "--resume", *overrides(run))
    [note] = own.notes
    assert str(others) in note and str(data / "unlabeled") in note
    assert cfg.DATASETS.UNLABELED == ("own_unlabeled",)


def test_an_evaluation_has_the_split_and_settings_of_the_weights_run(finished, tmp_path, capsys):
    data, run = (copied(finished[i], tmp_path / name) for i, name in ((0, "data"), (1, "run")))
    change_json(
        data / "annotations.json", lambda c: c["categories"].append({"id": 99, "name": "tram"})
    )
    changes = {"MODEL__WEIGHTS": run / "student" / "model_final.pth", "S4M__EVAL": "both"}
    words = overrides(tmp_path / "eval", **changes)
    assert train_net(*own_options(data, unlabeled=None), "--eval-only", *words) == 0
    results = read_results(str(run / "student" / "results.json"))
    models = results, results["teacher"]
    expected = [model[task] for model in models for task in ("bbox", "segm")]
    found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", capsys.readouterr().out)
    assert found == [f"{of['AP']:.4f},{of['AP50']:.4f}" for of in expected]
    assert not (tmp_path / "eval" / "data").exists()
    said = " ".join((tmp_path / "eval" / "log.txt").read_text().split())
    assert "is not what the run was trained on, and is not looked at" in said
    # The run's own config, which its other commands read, outlives an evaluation in its folder.
    config = (run / "config.yaml").read_bytes()
    again = overrides(run, **changes)
    assert train_net(*own_options(data, unlabeled=None), "--eval-only", *again) == 0
    assert (run / "config.yaml").read_bytes() == config
    # What the user set is of the run, too.
    fewer = overrides(tmp_path / "eval", S4M__BURN_IN=None, SOLVER__MAX_ITER=None, **changes)
    cfg, _ = read(*own_options(data, unlabeled=None), "--eval-only", *fewer)
    assert (cfg.S4M.BURN_IN, cfg.SOLVER.MAX_ITER) == (1, 2)
    # Other images than the run's own: a file beside them is compared with.
    others = {"val": finished[0] / "annotations.json", "val_images": finished[0] / "labeled"}
    options = own_options(finished[0], labeled=None, images=None, unlabeled=None, **others)
    assert train_net(*options, "--eval-only", *words) == 0
    truth = json.loads((tmp_path / "eval" / "data" / "evaluated.json").read_text())
    assert len(truth["images"]) == 8


def test_stored_data_are_read_back_whatever_names_have_and_damage_is_named(finished, tmp_path):
    stored = own_data.read_stored(str(finished[1] / "data"))
    names = ("new\nline.png", "\x1b[31m.png", "sub/\udcff \u00fc.png", " ")
    odd = dataclasses.replace(stored, unlabeled=names, left_out={"hidden": 3})
    own_data.store(str(tmp_path), odd, {})
    assert own_data.read_stored(str(tmp_path)) == odd
    for content in ("{}", "[]", '{"version": 2}'):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(DatasetError, match="start a new run"):
            own_data.read_stored(str(tmp_path))


def test_a_run_of_stage_1_alone_cannot_go_on_with_stage_2(finished, tmp_path):
    data, words = finished[0], overrides(tmp_path / "run")
    read(*own_options(data, unlabeled=None), *words, "S4M.STAGE", "teacher")[1].save()
    both = [*own_options(data), "--resume", *words]
    with pytest.raises(DatasetError, match="another OUTPUT_DIR.*S4M.TEACHER_WEIGHTS .*teacher"):
        read(*both)
    cfg, _ = read(*both, "S4M.STAGE", "teacher")
    assert cfg.DATASETS.TRAIN and not cfg.DATASETS.UNLABELED


def test_a_run_starts_from_another_by_class_names_with_corrected_images(finished, tmp_path):
    """Two unlabeled images are labeled now, one with a new class; the classes' ids are others."""
    data, run = finished

    def relabel(content):
        only(slice(2))(content)
        for row in content["images"]:
            row["file_name"] = f"street_{row['id'] + 7:05d}.png"
        rows = content["annotations"]
        content["annotations"] = [{**row, "category_id": 9 - row["category_id"]} for row in rows]
        content["annotations"][0]["category_id"] = 9
        content["categories"] = [{**row, "id": 9 - row["id"]} for row in content["categories"]]
        content["categories"].append({"id": 9, "name": "tram"})

    corrected = tmp_path / "corrected.json"
    corrected.write_text((data / "annotations.json").read_text())
    change_json(corrected, relabel)
    more = ["--labeled", str(corrected), "--images", str(data / "unlabeled")]
    small = overrides(tmp_path / "again", MODEL__WEIGHTS=None)
    cfg, own = read(*own_options(data), *more, "--start-from", run, *small)
    assert str(run / "student" / "model_final.pth") == cfg.MODEL.WEIGHTS
    assert own.stored.classes[-1] == "tram" and len(own.stored.classes) == 9
    unlabeled = {f"street_{i:05d}.png" for i in range(8, 12)}
    assert {*own.stored.unlabeled} == unlabeled - {"street_00008.png", "street_00009.png"}
    assert own.stored.left_out == {"labeled": 2}

    trainer = TeacherTrainer(stage_config(cfg, "teacher"))
    fresh = trainer.trained_model.sem_seg_head.predictor.class_embed.weight.clone()
    trainer.resume_or_load(resume=False)
    content = torch.load(run / "student" / "model_final.pth", weights_only=True)
    before, _ = model_weights(content, "teacher", "")
    after = trainer.trained_model.state_dict()
    name = "sem_seg_head.predictor.class_embed.weight"
    assert torch.equal(after[name][:8], before[name][:8])  # the first file's classes, in its order
    assert torch.equal(after[name][8], fresh[8]) and torch.equal(after[name][9], before[name][8])
    assert "tram" in str(trainer.checkpointer.last_report)

    # The same of a teacher, in the place of stage 1.
    options = ("S4M.TEACHER_WEIGHTS", cfg.MODEL.WEIGHTS, "S4M.STAGE", "student")
    words = overrides(tmp_path / "third", MODEL__WEIGHTS=None)
    cfg, _ = read(*own_options(data), *more, *words, *options)
    teacher = S4MTrainer(stage_config(cfg, "student"), cfg.S4M.TEACHER_WEIGHTS).teacher
    rows = teacher.model.state_dict()[name]
    assert torch.equal(rows[:8], before[name][:8]) and torch.equal(rows[9], before[name][8])
