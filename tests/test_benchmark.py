"""tools/benchmark.py: timing, statistics, shares, options, and a small complete run."""

import json
import sys
from pathlib import Path

import cv2
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import benchmark  # noqa: E402
from benchmarking import measuring, plain, processes, scale, timing  # noqa: E402
from benchmarking.cases import CASES, case_config, cases_of  # noqa: E402
from benchmarking.synthetic import instance_logits  # noqa: E402

from s4m_d2.errors import ConfigError  # noqa: E402

SMALL = ["--shapes", "quickstart", "--device", "cpu", "--size", "64x64", "--images", "2"]
SMALL += ["--instances", "2", "--repeats", "1", "--warmup", "0"]
SMALL_MODEL = ["MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0, 3.0)), ([10, 1, 3, 2, 4], (3.0, 2.0, 4.0)), ([1, 2], (1.5, 1.25, 1.75))],
)
def test_median_and_quartiles(values, expected):
    summary = timing.summarize(values)
    assert (summary.median, summary.lower, summary.upper) == expected
    assert summary.repeats == len(values)


def test_forms_take_turns_and_preparation_is_not_timed(monkeypatch):
    calls, now = [], [0.0]

    def form(name, seconds):
        def run(argument):
            assert argument == name
            calls.append(name)
            now[0] += seconds

        def prepare():
            now[0] += 100.0
            return (name,)

        return timing.Form(run, prepare)

    clock = timing.Clock(torch.device("cpu"))
    monkeypatch.setattr(clock, "_now", lambda: now[0])
    forms = {"A": form("A", 1.0), "B": form("B", 3.0)}
    times = timing.measure(forms, clock, repeats=3, warmup=1)
    assert "".join(calls) == "AB" + "ABBAAB"
    assert times == {"A": [1.0] * 3, "B": [3.0] * 3}
    assert timing.ratio(times["B"], times["A"]).median == 3.0


def test_the_peak_is_that_of_the_running_sum():
    events = [
        {"name": "[memory]", "ts": time, "args": {"Bytes": size, "Device Type": kind}}
        for time, size, kind in ((3, -5, 0), (1, 5, 0), (2, 7, 0), (4, 6, 0), (2.5, 900, 1))
    ]
    assert timing.peak_of_trace([*events, {"name": "aten::add", "ts": 0}]) == 13


def test_memory_of_a_call():
    size = 1 << 20

    def run():
        for _ in range(3):
            torch.zeros(size, dtype=torch.uint8)  # freed before the next
        return torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    peak = timing.peak_memory(timing.Form(run), torch.device("cpu"))
    assert 2 * size <= peak < 3 * size


def row(name, ours, plain_seconds=None, inside=None, in_step=True):
    seconds = {"ours": ours, "plain": plain_seconds}
    summaries = {k: None if v is None else {"median": v} for k, v in seconds.items()}
    return {"name": name, "inside": inside, "in_step": in_step, **summaries}


def test_shares_add_up_and_nested_parts_count_once():
    rows = [row("a", 1.0, 4.0), row("b", 2.0), row("c", 1.0, 9.0, inside="b")]
    rows.append(row("data", 50.0, in_step=False))
    totals = measuring.add_shares(rows, {"ours": {"median": 4.0}, "plain": {"median": 5.0}})
    assert [r["share_ours"] for r in rows[:3]] == [0.25, 0.5, 0.25]
    assert totals["rest_ours"] == 0.25 and totals["ours"] == 4.0
    # the plain parts take longer than the step that was measured: their sum is the whole
    assert totals["plain"] == 6.0 and totals["rest_plain"] == 0.0
    assert rows[0]["share_plain"] == pytest.approx(4 / 6)


def test_method_operations_are_points_arp_and_ema():
    rows = [row("points", 1.0, 5.0), row("arp", 2.0, 20.0), row("other", 100.0, 1.0)]
    assert measuring.method_ratio(rows) is None
    assert measuring.method_ratio([*rows, row("ema", 1.0, 3.0)]) == 28.0 / 4.0


