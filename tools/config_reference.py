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
from dataclasses import dataclass, field
from pathlib import Path

from s4m_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
SOURCE, START = ROOT / "s4m_d2" / "config.py", "add_s4m_config"
PACKAGE = "s4m_d2"
NODE = "CN"  # what makes an inner node of the config

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
class Key:
    """A config key, its default as Python writes it, and the comments above and beside it."""

    name: str
    default: str
    text: str


@dataclass
class Group:
    """Keys that stand together, and the comment over them."""

    text: str = ""
    keys: list[Key] = field(default_factory=list)


@dataclass
class Section:
    """The keys of one node of the config."""

    text: str = ""
    groups: list[Group] = field(default_factory=list)


class SourceError(ValueError):
    """The source is written in a way that this tool does not follow."""


class Reader:
    """Follows the functions that add keys, from one that takes the config.

    Attributes:
        sections: by the node's name, in the order of the source.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sections: dict[str, Section] = {}

    def read(self, file: Path, function: str, prefix: str = "") -> None:
        """Read the keys that ``function`` of ``file`` sets on its argument, or on what it returns.

        Raises:
            SourceError: names the line that is not understood.
        """
        source = file.read_text()
        module = ast.parse(source, str(file))
        functions = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef)}
        if function not in functions:
            raise SourceError(f"{file}: there is no function {function}")
        body = functions[function]
        names = {argument.arg: prefix for argument in body.args.args}
        for node in ast.walk(body):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Name):
                names[node.value.id] = prefix
        if prefix and (text := ast.get_docstring(body)):
            self._section(prefix).text = " ".join(text.split())
        lines, places = source.splitlines(), _functions(module, file, self.root)
        for statement in body.body:
            self._statement(statement, names, lines, places)

    def _statement(self, node, names, lines, places) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if (called := ast.unparse(node.value.func)) in places:
                self.read(*places[called], _key(node.value.args[0], names) or "")
            return
        if not isinstance(node, ast.Assign):
            return
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name):  # another name of a node
            if (key := _key(value, names)) is not None:
                names[target.id] = key
            return
        key = _key(target, names)
        if key is None:
            raise SourceError(f"line {node.lineno}: {ast.unparse(target)} is no key of the config")
        heading, above, beside = _comments(lines, node)
        if isinstance(value, ast.Call):
            self._section(key).text = " ".join(filter(None, [heading, above, beside]))
            called = ast.unparse(value.func)
            if called in places:
                self.read(*places[called], key)
            elif called != NODE:
                raise SourceError(f"line {node.lineno}: {called} is not of this package")
            return
        groups = self._section(key.rpartition(".")[0]).groups
        if heading or not groups:
            groups.append(Group(heading))
        text = " ".join(filter(None, [above, beside]))
        groups[-1].keys.append(Key(key, repr(ast.literal_eval(value)), text))

    def _section(self, name: str) -> Section:
        return self.sections.setdefault(name, Section())


def _functions(module: ast.Module, file: Path, root: Path) -> dict[str, tuple[Path, str]]:
    """Name → (file, name there) of the package's functions that a module can call."""
    places = {n.name: (file, n.name) for n in module.body if isinstance(n, ast.FunctionDef)}
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            path = root.joinpath(*node.module.split(".")).with_suffix(".py")
            places |= {a.asname or a.name: (path, a.name) for a in node.names}
    return places


def _key(node: ast.expr, names: dict[str, str]) -> str | None:
    """`former.TEST.INSTANCE_ON` → MODEL.MASK_FORMER.TEST.INSTANCE_ON; None: not of the config."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        parent = _key(node.value, names)
        return parent if parent is None else f"{parent}.{node.attr}".lstrip(".")
    return None


def _comments(lines: list[str], node: ast.Assign) -> tuple[str, str, str]:
    """The comment over a group of keys (after an empty line), the one above, and the one beside."""
    first = node.lineno - 1
    start = first
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    above = " ".join(line.lstrip().removeprefix("#").strip() for line in lines[start:first])
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
    beside = rest.removeprefix("#").strip()
    return (above, "", beside) if not lines[start - 1].strip() else ("", above, beside)


def page(source: Path = SOURCE, function: str = START, root: Path = ROOT) -> str:
    """The whole page, in Markdown."""
    reader = Reader(root)
    reader.read(source, function)
    parts = [INTRODUCTION]
    for name, section in sorted(reader.sections.items(), key=lambda item: item[0].split(".")):
        if not any(group.keys for group in section.groups):
            continue
        parts.append(f"## {name}\n")
        if section.text:
            parts.append(f"{_sentence(section.text)}\n")
        for group in section.groups:
            if group.text:
                parts.append(f"{_sentence(group.text)}\n")
            parts.append("| key | default | meaning |\n|---|---|---|")
            parts += [
                f"| `{key.name}` | `{key.default}` | {_escaped(key.text)} |" for key in group.keys
            ]
            parts.append("")
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
