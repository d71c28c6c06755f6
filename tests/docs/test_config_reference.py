"""docs/configuration.md: made from config.py, complete, and with the defaults that are loaded."""

import ast
import re
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from s4m_d2 import add_s4m_config

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w.]+)` \| `(.+)` \| (.*) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(ROOT / "tools"))
    import config_reference

    return config_reference


def leaves(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def rows(text):
    return {key: (ast.literal_eval(value), comment) for key, value, comment in ROW.findall(text)}


def test_the_page_is_up_to_date(reference, capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


def test_every_key_that_we_add_is_listed_with_the_default_that_is_loaded(reference):
    before, after = get_cfg(), get_cfg()
    add_deeplab_config(before)  # of the engine
    add_s4m_config(after)
    engine, ours = dict(leaves(before)), dict(leaves(after))
    listed = {key: value for key, (value, _) in rows(reference.page()).items()}
    assert listed.keys() >= ours.keys() - engine.keys()
    assert listed == {key: ours[key] for key in listed}
    # Beside new keys only those of which the default is set here again.
    assert listed.keys() <= ours.keys()


def test_every_key_has_a_comment(reference):
    assert not [key for key, (_, comment) in rows(reference.page()).items() if not comment.strip()]


SOURCE = '''
from s4m_d2.config_more import add_more, own

def add_s4m_config(cfg):
    add_engine_config(cfg)
    add_more(cfg)
    cfg.S4M = _s4m()
    cfg.S4M.OWN = own()

def _s4m():
    """The method."""
    s4m = CN()
    s4m.A = 1  # beside
    # over it,
    # two lines | with <signs>
    s4m.B = (1, "x # no comment")  # and beside

    # A group
    s4m.C = "é"  # after é
    # Of a node
    s4m.NODE = CN()
    s4m.NODE.D = -1.5
    return s4m
'''
MORE = '''
def add_more(config):
    solver = config.SOLVER
    solver.KEEP = 2  # files

def own():
    """Own data."""
    node = CN()
    node.FOLDER = ""
    return node
'''


@pytest.fixture
def source(tmp_path):
    package = tmp_path / "s4m_d2"
    package.mkdir()
    (package / "config.py").write_text(SOURCE)
    (package / "config_more.py").write_text(MORE)
    return package / "config.py"


def test_comments_go_to_their_keys_groups_and_sections(reference, source, tmp_path):
    text = reference.page(source, "add_s4m_config", tmp_path)
    assert rows(text) == {
        "S4M.A": (1, "beside"),
        "S4M.B": ((1, "x # no comment"), "over it, two lines \\| with \\<signs\\> and beside"),
        "S4M.C": ("é", "after é"),
        "S4M.NODE.D": (-1.5, ""),
        "S4M.OWN.FOLDER": ("", ""),
        "SOLVER.KEEP": (2, "files"),
    }
    paragraphs = text.split("\n\n")
    after = dict(zip(paragraphs, paragraphs[1:], strict=False))
    assert after["## S4M"] == "The method."
    assert after["## S4M.NODE"] == "Of a node."
    assert after["## S4M.OWN"] == "Own data."
    (group,) = [p for p in paragraphs if p == "A group."]
    assert "`S4M.C`" in after[group] and "`S4M.A`" not in after[group]


def test_a_page_out_of_date_is_told_and_written(reference, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "docs" / "configuration.md")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    assert reference.main(["--check"]) == 1
    assert "python tools/config_reference.py" in capsys.readouterr().err
    assert not reference.PAGE.exists()
    assert reference.main([]) == 0
    assert reference.PAGE.read_text() == reference.page()
    assert reference.main(["--check"]) == 0
