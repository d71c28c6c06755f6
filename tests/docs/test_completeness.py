"""The README leads to every page, its first screen is complete, and every picture is shown."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from markdown_docs import ROOT, files, links  # noqa: E402

README = (ROOT / "README.md").read_text()
# What the documentation has to have at least.
PAGES = ("method", "configuration", "own-data", "performance", "engines", "porting")
PAGES += ("troubleshooting", "training", "looking", "plugging-in", "testing", "sepl", "model-card")
PAGES += ("evidence",)
FIRST_SCREEN = 35  # lines


def linked(file: Path) -> set[Path]:
    """Files that a Markdown file links to or shows."""
    paths = [link.partition("#")[0] for link in links(file.read_text()) if "://" not in link]
    return {(file.parent / path).resolve() for path in paths if path}


def test_the_table_of_the_readme_has_every_page():
    table = README[README.index("## Documentation") :]
    listed = set(re.findall(r"\(docs/([\w-]+)\.md\)", table))
    assert listed == {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert set(PAGES) <= listed


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_picture_is_shown(kind):
    shown = set().union(*(linked(file) for file in files()))
    pictures = set((ROOT / "docs").glob(f"*.{kind}"))
    assert pictures and pictures <= shown


def test_the_first_screen_says_what_and_how_and_shows_results():
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN])
    assert "arxiv.org/abs/2504.05301" in screen
    assert re.search(r"```bash\nmake quickstart .*\nmake test .*\n```", screen)
    assert re.search(r"!\[.+\]\(docs/overview\.png\)", screen)
    assert re.search(r"^\|.* \(S⁴M\) \| \d", screen, re.MULTILINE)
