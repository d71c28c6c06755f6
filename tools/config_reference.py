#!/usr/bin/env python
"""Write docs/configuration.md from s4m_d2/config.py; its comments are the documentation.

    python tools/config_reference.py
    python tools/config_reference.py --check

--check writes nothing; the exit status is 1 if the page is out of date.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

from s4m_d2.engine.command.arguments import command_parser
from s4m_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
SOURCE = ROOT / "s4m_d2" / "config.py"

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


def read(source: str) -> tuple[dict[str, str], dict[str, list[tuple[str, list[str]]]]]:
    """By a node's name its text, and its groups of keys: a text and the rows of a table."""
    texts: dict[str, str] = {}
    groups: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for function in (x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)):
        names = {"cfg": ""}
        for node in (x for x in function.body if isinstance(x, ast.Assign)):
            *aliases, target = node.targets
            value = node.value
            if isinstance(target, ast.Name):  # another name of a node
                names[target.id] = _key(value, names)
                continue
            key = _key(target, names)
            names.update((alias.id, key) for alias in aliases)
            heading, above, beside = _comments(source.splitlines(), node)
            if isinstance(value, ast.Call):  # a new node
                texts[key] = " ".join(filter(None, [heading, above, beside]))
                continue
            its_groups = groups[key.rpartition(".")[0]]
            if heading or not its_groups:
                its_groups.append((heading, []))
            text = _escaped(" ".join(filter(None, [above, beside])))
            its_groups[-1][1].append(f"| `{key}` | `{ast.literal_eval(value)!r}` | {text} |")
    return texts, groups


def _comments(lines: list[str], node: ast.Assign) -> tuple[str, str, str]:
    """The comment over a group (after an empty line), the one above a key, and beside it."""
    first = start = node.lineno - 1
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    above = " ".join(line.strip().removeprefix("# ") for line in lines[start:first])
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    beside = rest.strip().removeprefix("#").strip()
    is_heading = not lines[start - 1].strip()
    return (above, "", beside) if is_heading else ("", above, beside)


def _key(node: ast.expr, names: dict[str, str]) -> str:
    """`former.TEST.INSTANCE_ON` → MODEL.MASK_FORMER.TEST.INSTANCE_ON."""
    if isinstance(node, ast.Name):
        return names[node.id]
    return f"{_key(node.value, names)}.{node.attr}".lstrip(".")


def page() -> str:
    """The whole page, in Markdown."""
    texts, groups = read(SOURCE.read_text())
    parts = [INTRODUCTION]
    for name, its_groups in sorted(groups.items(), key=lambda item: item[0].split(".")):
        parts.append(f"## {name}\n")
        if texts.get(name):
            parts.append(f"{_sentence(texts[name])}\n")
        for text, rows in its_groups:
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
    parser = command_parser(__doc__)
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
