"""The commands predict and label: they find what evaluation finds, and draw what they write."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from helpers import QUICKSTART
from PIL import Image
from pycocotools.coco import COCO

from s4m_d2.commands import label, predict
from s4m_d2.data.images import Video
from s4m_d2.engine import S4MCheckpointer, TeacherTrainer, stage_config
from s4m_d2.engine.command.arguments import model_config
from s4m_d2.engine.figures.predictor import Predictor, class_names, load_model
from s4m_d2.engine.own_data import StoredData, store
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.visualization import overlay, write_video

from .conftest import overrides

EIGHT = "ant bee cat dog elk fox gnu hen".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Where the untrained models of this module are: (cfg) → a checkpoint with two models."""
    folder = tmp_path_factory.mktemp("weights")

    def save(cfg):
        path = folder / "student" / "model_final.pth"
        if not path.exists():
            student = TeacherTrainer.build_model(stage_config(cfg, "student"))
            teacher = {k: v * 1.01 for k, v in student.state_dict().items()}
            hooks = {"EMATeacherHook": {"teacher": teacher}}
            trainer = type("Trainer", (), {"state_dict": lambda self: {"hooks": hooks}})()
            S4MCheckpointer(student, str(path.parent), trainer=trainer).save(path.stem)
        return str(path)

    return save


@pytest.fixture
def demo(weights, small_config, small_options, tmp_path, monkeypatch):
    """(inputs, more arguments) → exit status, results, images, the output folder."""
    path = weights(small_config())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))

    def run(*inputs, more=(), output="out", score="0"):
        output = tmp_path / output
        words = ["--config-file", QUICKSTART, "--weights", path, "--score", score]
        words += ["--output", str(output), *more, "--input", *map(str, inputs)]
        words += small_options(TEST__DETECTIONS_PER_IMAGE=10)
        status = predict.main(words)
        if not (output / "predictions.json").exists():
            return status, None, None, output
        results = json.loads((output / "predictions.json").read_text())
        return status, results, json.loads((output / "images.json").read_text()), output

    return run


@pytest.fixture
def scenes(small_data):
    return sorted(small_data.glob("toyscapes/leftImg8bit/val/*/*.png"))


def read_rgb(path):
    return np.asarray(Image.open(path).convert("RGB"))


def drawn_from_json(image, results, images):
    """The overlay of what the json says of one image."""
    masks = [mask_util.decode(result["segmentation"]).astype(bool) for result in results]
    masks = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), dtype=bool)
    ids = [category["id"] for category in images["categories"]]
    names = [category["name"] for category in images["categories"]]
    labels = [ids.index(result["category_id"]) for result in results]
    return overlay(image, masks, labels, names, [result["score"] for result in results])


def test_a_folder_is_drawn_and_written_alike_and_bad_files_do_not_stop_it(
    demo, scenes, tmp_path, capsys
):
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    (folder / "a.png").write_bytes(scenes[0].read_bytes())
    (folder / "below" / "b.png").write_bytes(scenes[1].read_bytes())
    (folder / "cut.png").write_bytes(scenes[0].read_bytes()[:900])
    Image.new("RGB", (4000, 1)).save(folder / "strip.png")  # no row is left after resizing
    (folder / "noise.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not looked at")
    status, results, images, output = demo(folder, tmp_path / "missing.jpg")
    assert status == 1
    errors = capsys.readouterr().err
    assert "notes.txt" not in errors
    for name in ("cut.png", "strip.png", "noise.mp4", "missing.jpg"):
        assert errors.count(f"{name}: ") == 1

    files = [folder / "a.png", folder / "below" / "b.png"]
    assert [image["file_name"] for image in images["images"]] == [str(file) for file in files]
    drawn = sorted(p.relative_to(output / "overlays") for p in output.rglob("*.png"))
    assert drawn == [Path("a.png"), Path("below/b.png")]
    for number, file in enumerate(files, 1):
        own = [result for result in results if result["image_id"] == number]
        expected = drawn_from_json(read_rgb(file), own, images)
        found = read_rgb(output / "overlays" / file.relative_to(folder))
        assert len(own) > 0 and (found == expected).all()
        for result in own:
            y, x = np.nonzero(mask_util.decode(result["segmentation"]))
            box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1] if len(x) else [0] * 4
            assert result["bbox"] == box
    coco = COCO(str(output / "images.json")).loadRes(str(output / "predictions.json"))
    assert len(coco.getAnnIds()) == len(results)
    assert coco.loadCats([24])[0]["name"] == "person"  # Cityscapes' ids, from the metadata


