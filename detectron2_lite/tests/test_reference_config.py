"""Defaults, merging and dumping of configs against Detectron2's."""

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config


def flatten(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", [type(value).__name__, value]


@pytest.mark.parametrize("name", ["defaults", "deeplab"])
def test_each_key_has_detectron2s_type_and_value(reference, name):
    """Detectron2 has more keys: those of other kinds of models."""
    cfg = get_cfg()
    values = dict(flatten(cfg))
    if name == "deeplab":
        add_deeplab_config(cfg)
        values = {key: value for key, value in flatten(cfg) if value != values.get(key)}
    if reference.recorded is None and name == "defaults":
        known = reference.values["config/defaults"]
        assert values.keys() <= known.keys(), "keys that Detectron2 lacks"
        values = {**known, **values}
    reference(f"config/{name}", values)


OVERRIDES = [
    ("SOLVER.STEPS", "(3, 4)"), ("SOLVER.STEPS", "[3, 4]"), ("SOLVER.STEPS", "3"),
    ("SOLVER.STEPS", "()"), ("MODEL.PIXEL_MEAN", "(1, 2, 3)"), ("SOLVER.BASE_LR", "1e-4"),
    ("SOLVER.BASE_LR", "1"), ("SOLVER.BASE_LR", 1), ("SOLVER.BASE_LR", "fast"),
    ("SOLVER.MAX_ITER", "1.5"), ("SOLVER.MAX_ITER", "7"), ("SOLVER.MAX_ITER", "1e3"),
    ("SOLVER.MAX_ITER", True), ("SOLVER.NESTEROV", "True"), ("SOLVER.NESTEROV", "true"),
    ("SOLVER.NESTEROV", "1"), ("MODEL.WEIGHTS", "None"), ("MODEL.WEIGHTS", "1"),
    ("MODEL.WEIGHTS", "'1'"), ("MODEL.WEIGHTS", "a/b-c.pth"), ("MODEL.WEIGHTS", ""),
    ("DATASETS.TRAIN", "('a', 'b')"), ("DATASETS.TRAIN", "a"), ("DATASETS.TRAIN", "('a',)"),
    ("TEST.EXPECTED_RESULTS", "[['segm', 'AP', 38.0, 0.2]]"), ("MODEL.RESNETS", "{'DEPTH': 18}"),
    ("MODEL", "3"), ("MODEL.NOTHING", "3"), ("NOTHING.AT_ALL", "3"), ("SOLVER.AMP", "True"),
    ("INPUT.MIN_SIZE_TEST", "(1, 2)"), ("OUTPUT_DIR", "1.5"),
]  # fmt: skip


def outcome(action):
    try:
        return action()
    except Exception as error:  # whichever: its type is what is compared
        return type(error).__name__


@pytest.mark.parametrize("key, text", OVERRIDES)
def test_overrides(reference, key, text):
    def merge():
        cfg = get_cfg()
        cfg.merge_from_list([key, text])
        value = cfg
        for part in key.split("."):
            value = value[part]
        plain = value.dump() if isinstance(value, CfgNode) and key != "MODEL.RESNETS" else value
        return "a node" if isinstance(value, CfgNode) else [type(value).__name__, plain]

    reference(f"config/override/{key}={text!r}", outcome(merge))


FILES = {
    "base.yaml": "VERSION: 2\nSOLVER: {MAX_ITER: 7, STEPS: [1, 2]}\nOUTPUT_DIR: base\n",
    "other.yaml": "SOLVER: {MAX_ITER: 8, BASE_LR: 0.5}\nSEED: 3\n",
    "sub/child.yaml": "_BASE_: ../base.yaml\nSOLVER: {GAMMA: 0.5}\n",
    "sub/grandchild.yaml": "_BASE_: child.yaml\nSOLVER: {MAX_ITER: 9}\nOUTPUT_DIR: grandchild\n",
    "two.yaml": "_BASE_: [base.yaml, other.yaml]\nSOLVER: {GAMMA: 0.25}\n",
    "two_reversed.yaml": "_BASE_: [other.yaml, base.yaml]\n",
    "lost_base.yaml": "_BASE_: nowhere.yaml\nSEED: 5\n",
    "no_version.yaml": "SEED: 11\n",
    "empty_section.yaml": "VERSION: 2\nSOLVER: {}\n",
    "newer.yaml": "VERSION: 3\n",
    "wrong_type.yaml": "SOLVER: {MAX_ITER: many}\n",
    "wrong_base_type.yaml": "_BASE_: wrong_type.yaml\nSEED: 1\n",
    "tuple_text.yaml": "INPUT: {MIN_SIZE_TRAIN: '(3, 4)', CROP: {SIZE: '(5, 6)'}}\n",
    "tuple_code.yaml": "INPUT: {MIN_SIZE_TRAIN: (3, 4)}\nSOLVER: {BASE_LR: 1e-4}\n",
    "unknown.yaml": "SOLVER: {MAXIMUM: 3}\n",
    "a_value_for_a_node.yaml": "SOLVER: 3\n",
    "a_node_for_a_value.yaml": "SEED: {A: 3}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files(reference, tmp_path, name):
    (tmp_path / "sub").mkdir()
    for path, text in FILES.items():
        (tmp_path / path).write_text(text)

    def merge():
        cfg = get_cfg()
        cfg.merge_from_file(str(tmp_path / name))
        before, after = dict(flatten(get_cfg())), dict(flatten(cfg))
        return {key: after[key] for key in after if after[key] != before[key]}

    reference(f"config/file/{name}", outcome(merge))


def test_dumped_text(reference):
    node = CfgNode({"B": {"x": (1, 2), "y": [0.1, 1e-5]}, "A": "", "C": None, "D": True, "E": "1"})
    reference("config/dump", [node.dump(), str(node), repr(node)])


def frozen():
    cfg = get_cfg()
    cfg.freeze()
    return cfg


ACTIONS = {
    "set_frozen": lambda: setattr(frozen(), "SEED", 1),
    "set_frozen_child": lambda: setattr(frozen().SOLVER, "MAX_ITER", 1),
    "merge_frozen": lambda: frozen().merge_from_list(["SEED", 1]),
    "clone_frozen": lambda: [frozen().clone().is_frozen(), frozen().clone().SOLVER.is_frozen()],
    "set_new": lambda: setattr(get_cfg(), "BRAND_NEW", 1),
    "get_unknown": lambda: get_cfg().UNKNOWN,
    "computed": lambda: setattr(get_cfg(), "COMPUTED_X", 1),
    "odd_list": lambda: get_cfg().merge_from_list(["SEED"]),
    "merge_other": lambda: get_cfg().merge_from_other_cfg(CfgNode({"SEED": 4})),
    "merge_base_key": lambda: get_cfg().merge_from_other_cfg(CfgNode({"_BASE_": "x"})),
    "bad_value": lambda: CfgNode({"A": object()}).dump(),
    "a_set": lambda: CfgNode({"A": {1, 2}}).dump(),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_refusals(reference, name):
    reference(f"config/action/{name}", outcome(ACTIONS[name]))
