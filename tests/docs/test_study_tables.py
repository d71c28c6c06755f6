"""The study's tables in the documentation are those of the results that lie beside them."""

import json
from statistics import mean, stdev

import pytest
from ablation_study.report import Report
from ablation_study.runs import PLANS, REPORTED_SEEDS, all_runs
from ablation_study.training import read_results
from helpers import ROOT

STUDY = ROOT / "docs" / "ablation"


def rows(text: str) -> list[str]:
    """The rows of tables, without headers and rules."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith("|")]
    headers = {i for i in found if i + 1 < len(lines) and lines[i + 1].startswith("|---")}
    return [lines[i] for i in found if i not in headers and not lines[i].startswith("|---")]


def test_the_study_s_report_is_made_from_its_results():
    results = read_results(STUDY / "results", all_runs(PLANS["toyscapes"]))
    assert len(results) == len(list((STUDY / "results").glob("*.json")))
    expected = Report(results, PLANS["toyscapes"], REPORTED_SEEDS).markdown()
    assert (STUDY / "ablation.md").read_text() == expected


def test_the_tables_of_the_evidence_are_taken_from_it():
    text = (ROOT / "docs" / "evidence.md").read_text()
    found = rows(text.split("## What each part adds\n")[1].split("\n## ")[0])
    assert len(found) >= 5
    missing = [row for row in found if row not in (STUDY / "ablation.md").read_text().splitlines()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_figures_on_real_images_are_those_of_the_runs(page):
    text = (ROOT / page).read_text()
    for path in (ROOT / "docs" / "ablation-nuclei").glob("*.json"):
        student = json.loads(path.read_text())["models"]["student"]
        assert f"| {student['AP']:.1f} | {student['AP50']:.1f} |" in text


@pytest.mark.parametrize("name", ["nuclei", "facades"])
def test_what_the_order_of_review_is_worth_is_that_of_its_runs(name):
    text = (ROOT / "docs" / "loop.md").read_text()
    results = json.loads((ROOT / "docs" / f"review-{name}.json").read_text())
    for by_count in results["AP"].values():
        values = [list(by_seed.values()) for by_seed in by_count.values()]
        assert " | ".join(f"{mean(x):.1f} ± {stdev(x):.1f}" for x in values) in text
