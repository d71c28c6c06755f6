"""The run's SAM, fine-tuned on its labeled images before the first stage."""

from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.config import get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.engine.labeling import quality, sam_quality
from s4m_d2.engine.labeling.quality import held_out_records, split_labeled
from s4m_d2.engine.labeling.sam_quality import adapted_config
from s4m_d2.report import read_results
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.automatic_masks import AutomaticMasks


@pytest.fixture
def config(small_config, tmp_path):
    (tmp_path / "run").mkdir()

    def make(**changes):
        sam = {"S4M__SAM__BACKEND": "tiny_toyscapes", "S4M__SAM__CHECKPOINT": ""}
        base = {"DATASETS__TRAIN": ("toyscapes_train",), "S4M__SAM__ADAPT": 1, **sam}
        return small_config(**base | changes)

    return make


@pytest.fixture
def measured(monkeypatch):
    """IoUs that the measure gives in turn, and the names of the images that it saw."""
    ious, seen = [], []

    def measure(backend, records, **_):
        seen.append({record["file_name"] for record in records})
        return SimpleNamespace(rated=np.array([ious.pop(0)]))

    monkeypatch.setattr(sam_quality, "measure_sam", measure)
    return ious, seen


def test_a_better_sam_is_kept_and_serves_all(config, measured, tmp_path):
    ious, seen = measured
    ious += [0.5, 0.6]
    cfg = config()
    found = adapted_config(cfg, resume=False)
    assert found.S4M.SAM.CHECKPOINT == str(tmp_path / "run/sam_adapted.pth")
    before, after = (AutomaticMasks(build_sam_backend(c)).fingerprint() for c in (cfg, found))
    assert before != after
    written = get_cfg()
    add_s4m_config(written)
    written.merge_from_file(tmp_path / "run/config.yaml")
    assert written == found
    trained, held_out = split_labeled(cfg)
    assert seen == [{record["file_name"] for record in held_out}] * 2
    assert not seen[0] & {record["file_name"] for record in trained}
    assert len(trained) + len(held_out) == 10 and len(held_out) == 2
    # Continued, nothing is measured or trained again; the weights follow from the seed.
    assert adapted_config(cfg, resume=True) == found
    ious += [0.5, 0.6]
    again = adapted_config(cfg, resume=False)
    assert AutomaticMasks(build_sam_backend(again)).fingerprint() == after


def test_what_is_not_better_is_not_kept(config, measured, tmp_path):
    measured[0].extend([0.5, 0.5])
    cfg = config()
    assert adapted_config(cfg, resume=False) == cfg
    assert not (tmp_path / "run/sam_adapted.pth").exists()
    assert read_results(tmp_path / "run/sam_adapted.json")["kept"] is False
    assert adapted_config(cfg, resume=True) == cfg


def test_the_gates_images_are_held_out(config):
    cfg = config(S4M__REFINE__GATE="auto")
    _, held_out = split_labeled(cfg)
    gates = {record["file_name"] for record in held_out_records(cfg)}
    assert gates and {record["file_name"] for record in held_out} == gates


@pytest.mark.parametrize(
    "changes", [{"S4M__SAM__ADAPT": 0}, {"S4M__STAGE": "teacher", "S4M__DISTILL__ENABLED": False}]
)
def test_nothing_is_done_where_nobody_asks(config, changes, tmp_path):
    cfg = config(**changes)
    assert adapted_config(cfg, resume=False) == cfg
    assert not list((tmp_path / "run").iterdir())


def test_one_labeled_image_is_too_few(config, measured, monkeypatch):
    records = quality.labeled_records
    monkeypatch.setattr(quality, "labeled_records", lambda cfg: records(cfg)[:1])
    cfg = config()
    assert adapted_config(cfg, resume=False) == cfg
