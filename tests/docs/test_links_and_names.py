"""Links, anchors, file names, modules and imports in the Markdown files lead somewhere."""

import ast
import importlib
import re
from functools import cache
from itertools import product
from pathlib import Path

from helpers import ROOT
from markdown_docs import anchors, blocks, files, links, spans

TOP = ("configs", "datasets", "detectron2_lite", "docs", "examples", "s4m_d2", "tests", "tools")
FILES = "md|py|sbatch|sh|yaml|yml|toml|cff"
WRITTEN = ("config.yaml",)  # by a run, into its OUTPUT_DIR
# `s4m_d2/semi/arp.py`: `ARP`, `ARP.__call__`
REFERENCE = re.compile(r"`((?:[\w.]+/)*\w+\.py)`: ((?:`[A-Za-z_][\w.]*`(?:, | and )?)+)")
STEP = re.compile(r"^\*\*(\d+)\. (.+?)\*\*(.*?)(?=^\*\*\d|^## |\Z)", re.MULTILINE | re.DOTALL)
METHOD = (ROOT / "docs" / "method.md").read_text()
# The concepts of the paper; each has a file named after it.
CONCEPTS = "losses/structural_distillation semi/pseudo_labels semi/refinement semi/arp"
CONCEPTS += " semi/ema_teacher engine/labeling/pseudo_labeling"
CONCEPTS += " engine/training/step engine/training/trainer"


def broken_link(file: Path, target: str) -> str:
    """What is wrong with a relative link of a file, "" if nothing is."""
    path, _, anchor = target.partition("#")
    place = (file.parent / path).resolve() if path else file
    if not place.exists():
        return f"there is no {path}"
    if anchor and anchor not in anchors(place.read_text()):
        return f"{place.name} has no heading #{anchor}"
    return ""


def test_links_and_pictures_exist():
    for file in files():
        relative = [x for x in links(file.read_text()) if not re.match(r"(https?|mailto):", x)]
        assert not [p for link in relative if (p := broken_link(file, link))], file


def alternatives(span: str) -> list[str]:
    """`a_{b,c}.py` → a_b.py, a_c.py."""
    parts = re.split(r"\{([^{}]*)\}", span)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in product(*choices)]


def missing_files(file: Path, span: str) -> list[str]:
    """Files of the repository that a code span names and that are not there."""
    missing = []
    for path in alternatives(span):
        top, slash, _ = path.partition("/")
        if not re.fullmatch(rf"[\w./*+-]+(\.({FILES})|/)", path):
            continue
        if path in WRITTEN or (slash and top not in TOP):
            continue  # of the user
        places = [ROOT, file.parent] + [ROOT / "configs"] * (not slash)
        if not any(list(place.glob(path.rstrip("/"))) for place in places):
            missing.append(path)
    return missing


def test_the_table_of_the_readme_has_every_page_and_every_picture_is_shown():
    table = (ROOT / "README.md").read_text().partition("## Documentation")[2]
    listed = set(re.findall(r"\(docs/([\w-]+)\.md\)", table))
    assert listed == {file.stem for file in (ROOT / "docs").glob("*.md")}
    linked = [(file, link) for file in files() for link in links(file.read_text())]
    shown = {(file.parent / link.partition("#")[0]).resolve() for file, link in linked}
    pictures = {path for kind in ("png", "svg") for path in (ROOT / "docs").glob(f"*.{kind}")}
    assert pictures and pictures <= shown


def test_files_that_are_named_exist():
    for file in files():
        named = spans(file.read_text())
        assert not [path for span in named for path in missing_files(file, span)], file


def resolve(dotted: str) -> None:
    """Import the longest module of a dotted name; the rest are attributes."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            thing = getattr(thing, attribute)
        return
    raise ModuleNotFoundError(dotted)


def named_objects(text: str) -> list[str]:
    """Dotted names of the package: in code spans, and imported in blocks of Python."""
    found = [s for s in spans(text) if re.fullmatch(r"s4m_d2(\.\w+)+", s)]
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "s4m_d2":
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_modules_classes_and_functions_exist():
    for file in files():
        for dotted in named_objects(file.read_text()):
            resolve(dotted)


def references(text: str) -> list[tuple[str, str]]:
    """(path, dotted name) of all names that stand behind a path and a colon."""
    text = " ".join(text.split())
    found = REFERENCE.findall(text)
    return [(path, name) for path, names in found for name in re.findall("`([^`]+)`", names)]


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
    steps = STEP.findall(METHOD)
    assert [int(number) for number, *_ in steps] == [*range(1, 6), *range(1, 11)]
    assert not [title for _, title, text in steps if not references(text)]
    named = {path for path, _ in references(METHOD)}
    assert {f"s4m_d2/{concept}.py" for concept in CONCEPTS.split()} <= named
