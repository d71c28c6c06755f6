"""Tables of the pages: configuration keys, results of studies, messages of the program."""

import ast
import json
import re
from functools import cache
from statistics import mean, stdev

import config_reference
import pytest
from ablation_study.report import Report
from ablation_study.runs import PLANS, REPORTED_SEEDS, all_runs
from ablation_study.training import read_results
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from helpers import ROOT

from s4m_d2 import add_s4m_config

DOCS = ROOT / "docs"
STUDY = DOCS / "ablation"
OPTION_ROW = re.compile(r"^\| `([\w.]+)` \| `(.+)` \| (.*) \|$", re.MULTILINE)
MESSAGE_ROW = re.compile(r"^\| `(.+?)` \|")
VARIABLE = "…"
LOGGED = re.compile(r"%[.\d]*[dfgs]")  # values of a logger's message
# Rows without a code span.
MADE_ELSEWHERE = {"CUDA out of memory", "exit status 75", "No module named detectron2.…"}


def rows(text: str, header: str = "") -> list[str]:
    """The rows of tables of which the header begins so."""
    tables = re.findall(rf"^\|{header}.*\n\|---.*\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


def leaves(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_page_is_up_to_date(capsys):
    assert config_reference.main(["--check"]) == 0, capsys.readouterr().err


def test_every_key_that_we_add_is_listed_with_a_comment_and_the_default_that_is_loaded():
    before, after = get_cfg(), get_cfg()
    add_deeplab_config(before)  # of the engine
    add_s4m_config(after)
    engine, ours = dict(leaves(before)), dict(leaves(after))
    found = OPTION_ROW.findall(config_reference.page())
    listed = {key: ast.literal_eval(value) for key, value, _ in found}
    assert listed.keys() >= ours.keys() - engine.keys()
    # Beside new keys only those of which the default is set here again.
    assert listed == {key: ours[key] for key in listed if key in ours}
    assert not [key for key, _, comment in found if not comment.strip()]


def test_the_study_s_report_is_made_from_its_results():
    results = read_results(STUDY / "results", all_runs(PLANS["toyscapes"]))
    assert len(results) == len(list((STUDY / "results").glob("*.json")))
    expected = Report(results, PLANS["toyscapes"], REPORTED_SEEDS).markdown()
    assert (STUDY / "ablation.md").read_text() == expected


def test_the_tables_of_the_evidence_are_taken_from_it():
    text = (DOCS / "evidence.md").read_text()
    found = rows(text.split("## What each part adds\n")[1].split("\n## ")[0])
    assert len(found) >= 5
    missing = [row for row in found if row not in (STUDY / "ablation.md").read_text().splitlines()]
    assert not missing


@pytest.mark.parametrize(
    ("page", "name", "cells"),
    [
        ("README.md", "nuclei", "| {AP:.1f} |"),
        ("docs/evidence.md", "*", "| {AP:.1f} | {AP50:.1f} |"),
    ],
)
def test_figures_on_real_images_are_those_of_the_runs(page, name, cells):
    text = (ROOT / page).read_text()
    for path in DOCS.glob(f"ablation-{name}/*.json"):
        models = json.loads(path.read_text())["models"]
        last = models.get("student") or models["stage-1 teacher"]
        assert cells.format(**last) in text


@pytest.mark.parametrize("name", ["nuclei", "facades"])
def test_what_the_order_of_review_is_worth_is_that_of_its_runs(name):
    text = (DOCS / "loop.md").read_text()
    results = json.loads((DOCS / f"review-{name}.json").read_text())
    for by_count in results["AP"].values():
        values = [list(by_seed.values()) for by_seed in by_count.values()]
        assert " | ".join(f"{mean(x):.1f} ± {stdev(x):.1f}" for x in values) in text


def texts(source: str) -> list[str]:
    """Strings of a module as they read, parts that are filled in as one character."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else VARIABLE for v in node.values)
            found.append("".join(parts))
    return [" ".join(LOGGED.sub(VARIABLE, text).split()) for text in found]


@cache
def program() -> list[str]:
    files = [*(ROOT / "s4m_d2").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    return [text for file in files for text in texts(file.read_text())]


def occurs(message: str) -> bool:
    """Whether a text of the program has a message's fixed parts, in this order."""
    fixed = ".*".join(re.escape(part) for part in message.split(VARIABLE))
    return any(re.search(fixed, text) for text in program())


def test_quoted_messages_are_of_the_program():
    pages = {page.name: rows(page.read_text(), " message ") for page in DOCS.glob("*.md")}
    assert len(pages["troubleshooting.md"]) > 40 and len(pages["own-data.md"]) > 4
    found = [row for page in pages.values() for row in page]
    quoted = [match[1] for row in found if (match := MESSAGE_ROW.match(row))]
    assert not [message for message in quoted if not occurs(message)]
    others = {row.split("|")[1].strip() for row in found if not MESSAGE_ROW.match(row)}
    assert others == MADE_ELSEWHERE
