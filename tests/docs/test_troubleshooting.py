"""Every message that docs/troubleshooting.md quotes is one of the program."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)
QUOTED = ROW.findall((ROOT / "docs" / "troubleshooting.md").read_text())
VARIABLE = "…"
_LOGGED = re.compile(r"%[.\d]*[dfgs]")  # values of a logger's message


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


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_of_the_program(message):
    assert occurs(message, program())


def test_no_message_is_quoted_twice():
    assert QUOTED and len(QUOTED) == len(set(QUOTED))


def test_changed_messages_are_noticed():
    source = 'raise E(f"Weights \'{path}\' hold nothing " "of this model: it has {0}")'
    assert occurs("Weights '…' hold nothing of this model", texts(source))
    assert not occurs("Weights '…' have nothing of this model", texts(source))
    assert not occurs("of this model … Weights", texts(source))
