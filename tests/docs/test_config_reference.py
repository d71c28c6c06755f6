"""docs/configuration.md: made from config.py, complete, and with the defaults that are loaded."""

import ast
import re

import config_reference
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from s4m_d2 import add_s4m_config

ROW = re.compile(r"^\| `([\w.]+)` \| `(.+)` \| (.*) \|$", re.MULTILINE)


def leaves(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_page_is_up_to_date(capsys):
    assert config_reference.main(["--check"]) == 0, capsys.readouterr().err


def test_every_key_that_we_add_is_listed_with_a_comment_and_the_default_that_is_loaded():
    before, after = get_cfg(), get_cfg()
    add_deeplab_config(before)  # of the engine
    add_s4m_config(after)
    engine, ours = dict(leaves(before)), dict(leaves(after))
    rows = ROW.findall(config_reference.page())
    listed = {key: ast.literal_eval(value) for key, value, _ in rows}
    assert listed.keys() >= ours.keys() - engine.keys()
    # Beside new keys only those of which the default is set here again.
    assert listed == {key: ours[key] for key in listed if key in ours}
    assert not [key for key, _, comment in rows if not comment.strip()]
