"""CITATION.cff, CHANGELOG.md and .pre-commit-config.yaml: valid, and of this version."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "s4m_d2" / "__init__.py").read_text(), re.MULTILINE
)[1]


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_complete():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == VERSION
    assert citation["license"] == "Apache-2.0"
    assert citation["message"] and citation["title"] and citation["authors"]


@pytest.mark.parametrize("arxiv", ["2504.05301", "2308.02668", "2305.05803", "2112.01527"])
def test_papers_are_cited_with_authors(arxiv):
    (paper,) = [r for r in read("CITATION.cff")["references"] if arxiv in r["url"]]
    assert paper["identifiers"][0]["value"] == f"arXiv:{arxiv}"
    assert paper["type"] in ("article", "conference-paper")
    assert all(author["family-names"] and author["given-names"] for author in paper["authors"])
    assert 2015 <= paper["year"] <= 2100


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE)
    assert versions[0][0] == "Unreleased"
    for number, date in versions[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", number)
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    released = [number for number, _ in versions[1:]]
    assert VERSION in released or VERSION in text.split("###")[0]  # the one to come
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS


def test_hooks_need_no_network_and_run_ruff_and_the_reference():
    (local,) = read(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    entries = " ".join(hook["entry"] for hook in local["hooks"])
    assert "ruff check" in entries and "ruff format" in entries
    assert "tools/config_reference.py --check" in entries
    assert re.search(r"^ruff==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
