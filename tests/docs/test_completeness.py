"""The README leads to every page, and every picture is shown."""

import re

from markdown_docs import ROOT, files, links


def test_the_table_of_the_readme_has_every_page():
    table = (ROOT / "README.md").read_text().partition("## Documentation")[2]
    listed = set(re.findall(r"\(docs/([\w-]+)\.md\)", table))
    assert listed == {file.stem for file in (ROOT / "docs").glob("*.md")}


def test_every_picture_is_shown():
    shown = {
        (file.parent / link.partition("#")[0]).resolve()
        for file in files()
        for link in links(file.read_text())
    }
    pictures = {path for kind in ("png", "svg") for path in (ROOT / "docs").glob(f"*.{kind}")}
    assert pictures and pictures <= shown