def test_synthetic_instances_fill_what_their_radii_say():
    draws = torch.Generator().manual_seed(0)
    areas = (instance_logits(50, (200, 400), draws) > 0).flatten(1).float().mean(1)
    assert areas.max() <= 3.15 * 0.18**2 and areas.median() >= 3.1 * 0.07**2


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--parts", "teleport"], 1, "teleport: no such part; choose from"),
        (["--shapes", "mars"], 2, "invalid choice: 'mars'"),
        (["--size", "100x100"], 2, "multiples of 32"),
        (["--images", "0"], 2, "must be at least 1"),
        (["--repeats", "many"], 2, "no whole number"),
        (["NO.SUCH_KEY", "1"], 1, "NO.SUCH_KEY"),
        (["--processes", "3", "--images", "2", "--scale"], 1, "divided"),
    ],
)
def test_bad_options(options, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_scale", lambda *args, **kwargs: [])
    arguments = ["--device", "cpu", "--stage", "2", "--output", str(tmp_path), *options]
    try:
        found = benchmark.main(arguments)
    except SystemExit as ended:
        found = ended.code
    assert found == status and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "results of a run that failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys, tmp_path):
    assert benchmark.main(["--device", "cuda", "--output", str(tmp_path)]) == 1
    assert "--device cpu" in capsys.readouterr().err


def test_a_form_that_gives_something_else_is_not_timed(monkeypatch, capsys, tmp_path):
    def forget(images, labels, *rest):
        return list(images), list(labels)

    arguments = [*SMALL, "--stage", "2", "--parts", "arp", "--output", str(tmp_path)]
    assert benchmark.main([*arguments, *SMALL_MODEL]) == 0
    (tmp_path / "benchmark.json").unlink()
    monkeypatch.setattr(plain, "exchange_instances", forget)
    assert benchmark.main([*arguments, *SMALL_MODEL]) == 1
    assert "Mismatch: arp" in capsys.readouterr().err
    assert not (tmp_path / "benchmark.json").exists()


def test_a_complete_run(tmp_path, capsys):
    assert benchmark.main([*SMALL, "--stage", "2", "--output", str(tmp_path), *SMALL_MODEL]) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "benchmark.json").read_text())
    (stage,) = result["stages"]
    assert (stage["stage"], stage["images"], stage["instances"]) == (2, 2, 2)
    rows = {row["name"]: row for row in stage["parts"]}
    assert list(rows) == [n for n in measuring.ORDER if n != "distillation"]
    for form in ("ours", "plain"):
        counted = [r for r in rows.values() if r["in_step"] and not r["inside"]]
        shares = sum(r[f"share_{form}"] for r in counted)
        assert shares + stage["totals"][f"rest_{form}"] == pytest.approx(1.0)
    for one in rows.values():
        assert one["ours"]["lower"] <= one["ours"]["median"] <= one["ours"]["upper"]
        assert (one["plain"] is None) == (one["ratio"] is None)
    assert rows["teacher"]["bound"]["kind"] == "arithmetic" and rows["ema"]["bound"]["amount"] > 0
    assert all(stage["step"]["peak_memory"].values()) and stage["step"]["ratio"]["median"] > 0
    assert f"method operations: {stage['method_operations']:.1f}x" in text
    environment = result["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["device"] == "cpu" and environment["cpu"] and environment["threads"] == 1
    assert environment["peaks"]["float32"]["flops_per_second"] > 0
    chart = cv2.imread(str(tmp_path / "benchmark.png"))
    assert chart is not None and chart.std() > 1


def test_stage_1_with_distillation(tmp_path):
    options = ["--stage", "1", "--parts", "step", "distillation", "SAM-encode", "--no-memory"]
    assert benchmark.main([*SMALL, *options, "--output", str(tmp_path), *SMALL_MODEL]) == 0
    (stage,) = json.loads((tmp_path / "benchmark.json").read_text())["stages"]
    assert [row["name"] for row in stage["parts"]] == ["SAM encode", "distillation"]
    assert stage["totals"]["rest_ours"] > 0 and stage["step"]["peak_memory"] is None


def test_scale_walks_each_axis_to_the_whole(monkeypatch):
    case = cases_of("cityscapes")[0]
    points = list(scale.points_of(case, images=16, queries=100))
    assert [axis for axis, *_ in points] == [axis for axis in scale.AXES for _ in range(3)]
    values = {axis: [v for a, v, *_ in points if a == axis] for axis in scale.AXES}
    assert values["images"] == [4, 8, 16] and values["queries"] == [25, 50, 100]
    assert values["area"][-1] == 512 * 1024 == 4 * values["area"][0]
    assert all(point.images == 16 for axis, _, point, _ in points if axis != "images")
    assert points[-1][3] == (scale.QUERIES, "100")


def test_processes_share_the_images():
    with pytest.raises(ConfigError, match="divided"):
        processes.measure_processes({"images": 3}, 2)


def test_every_case_has_a_config_of_its_own_size():
    for case in CASES.values():
        for stage in (1, 2):
            cfg = case_config(case, stage, device="cpu", sam="tiny_toyscapes")
            lsj = cfg.INPUT.DATASET_MAPPER_NAME == "coco_instance_lsj"
            crop = (cfg.INPUT.IMAGE_SIZE,) * 2 if lsj else tuple(cfg.INPUT.CROP.SIZE)
            assert crop == case.image_size and cfg.SOLVER.IMS_PER_BATCH > 0
            assert cfg.S4M.DISTILL.ENABLED == (stage == 1)


def test_another_size_is_that_of_the_training_crops():
    (cityscapes,) = cases_of("cityscapes", size=(96, 160))
    cfg = case_config(cityscapes, 2, device="cpu", sam="tiny_toyscapes")
    assert tuple(cfg.INPUT.CROP.SIZE) == (96, 160)
    (coco,) = cases_of("coco", size=(64, 64))
    assert case_config(coco, 1, device="cpu", sam="tiny_toyscapes").INPUT.IMAGE_SIZE == 64
    (oblong,) = cases_of("coco", size=(64, 96))
    with pytest.raises(ConfigError, match="squares"):
        case_config(oblong, 1, device="cpu", sam="tiny_toyscapes")
