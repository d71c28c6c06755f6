#!/usr/bin/env python
"""Write docs/configuration.md from s4m_d2/config.py; its comments are the documentation.

    python tools/config_reference.py
    python tools/config_reference.py --check

--check writes nothing; the exit status is 1 if the page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from s4m_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
SOURCE, START = ROOT / "s4m_d2" / "config.py", "add_s4m_config"

INTRODUCTION = """\
# Configuration

The keys that this project adds to [Detectron2's
config](https://detectron2.readthedocs.io/modules/config.html), including those of Mask2Former, with
their defaults. Set them in a config file (`configs/`) or on the command line:

```bash
python train_net.py --config-file configs/cityscapes_10pct.yaml --check S4M.BURN_IN 10000
```

An unknown key, or a value of another type, is an error; the message names the most similar key.
`--check` also checks ranges and contradicting settings.

*Generated from the comments of `s4m_d2/config.py` by `python tools/config_reference.py`.*
"""


@dataclass
class Section:
    """A node of the config: its text, and groups of keys that stand together.

    Attributes:
        groups: a group's text, and the rows of its table.
    """

    text: str = ""
    groups: list[tuple[str, list[str]]] = field(default_factory=list)


class Reader:
    """Follows the functions of config.py that add keys.

    Attributes:
        sections: by the node's name, in the order of the source.
    """

    def __init__(self, source: str) -> None:
        body = ast.parse(source).body
        self.sections: defaultdict[str, Section] = defaultdict(Section)
        self._lines = source.splitlines()
        self._functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}

    def read(self, function: str, prefix: str = "") -> None:
        """Read the keys that a function sets on its argument, or on what it returns."""
        body = self._functions[function]
        names = {argument.arg: prefix for argument in body.args.args}
        for node in ast.walk(body):
            if isinstance(node, ast.Return):
                names[node.value.id] = prefix
        if prefix and (text := ast.get_docstring(body)):
            self.sections[prefix].text = " ".join(text.split())
        for statement in body.body:
            if isinstance(statement, ast.Assign):
                self._assignment(statement, names)
            elif isinstance(statement.value, ast.Call):
                called = statement.value.func.id
                if called in self._functions:  # else Detectron2's
                    self.read(called, _key(statement.value.args[0], names))

    def _assignment(self, node: ast.Assign, names: dict[str, str]) -> None:
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name):  # another name of a node, or that of what is returned
            if not isinstance(value, ast.Call):
                names[target.id] = _key(value, names)
            return
        key = _key(target, names)
        heading, above, beside = self._comments(node)
        if isinstance(value, ast.Call):
            self.sections[key].text = " ".join(filter(None, [heading, above, beside]))
            if value.func.id in self._functions:  # else an empty node
                self.read(value.func.id, key)
            return
        groups = self.sections[key.rpartition(".")[0]].groups
        if heading or not groups:
            groups.append((heading, []))
        text = _escaped(" ".join(filter(None, [above, beside])))
        groups[-1][1].append(f"| `{key}` | `{ast.literal_eval(value)!r}` | {text} |")

    def _comments(self, node: ast.Assign) -> tuple[str, str, str]:
        """The comment over a group (after an empty line), the one above a key, and beside it."""
        first = start = node.lineno - 1
        while self._lines[start - 1].lstrip().startswith("#"):
            start -= 1
        above = " ".join(line.strip().removeprefix("# ") for line in self._lines[start:first])
        rest = self._lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        beside = rest.strip().removeprefix("#").strip()
        is_heading = not self._lines[start - 1].strip()
        return (above, "", beside) if is_heading else ("", above, beside)


def _key(node: ast.expr, names: dict[str, str]) -> str:
    """`former.TEST.INSTANCE_ON` → MODEL.MASK_FORMER.TEST.INSTANCE_ON."""
    if isinstance(node, ast.Name):
        return names[node.id]
    return f"{_key(node.value, names)}.{node.attr}".lstrip(".")


def page() -> str:
    """The whole page, in Markdown."""
    reader = Reader(SOURCE.read_text())
    reader.read(START)
    parts = [INTRODUCTION]
    for name, section in sorted(reader.sections.items(), key=lambda item: item[0].split(".")):
        if not section.groups:
            continue
        parts.append(f"## {name}\n")
        if section.text:
            parts.append(f"{_sentence(section.text)}\n")
        for text, rows in section.groups:
            if text:
                parts.append(f"{_sentence(text)}\n")
            parts += ["| key | default | meaning |\n|---|---|---|", *rows, ""]
    return "\n".join(parts).rstrip() + "\n"


def _escaped(text: str) -> str:
    for character in "|<>":
        text = text.replace(character, f"\\{character}")
    return text


def _sentence(text: str) -> str:
    return _escaped(text if text.endswith((".", ":")) else f"{text}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args(arguments)
    wanted, name = page(), PAGE.relative_to(ROOT)
    if PAGE.exists() and PAGE.read_text() == wanted:
        print(f"{name} is up to date")
        return 0
    if args.check:
        print(f"{name} is out of date; run: python tools/config_reference.py", file=sys.stderr)
        return 1
    with atomic_write(PAGE) as file:
        file.write(wanted)
    print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
