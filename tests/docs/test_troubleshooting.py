"""Every message that a table of messages in docs/ quotes is one of the program."""

import ast
import re
from functools import cache
from pathlib import Path

from helpers import ROOT

TABLE = re.compile(r"^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
ROW = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)
VARIABLE = "…"
# Rows without a code span.
MADE_ELSEWHERE = ("CUDA out of memory", "exit status 75", "No module named detectron2.…")
_LOGGED = re.compile(r"%[.\d]*[dfgs]")  # values of a logger's message


def rows(page: Path) -> list[str]:
    """The rows of all tables of messages of a page."""
    tables = TABLE.findall(page.read_text())
    return [row for table in tables for row in table.splitlines()]


PAGES = {page.name: rows(page) for page in sorted((ROOT / "docs").glob("*.md"))}
QUOTED = [m[1] for page_rows in PAGES.values() for row in page_rows if (m := ROW.match(row))]


def texts(source: str) -> list[str]:
    """Strings of a module as they read, parts that are filled in as one character."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else VARIABLE for v in node.values)
            found.append("".join(parts))
    return [" ".join(_LOGGED.sub(VARIABLE, text).split()) for text in found]


@cache
def program() -> list[str]:
    files = [*(ROOT / "s4m_d2").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    return [text for file in files for text in texts(file.read_text())]


def occurs(message: str, all_texts: list[str]) -> bool:
    """Whether one of the texts has a message's fixed parts, in this order."""
    fixed = ".*".join(re.escape(part) for part in message.split(VARIABLE))
    return any(re.search(fixed, text) for text in all_texts)


def test_quoted_messages_are_of_the_program():
    assert not [message for message in QUOTED if not occurs(message, program())]
    assert len(PAGES["troubleshooting.md"]) > 40 and len(PAGES["own-data.md"]) > 4
    others = [row for page in PAGES.values() for row in page if not ROW.match(row)]
    assert {row.split("|")[1].strip() for row in others} == set(MADE_ELSEWHERE)
