"""CITATION.cff and CHANGELOG.md: valid, and of this version."""

import re
from pathlib import Path

import yaml

from s4m_d2 import __version__

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_version_and_cites_papers_with_their_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", __version__)
    assert citation["message"] and citation["title"] and citation["authors"]
    for arxiv in ("2504.05301", "2308.02668", "2305.05803", "2112.01527"):
        (paper,) = [r for r in citation["references"] if arxiv in r["url"]]
        assert paper["identifiers"][0]["value"] == f"arXiv:{arxiv}"
        assert all(author["family-names"] and author["given-names"] for author in paper["authors"])


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    (unreleased, _), *versions = re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE)
    assert unreleased == "Unreleased"
    for number, date in versions:
        assert re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", number + date)
    released = [number for number, _ in versions]
    assert __version__ in released or __version__ in text.split("###")[0]  # the one to come
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS
