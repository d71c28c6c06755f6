"""What the Markdown files of the project say: commands, code spans, links, headings."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from helpers import ROOT

PLACES = ("*.md", "docs/*.md", "datasets/*.md", "examples/*/*.md", "detectron2_lite/*.md")
PLACES += ("s4m_d2/**/*.md", "tools/**/*.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
# How an inline command begins; other code spans are names, keys, options or values.
PROGRAMS = (
    "bash cd cp curl export git hf ls make mkdir pip pre-commit pytest python ruff s4m-export "
    "s4m-label s4m-predict s4m-report s4m-review s4m-sepl s4m-train sbatch tensorboard torchrun "
    "source unzip wget"
).split()
_OPTIONAL = re.compile(r"\[[A-Z][^\]\"']*\.\.\.\]|…")  # "[KEY VALUE ...]": what may follow
# Values that stand for the reader's own.
PLACEHOLDERS = {"FILE": "configs/toyscapes_10pct.yaml", "N": "1", "seedN": "seed1"}


def files() -> list[Path]:
    return sorted({file for place in PLACES for file in ROOT.glob(place)})


@dataclass(frozen=True)
class Command:
    """A command of a file, in words; variables set in front of it are left out."""

    file: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {shlex.join(self.words)}"


def blocks(text: str, language: str) -> list[str]:
    return [content for name, content in _FENCE.findall(text) if name == language]


def spans(text: str) -> list[str]:
    """Inline code, with line breaks as spaces."""
    return [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("", text))]


def links(text: str) -> list[str]:
    return _LINK.findall(_SPAN.sub("", _FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """Headings as GitHub names them in a link."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def words_of(line: str) -> tuple[str, ...]:
    """The words of a line of shell, without comment, placeholders filled in."""
    words = shlex.split(_OPTIONAL.sub("", line), comments=True)
    while words and re.fullmatch(r"[A-Z_]\w*=.*", words[0]):
        del words[0]
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
    return tuple(PLACEHOLDERS.get(word, word) for word in words)


@cache
def commands() -> list[Command]:
    """Every command of every file, once for each file."""
    found = {}
    for file in files():
        text = file.read_text()
        lines = [line for block in blocks(text, "bash") for line in _joined(block)]
        lines += [span for span in spans(text) if span.split(" ")[0] in PROGRAMS and " " in span]
        name = file.relative_to(ROOT).as_posix()
        for part in (part for line in lines for part in line.split(" && ")):
            if words := words_of(part):
                found[Command(name, words)] = None
    return list(found)


def _joined(block: str) -> list[str]:
    return [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def answer_of(what: str, request: Any, folder: Path, environment: dict[str, str]) -> Any:
    """What run_commands.py answers if it is to "parse" or "run" something, in ``folder``."""
    command = [sys.executable, str(Path(__file__).with_name("run_commands.py")), what]
    options = {"capture_output": True, "text": True, "cwd": folder, "env": environment}
    result = subprocess.run(command, input=json.dumps(request), **options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