class Evaluated(TeacherTrainer, DatasetEvaluator):
    """An evaluation that shows what evaluators get."""

    build_evaluator = classmethod(lambda cls, cfg, name: cls.__new__(cls))

    def reset(self):
        type(self).seen = []

    def process(self, inputs, outputs):
        self.seen.append((inputs[0]["file_name"], outputs[0]["instances"]))

    def evaluate(self):
        return {}


@pytest.mark.parametrize("tile", [0, 72])
def test_it_finds_what_evaluation_finds(weights, small_config, tile):
    cfg = small_config(INPUT__MIN_SIZE_TEST=48, INPUT__TILE__SIZE=tile)  # resized on the way in
    model, branch = load_model(cfg, weights(cfg), "student")
    assert branch == "student"
    Evaluated.test(stage_config(cfg, "student"), model)
    file_name, expected = Evaluated.seen[0]
    order = expected.scores.argsort(descending=True, stable=True)
    found = Predictor(cfg, model)(read_rgb(file_name))
    assert found.image_size == (64, 128) and (len(found) > 64) == (tile > 0)
    assert torch.equal(found.scores, expected.scores[order])
    assert torch.equal(found.pred_classes, expected.pred_classes[order])
    assert found.pred_masks.rles == expected.pred_masks[order].rles
    threshold = float(found.scores[3])
    assert len(Predictor(cfg, model)(read_rgb(file_name), threshold)) == 4


def test_a_video_is_drawn_frame_by_frame(demo, scenes, tmp_path):
    clip = tmp_path / "clip.mp4"
    with write_video(clip, fps=8) as write:
        for scene in scenes * 2:
            write(read_rgb(scene))
    status, results, images, output = demo(clip, more=["--model", "teacher"])
    assert status == 0
    assert [image["frame"] for image in images["images"]] == [0, 1, 2, 3]
    video = Video(str(output / "overlays" / "clip.mp4"))
    assert video.fps == pytest.approx(8)
    for number, (seen, drawn) in enumerate(zip(Video(str(clip)), video, strict=True), 1):
        own = [result for result in results if result["image_id"] == number]
        expected = drawn_from_json(seen, own, images)
        assert drawn.shape == expected.shape  # MPEG-4 is lossy
        assert np.abs(drawn.astype(int) - expected).mean() < 12
        others = np.abs(drawn.astype(int) - np.roll(expected, 40, axis=1)).mean()
        assert np.abs(drawn.astype(int) - expected).mean() < others / 2


def test_a_truncated_video_is_used_as_far_as_it_goes_and_reported(demo, tmp_path, capsys):
    clip = tmp_path / "clip.avi"  # whose index stands in front: frames at its end may be missing
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (64, 128, 3), dtype=np.uint8) for _ in range(6)]
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (128, 64))
    for frame in frames:
        writer.write(frame)
    writer.release()
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    status, _, images, output = demo(clip)
    count = len(images["images"])
    assert status == 1 and 0 < count < 6
    assert f"{count} of 6" in capsys.readouterr().err
    assert len(list(Video(str(output / "overlays" / "clip.mp4")))) == count


