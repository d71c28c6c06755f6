"""Building SAM 2 from a config: published sizes and files, and what is said where they lack."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from sam_cases import needs_sam2, small_sam2

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam import sam2 as sam2_backend
from s4m_d2.sam.sam2 import SIZES, VIDEO_ONLY, HieraSize, build_sam2_image_model

FILES = {"hiera_t": "tiny", "hiera_s": "small", "hiera_b+": "base_plus", "hiera_l": "large"}
FLAGS = (
    "directly_add_no_mem_embed",
    "image_size",
    "iou_prediction_use_sigmoid",
    "pred_obj_scores",
    "pred_obj_scores_mlp",
)
SHRUNK = HieraSize(8, 1, (1, 1, 2, 1), (3,))


def config(path="", model="hiera_t"):
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    sam = cfg.S4M.SAM
    sam.BACKEND, sam.MODEL_TYPE, sam.CHECKPOINT = "sam2", model, str(path)
    return cfg


def package_config(version: str, model: str) -> dict:
    import sam2

    folder = Path(sam2.__path__[0]) / "configs" / version
    return yaml.safe_load((folder / f"{version}_{model}.yaml").read_text())["model"]


@pytest.fixture
def small(monkeypatch):
    """hiera_t at a size that a test can hold."""
    monkeypatch.setattr(sam2_backend, "build_sam2_image_model", lambda size: small_sam2())


@pytest.fixture
def weights(tmp_path):
    """A file like the published ones, of the small model."""
    path = tmp_path / "sam2.1_hiera_tiny.pt"
    state = small_sam2().state_dict()
    state["memory_encoder.fuser.weight"] = state["no_obj_ptr"] = torch.zeros(2)
    torch.save({"model": state}, path)
    return path


@needs_sam2
@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize("model", SIZES)
def test_the_sizes_are_those_of_the_packages_configs(model, version):
    from sam2.modeling.backbones.hieradet import Hiera

    published = package_config(version, model)
    trunk = published["image_encoder"]["trunk"]
    for name, value in vars(SIZES[model]).items():
        default = inspect.signature(Hiera).parameters[name].default
        expected = trunk.get(name, default)
        assert value == (tuple(expected) if isinstance(expected, list) else expected), name
    assert set(trunk) - {"_target_"} <= set(vars(SIZES[model]))
    neck = published["image_encoder"]["neck"]
    assert neck["d_model"] == neck["position_encoding"]["num_pos_feats"] == sam2_backend.EMBED_DIM
    assert neck["fpn_top_down_levels"] == sam2_backend.TOP_DOWN_LEVELS
    assert neck["fpn_interp_model"] == "nearest"
    assert published["image_encoder"]["scalp"] == sam2_backend.DROPPED_LEVELS
    assert published["use_high_res_features_in_sam"]
    built = build_sam2_image_model(SHRUNK)
    assert {name: getattr(built, name) for name in FLAGS} == {n: published[n] for n in FLAGS}


@needs_sam2
@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
def test_a_file_of_either_version_loads(version, tmp_path, monkeypatch):
    """A model of the package's own builder, with its parts for video; only the trunk is shrunk."""
    from sam2.build_sam import build_sam2

    trunk = "++model.image_encoder.trunk."
    theirs = build_sam2(
        f"configs/{version}/{version}_hiera_t.yaml",
        device="cpu",
        hydra_overrides_extra=[
            trunk + "embed_dim=8",
            trunk + "stages=[1,1,2,1]",
            trunk + "global_att_blocks=[3]",
            "++model.image_encoder.neck.backbone_channel_list=[64,32,16,8]",
        ],
    )
    path = tmp_path / f"{version}_hiera_tiny.pt"
    torch.save({"model": theirs.state_dict()}, path)
    monkeypatch.setitem(SIZES, "hiera_t", HieraSize(8, 1, (1, 1, 2, 1), (3,), (7, 7)))
    backend = build_sam_backend(config(path))
    assert (backend.image_side, backend.grid_side) == (1024, 64)
    ours = backend.sam.state_dict()
    for name, value in theirs.state_dict().items():
        assert name.startswith(VIDEO_ONLY) or torch.equal(ours[name], value)
    assert all(name in theirs.state_dict() for name in ours)


@needs_sam2
def test_building_it_leaves_the_global_random_state_alone(small, weights):
    before = torch.get_rng_state()
    build_sam_backend(config(weights))
    assert torch.equal(torch.get_rng_state(), before)


@needs_sam2
@pytest.mark.parametrize("model", SIZES)
def test_a_missing_file_names_the_path_the_files_and_the_source(model, tmp_path):
    path = tmp_path / "none.pt"
    with pytest.raises(WeightsError) as caught:
        build_sam_backend(config(path, model))
    message = str(caught.value)
    assert f"'{path}': there is no such file" in message
    assert f"sam2.1_hiera_{FILES[model]}.pt or sam2_hiera_{FILES[model]}.pt" in message
    assert "https://github.com/facebookresearch/sam2" in message


@needs_sam2
def test_a_truncated_file_is_told_with_its_size(small, weights):
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"hiera_t.*5,000 bytes\) cannot be read.*sam2"):
        build_sam_backend(config(weights))


@needs_sam2
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_encoder.pos_embed": torch.zeros(3)}, "of another model.*is missing"),
        ({"model": {"image_encoder.pos_embed": torch.zeros(3)}}, "pos_embed is unknown"),
        ({"model": {"no_mem_embed": torch.zeros(1, 1, 7)}}, r"\(1, 1, 7\) instead of \(1, 1, 32\)"),
        ({"epoch": 3, "model": [1]}, "a mapping with the keys epoch, model"),
        ({"model": {"no_mem_embed": 7}}, "a mapping with the keys no_mem_embed"),
        ([1, 2], "a list"),
    ],
)
def test_another_models_file_is_told_by_what_it_holds(content, message, small, tmp_path):
    state = small_sam2().state_dict()
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = {"model": state | content["model"]}
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        build_sam_backend(config(path))


@needs_sam2
def test_a_bare_state_dict_loads_too(small, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(small_sam2().state_dict(), path)
    assert build_sam_backend(config(path)).grid_side == 8


def test_a_model_of_the_other_backend_is_refused_with_the_names_of_this_one():
    with pytest.raises(ConfigError, match=r"'vit_l'.*hiera_t, hiera_s, hiera_b\+, hiera_l.*sam2"):
        build_sam_backend(config(model="vit_l"))


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sam2", None)
    with pytest.raises(ConfigError, match=r'pip install "s4m_d2\[sam2\]"'):
        build_sam_backend(config(tmp_path / "none.pt"))
    with pytest.raises(ConfigError, match="not installed"):
        build_sam2_image_model(SHRUNK)


@needs_sam2
def test_without_hydra_which_the_package_imports_the_error_is_the_same(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sam2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hydra", None)
    with pytest.raises(ConfigError, match=r'pip install "s4m_d2\[sam2\]"'):
        build_sam2_image_model(SHRUNK)


def test_a_broken_package_shows_its_own_error(monkeypatch, tmp_path):
    (tmp_path / "sam2").mkdir()
    (tmp_path / "sam2" / "__init__.py").write_text("import no_such_extension")
    for name in [name for name in sys.modules if name.partition(".")[0] == "sam2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_extension"):
        build_sam_backend(config(tmp_path / "none.pt"))
