"""Configs: inheritance, merging, refusals, and @configurable."""

import pytest
import yaml
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.projects.deeplab import add_deeplab_config


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_child_file_overrides_its_base_and_keeps_the_rest(tmp_path):
    write(tmp_path, "base.yaml", "VERSION: 2\nSOLVER: {MAX_ITER: 7, STEPS: [1, 2]}\n")
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub", "c.yaml", "_BASE_: ../base.yaml\nSOLVER: {MAX_ITER: 9}\n")
    cfg = get_cfg()
    cfg.merge_from_file(child)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (9, (1, 2))
    assert cfg.SOLVER.GAMMA == get_cfg().SOLVER.GAMMA


@pytest.mark.parametrize("text", ["VERSION: 2\nSOLVERS: {}\n", "VERSION: 2\nSOLVER: {ITER: 1}\n"])
def test_unknown_keys_in_a_file_are_refused(tmp_path, text):
    with pytest.raises(KeyError, match="SOLVER"):
        get_cfg().merge_from_file(write(tmp_path, "c.yaml", text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AssertionError, match="nowhere.yaml"):
        get_cfg().merge_from_file(str(tmp_path / "nowhere.yaml"))


def test_a_newer_version_is_refused(tmp_path):
    with pytest.raises(AssertionError):
        get_cfg().merge_from_file(write(tmp_path, "c.yaml", "VERSION: 3\n"))


def test_unsafe_tags_build_nothing(tmp_path):
    victim = tmp_path / "victim"
    attack = f"VERSION: 2\nSEED: !!python/object/apply:os.mkdir ['{victim}']\n"
    base = write(tmp_path, "base.yaml", attack)
    child = write(tmp_path, "child.yaml", "_BASE_: base.yaml\n")
    for path in (base, child):
        with pytest.raises(yaml.constructor.ConstructorError, match="python/object"):
            get_cfg().merge_from_file(path, allow_unsafe=False)
    assert not victim.exists()


def test_a_list_of_overrides_is_parsed_and_checked():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.STEPS", "(3, 4)", "MODEL.DEVICE", "cpu", "SEED", "5"])
    assert (cfg.SOLVER.STEPS, cfg.MODEL.DEVICE, cfg.SEED) == ((3, 4), "cpu", 5)
    with pytest.raises(ValueError, match="Type mismatch"):
        cfg.merge_from_list(["SOLVER.MAX_ITER", "many"])
    with pytest.raises(AssertionError, match="Non-existent key"):
        cfg.merge_from_list(["SOLVER.MAXITER", 3])


def test_a_frozen_config_cannot_change_until_it_is_defrosted():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.SOLVER.MAX_ITER = 3
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = 3
    assert cfg.SOLVER.MAX_ITER == 3 != get_cfg().SOLVER.MAX_ITER


def test_a_dumped_config_loads_back_to_itself(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.STEPS", "(3, 4)", "MODEL.WEIGHTS", "x.pth"])
    fresh = get_cfg()
    fresh.merge_from_file(write(tmp_path, "dump.yaml", cfg.dump()))
    assert (fresh.SOLVER, fresh.MODEL.WEIGHTS) == (cfg.SOLVER, "x.pth")


def test_a_mask2former_file_needs_only_deeplabs_keys_beside_its_own(tmp_path):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    text = """
        VERSION: 2
        MODEL:
          BACKBONE: {FREEZE_AT: 0, NAME: build_resnet_backbone}
          RESNETS:
            {DEPTH: 50, STEM_TYPE: basic, STRIDE_IN_1X1: False, RES5_MULTI_GRID: [1, 1, 1],
             NORM: SyncBN, OUT_FEATURES: [res2, res3, res4, res5]}
        SOLVER:
          LR_SCHEDULER_NAME: WarmupPolyLR
          CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
          AMP: {ENABLED: True}
        INPUT:
          CROP: {ENABLED: True, TYPE: absolute, SIZE: '(512, 1024)', SINGLE_CATEGORY_MAX_AREA: 1.0}
        TEST: {EVAL_PERIOD: 5000, AUG: {ENABLED: False, MIN_SIZES: [512], MAX_SIZE: 4096}}
        DATALOADER: {FILTER_EMPTY_ANNOTATIONS: True, NUM_WORKERS: 4}
    """
    cfg.merge_from_file(write(tmp_path, "c.yaml", text))
    assert cfg.SOLVER.POLY_LR_POWER == 0.9
    assert cfg.SOLVER.POLY_LR_CONSTANT_ENDING == 0.0
    assert cfg.MODEL.RESNETS.RES5_MULTI_GRID == [1, 1, 1]
    assert cfg.INPUT.CROP.SIZE == [512, 1024]


class Pair:
    @configurable
    def __init__(self, a, b=2, *, c=3):
        self.values = (a, b, c)

    @classmethod
    def from_config(cls, cfg, b=5):
        return {"a": cfg.A, "b": b}


class Child(Pair):
    @classmethod
    def from_config(cls, cfg, **kwargs):
        return {"a": cfg.A * 10, **kwargs}


@configurable(from_config=lambda cfg, b: {"a": cfg.A, "b": b})
def add(a, b, c=0):
    return a + b + c


@pytest.mark.parametrize(
    "values, expected",
    [
        (lambda cfg: Pair(1).values, (1, 2, 3)),
        (lambda cfg: Pair(1, 4, c=6).values, (1, 4, 6)),
        (lambda cfg: Pair(cfg).values, (7, 5, 3)),
        (lambda cfg: Pair(cfg=cfg, c=0).values, (7, 5, 0)),
        (lambda cfg: Pair(cfg, b=8).values, (7, 8, 3)),
        (lambda cfg: Pair(cfg, a=9).values, (9, 5, 3)),
        (lambda cfg: Child(cfg, b=1).values, (70, 1, 3)),
        (lambda cfg: add(1, 2), 3),
        (lambda cfg: add(cfg, 2), 9),
        (lambda cfg: add(cfg, b=2, c=1), 10),
    ],
)
def test_configurable_takes_arguments_or_a_config(values, expected):
    assert values(CfgNode({"A": 7})) == expected


def test_configurable_says_what_is_missing():
    class NoFromConfig:
        @configurable
        def __init__(self, a):
            pass

    class NotAClassmethod(NoFromConfig):
        def from_config(self, cfg):
            return {}

    class WrongArgument(NoFromConfig):
        @classmethod
        def from_config(cls, config):
            return {}

    cfg = CfgNode({"A": 1})
    with pytest.raises(AttributeError, match="from_config"):
        NoFromConfig(cfg)
    with pytest.raises(TypeError, match="from_config"):
        NotAClassmethod(cfg)
    with pytest.raises(TypeError, match="first argument"):
        WrongArgument(cfg)
