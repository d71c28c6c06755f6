"""tools/benchmark.py: statistics, options, and small complete runs, in which both forms agree."""

import json

import benchmark
import pytest
from benchmarking import measuring, plain
from benchmarking.bench import CASES, case_config

SMALL = ["--shapes", "quickstart", "--device", "cpu", "--size", "64x64", "--images", "2"]
SMALL += ["--instances", "2", "--repeats", "1", "--warmup", "0"]
SMALL_MODEL = ["MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64"]


def run(output, *options):
    """The exit status, and the content of benchmark.json."""
    status = benchmark.main([*SMALL, *options, "--output", str(output), *SMALL_MODEL])
    file = output / "benchmark.json"
    return status, json.loads(file.read_text()) if file.exists() else None


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
    rows = [row("points", 1.0, 5.0), row("arp", 2.0, 20.0), row("other", 100.0, 1.0)]
    assert measuring.method_ratio(rows) is None
    assert measuring.method_ratio([*rows, row("ema", 1.0, 3.0)]) == 28.0 / 4.0


def test_bad_options(capsys, tmp_path):
    for options, status, message in (
        (["--parts", "teleport"], 1, "teleport"),
        (["--size", "100x100"], 2, "multiples of 32"),
        (["NO.SUCH_KEY", "1"], 1, "NO.SUCH_KEY"),
        (["--shapes", "coco", "--size", "64x96"], 1, "squares"),
    ):
        try:
            found = benchmark.main(["--device", "cpu", "--output", str(tmp_path), *options])
        except SystemExit as ended:
            found = ended.code
        assert found == status and message in capsys.readouterr().err
        assert not list(tmp_path.iterdir()), "results of a run that failed"


def test_a_form_that_gives_something_else_is_not_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plain, "exchange", lambda bench, images, labels: (images, labels))
    assert run(tmp_path, "--stage", "2", "--parts", "arp") == (1, None)
    assert "Mismatch: arp" in capsys.readouterr().err


@pytest.mark.slow
def test_a_complete_run_of_stage_2(tmp_path):
    status, result = run(tmp_path, "--stage", "2")
    (stage,) = result["stages"]
    assert status == 0 and (stage["stage"], stage["images"], stage["instances"]) == (2, 2, 2)
    rows = {row["name"]: row for row in stage["parts"]}
    assert list(rows) == [n for n in measuring.MAKERS if n != "distillation"]
    for form in ("ours", "plain"):
        counted = [r for r in rows.values() if r["in_step"] and not r["inside"]]
        shares = sum(r[f"share_{form}"] for r in counted)
        assert shares + stage["totals"][f"rest_{form}"] == pytest.approx(1.0)
    assert rows["teacher"]["bound"]["kind"] == "arithmetic" and rows["ema"]["bound"]["amount"] > 0
    assert all(stage["step"]["peak_memory"].values()) and stage["step"]["ratio"]["median"] > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_every_case_has_a_config_of_its_own_size(stage):
    for case in CASES.values():
        cfg = case_config(case, stage)
        lsj = cfg.INPUT.DATASET_MAPPER_NAME == "coco_instance_lsj"
        crop = (cfg.INPUT.IMAGE_SIZE,) * 2 if lsj else tuple(cfg.INPUT.CROP.SIZE)
        assert crop == case.image_size and cfg.S4M.DISTILL.ENABLED == (stage == 1)
