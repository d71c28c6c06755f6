"""What the quickstart promises, measured as a user would: slow."""

import statistics

import pytest
from helpers import run_script

from s4m_d2.report import read_results

SEEDS = (0, 1, 2)
HOUR = 3600


@pytest.mark.slow
@pytest.mark.timeout(2 * HOUR)
def test_the_student_is_better_than_the_stage_one_teacher_over_three_seeds(tmp_path):
    gains = []
    for seed in SEEDS:
        output = tmp_path / f"seed{seed}"
        run_script("tools/quickstart.py", "--output", output, "SEED", seed)
        teacher = read_results(str(output / "teacher" / "results.json"))
        student = read_results(str(output / "student" / "results.json"))
        print(f"seed {seed}:", (output / "results.md").read_text(), sep="\n")
        gains.append(student["segm"]["AP"] - teacher["segm"]["AP"])
        assert list((output / "student" / "figures").glob("pseudo_labels_*.png"))
    print(f"gain of the student: {gains}")
    assert min(gains) > 0
    assert statistics.mean(gains) > statistics.stdev(gains)
