"""Files with classes and functions that the Markdown files name have these, as the source says."""

import ast
import re
from functools import cache

from markdown_docs import ROOT, files

# `s4m_d2/semi/arp.py`: `ARP`, `ARP.__call__`
_REFERENCE = re.compile(r"`((?:[\w.]+/)*\w+\.py)`: ((?:`[A-Za-z_][\w.]*`(?:, | and )?)+)")
_STEP = re.compile(r"^\*\*(\d+)\. (.+?)\*\*(.*?)(?=^\*\*\d|^## |\Z)", re.MULTILINE | re.DOTALL)
METHOD = (ROOT / "docs" / "method.md").read_text()
# The concepts of the paper; each has a file named after it.
CONCEPTS = (
    "losses/structural_distillation",
    "semi/pseudo_labels",
    "semi/mask_points",
    "semi/refinement",
    "semi/arp",
    "semi/burn_in",
    "semi/ema_teacher",
    "engine/labeling/pseudo_labeling",
    "engine/training/step",
    "engine/training/trainer",
)


def references(text: str) -> list[tuple[str, str]]:
    """(path, dotted name) of all names that stand behind a path and a colon."""
    text = " ".join(text.split())
    return [
        (path, name)
        for path, names in _REFERENCE.findall(text)
        for name in re.findall(r"`([^`]+)`", names)
    ]


@cache
def definitions(path: str) -> frozenset[str]:
    """Dotted names of a file: its functions, classes, constants, and what is in classes."""
    return frozenset(_defined(ast.parse((ROOT / path).read_text()).body, ""))


def _defined(body: list[ast.stmt], prefix: str):
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _defined(node.body, f"{prefix}{node.name}.")
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def test_what_is_named_behind_a_file_is_defined_there():
    named = {pair for file in files() for pair in references(file.read_text())}
    assert len(named) > 50
    for path, dotted in named:
        assert (ROOT / path).is_file(), path
        assert dotted in definitions(path), f"{path} has no {dotted}"


def test_every_step_and_concept_of_the_method_says_where_it_is():
    steps = _STEP.findall(METHOD)
    assert [int(number) for number, *_ in steps] == [*range(1, 6), *range(1, 11)]
    assert not [title for _, title, text in steps if not references(text)]
    assert {f"s4m_d2/{concept}.py" for concept in CONCEPTS} <= {p for p, _ in references(METHOD)}