def test_results_are_replaced_only_when_asked_and_whole(demo, scenes, capsys, monkeypatch):
    assert demo(scenes[0])[0] == 0
    status, results, _, output = demo(scenes[0], scenes[1])
    assert status == 1 and "Add --force" in capsys.readouterr().err
    assert {result["image_id"] for result in results} == {1}
    status, results, _, _ = demo(scenes[0], scenes[1], more=["--force"])
    assert status == 0 and {result["image_id"] for result in results} == {1, 2}
    before = demo(scenes[0])[1:3]  # refused, and what is there stays
    monkeypatch.setattr(predict, "overlay", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo(scenes[0], scenes[1], more=["--force"])
    monkeypatch.undo()
    output = demo(scenes[0])[3]
    assert before == tuple(
        json.loads((output / name).read_text()) for name in ("predictions.json", "images.json")
    )
    assert not list(output.glob(".*"))


def test_class_names_come_from_a_file_the_metadata_or_numbers(small_config, tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\n".join([*EIGHT, ""]), encoding="utf-8-sig")
    assert class_names(small_config(), str(file)) == EIGHT
    assert class_names(small_config())[:2] == ["person", "rider"]
    assert class_names(small_config(DATASETS__TEST="()"))[:2] == ["person", "rider"]
    unknown = small_config(DATASETS__TEST="()", DATASETS__TRAIN="()")
    assert class_names(unknown) == [f"class {i}" for i in range(8)]
    assert predict.category_ids(small_config(DATASETS__TEST="()")) == list(range(1, 9))
    assert predict.category_ids(small_config())[:3] == [24, 25, 26]
    file.write_text("one\ntwo")
    with pytest.raises(ConfigError, match="names.txt.*2.*NUM_CLASSES is 8"):
        class_names(small_config(), str(file))
    with pytest.raises(DatasetError, match="missing.txt' cannot be read"):
        class_names(small_config(), str(tmp_path / "missing.txt"))


def test_a_run_that_was_moved_has_its_classes_and_its_sam(small_config, tmp_path):
    run = tmp_path / "copy"
    (run / "student").mkdir(parents=True)
    stored = StoredData(tuple(EIGHT[::-1]), (), (), "", "", {}, False)
    store(str(run / "data"), stored, {})
    (run / "run.json").write_text("{}")
    sam = {"S4M__SAM__CHECKPOINT": "gone/run/sam_adapted.pth"}
    cfg = small_config(OUTPUT_DIR="gone/run", S4M__DATA__LABELED="('gone.json',)", **sam)
    (run / "config.yaml").write_text(cfg.dump())
    found = model_config(None, str(run / "student" / "model_final.pth"), [])
    assert class_names(found) == EIGHT[::-1]
    assert found.S4M.SAM.CHECKPOINT == str(run / "sam_adapted.pth")


def test_each_file_is_found_once_and_results_are_not_inputs(tmp_path):
    for name in ("in/a.jpg", "in/sub/a.JPG", "in/out/overlays/a.png", "in/.hidden.png", "in/b.mov"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = str(tmp_path / "in")
    inputs = [f"{folder}/b.mov", folder, f"{folder}/sub", str(tmp_path / "gone.png")]
    media, problems = predict.find_media(inputs, exclude=f"{folder}/out")
    assert list(media.values()) == ["b.mov", "a.jpg", "sub/a.JPG", "gone.png"]
    assert list(media) == [inputs[0], f"{folder}/a.jpg", f"{folder}/sub/a.JPG", inputs[3]]
    assert not problems
    (tmp_path / "empty").mkdir()
    media, problems = predict.find_media([str(tmp_path / "empty")], exclude=folder)
    assert not media and "holds no image" in problems[str(tmp_path / "empty")]


def test_no_two_files_have_one_overlay():
    names = ["a.jpg", "a.png", "A.bmp", "a.jpg", "b/a.jpg", "a.jpg"]
    media = {f"{index}/{name}": name for index, name in enumerate(names)}
    found = list(predict.output_names(media).values())
    assert found == ["a", "a_2", "A_3", "a_4", "b/a", "a_5"]


@pytest.fixture(scope="module")
def command(weights, shared_config):
    """(folder of images, output, more arguments) → exit status and annotations by file name."""
    run_folder = str(Path(weights(shared_config("unused"))).parents[1])
    options = overrides("unused", {"S4M__PSEUDO_LABEL__MIN_AREA": 0.0})

    def run(images, output, *more):
        words = ["--weights", run_folder, "--images", str(images), "--output", str(output), *more]
        status = label.main(["--config-file", QUICKSTART, "--score", "0", *words, *options])
        return status, annotations(output)

    return run


@pytest.fixture(scope="module")
def whole(command, small_data, tmp_path_factory):
    """The folder of images/ and out/, which a command made of them, and the annotations."""
    folder = tmp_path_factory.mktemp("label")
    (folder / "images" / "sub").mkdir(parents=True)
    scenes = sorted(small_data.glob("toyscapes/leftImg8bit/val/*/*.png"))
    for place, scene in zip(("a.png", "b.png", "sub/a.png"), scenes * 2, strict=False):
        (folder / "images" / place).write_bytes(scene.read_bytes())
    status, found = command(folder / "images", folder / "out")
    assert status == 0 and set(found) == {"a.png", "b.png", "sub/a.png"} and all(found.values())
    return folder, found


@pytest.fixture
def labeled(command, whole, tmp_path):
    """(output, more arguments) → as of command; out/ is a copy of the whole."""
    shutil.copytree(whole[0] / "out", tmp_path / "out")

    def run(output, *more, images=whole[0] / "images"):
        return command(images, tmp_path / output, *more)

    return run


def annotations(folder: Path):
    if not (folder / "annotations.json").exists():
        return None
    coco = COCO(str(folder / "annotations.json"))
    return {
        image["file_name"]: [
            {k: v for k, v in a.items() if k not in ("id", "image_id")}
            for a in coco.imgToAnns[image["id"]]
        ]
        for image in coco.dataset["images"]
    }


def test_a_killed_command_continues_and_processes_share(labeled, whole, tmp_path, monkeypatch):
    _, whole = whole
    assert any("sam_iou" in a for rows in whole.values() for a in rows)
    done = tmp_path / "out" / "labels-0.jsonl"
    lines = done.read_bytes().splitlines(keepends=True)
    done.write_bytes(lines[0] + lines[1][:50])  # torn by a kill
    (tmp_path / "out" / "annotations.json").unlink()
    assert labeled("out") == (0, whole)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert labeled("shared") == (0, None)
    assert label.main(["--merge", "--output", str(tmp_path / "shared")]) == 0
    assert annotations(tmp_path / "shared") == whole


def test_filters_and_images_that_cannot_be_read(labeled, whole, tmp_path, capsys):
    folder, whole = whole
    images = shutil.copytree(folder / "images", tmp_path / "images")
    (images / "b.png").write_bytes(b"no image")
    status, few = labeled("few", "--max-instances", "2", "--min-area", "100", images=images)
    assert status == 1 and "b.png" in capsys.readouterr().err
    for name in ("a.png", "sub/a.png"):
        assert few[name] == [a for a in whole[name] if a["area"] >= 100][:2]
    assert "b.png" not in few
    inside = images / "out"
    (images / "b.png").unlink()
    assert labeled(inside, images=images)[0] == 0
    (inside / "review").mkdir()
    shutil.copy(images / "a.png", inside / "review" / "0001.png")  # a picture of s4m-review
    assert set(labeled(inside, images=images)[1]) == {"a.png", "sub/a.png"}


def test_an_output_of_something_else_stays_as_it_is(labeled, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert labeled("mine") == (1, None) and "not empty" in capsys.readouterr().err
    before = (tmp_path / "out" / "annotations.json").read_bytes()
    assert labeled("out", "--format", "labelme")[0] == 1 and "format" in capsys.readouterr().err
    assert labeled("out", "--score", "0.9")[0] == 1 and "SCORE_THRESH" in capsys.readouterr().err
    settings = label.read_settings(str(tmp_path / "out"))
    before_training_on = settings | {"content of weights": "0a1b2c"}
    (tmp_path / "out" / ".label.json").write_text(json.dumps(before_training_on))
    assert labeled("out")[0] == 1 and "0a1b2c" in capsys.readouterr().err
    assert (tmp_path / "out" / "annotations.json").read_bytes() == before
    assert label.main(["--merge", "--output", str(tmp_path / "mine")]) == 1
    labeled("shapes", "--format", "labelme")
    assert json.loads((tmp_path / "shapes" / "sub" / "a.json").read_text())["shapes"]
