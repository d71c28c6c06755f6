"""Files of weights are compared with models without values, as loading them would."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine import S4MCheckpointer, TeacherTrainer, stage_config
from s4m_d2.engine.checks.weight_checks import (
    blueprint_findings,
    bytes_of,
    model_blueprint,
    sam_blueprint,
    sam_bytes,
    weight_findings,
)
from s4m_d2.engine.stages import STAGES
from s4m_d2.sam.tiny import TOYSCAPES_WEIGHTS


@pytest.fixture
def real_model(small_config):
    return TeacherTrainer.build_model(stage_config(small_config(), "student"))


def shapes(module):
    return {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}


def by_item(findings):
    return {finding.item: finding for finding in findings}


def test_a_blueprint_has_the_models_names_and_shapes_and_no_values(small_config, real_model):
    before = torch.get_rng_state()
    blueprint = model_blueprint(small_config())
    assert torch.equal(torch.get_rng_state(), before)
    assert shapes(blueprint) == shapes(real_model)
    assert all(value.is_meta for value in blueprint.state_dict().values())
    assert bytes_of(blueprint) == bytes_of(real_model)
    trained = sum(4 * p.numel() for p in real_model.parameters() if p.requires_grad)
    assert bytes_of(blueprint, trainable=True) == trained


def test_the_packaged_sam_is_measured_without_its_values(small_config):
    state = torch.load(TOYSCAPES_WEIGHTS, weights_only=True)
    backend = sam_blueprint(small_config())
    assert next(backend.sam.parameters()).is_meta
    # The file and the module hold the same tensors, but for the normalization of pixels.
    constants = (backend.sam.pixel_mean, backend.sam.pixel_std)
    extra = sum(4 * value.numel() for value in constants)
    assert sam_bytes(backend) == sum(4 * value.numel() for value in state.values()) + extra


def test_a_model_that_computes_with_values_while_it_is_built(small_config):
    class Computes(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
            self.part = nn.Linear(2, len(rates))

        def forward(self, batch):
            return {}

        predict_queries = forward

    META_ARCH_REGISTRY.register(Computes)
    try:
        blueprint = model_blueprint(small_config(MODEL__META_ARCHITECTURE="Computes"))
    finally:
        del META_ARCH_REGISTRY._obj_map["Computes"]
    assert shapes(blueprint) == shapes(nn.ModuleDict({"part": nn.Linear(2, 3)}))


@pytest.mark.parametrize("dropped", ["", "criterion.empty_weight", "backbone.stem.conv1.weight"])
def test_a_look_at_a_file_reports_what_loading_it_does(small_config, real_model, tmp_path, dropped):
    path = tmp_path / "weights.pth"
    state = {k: v for k, v in real_model.state_dict().items() if k != dropped}
    torch.save({"model": state}, path)
    seen = S4MCheckpointer(model_blueprint(small_config())).inspect(str(path))
    loading = S4MCheckpointer(real_model)
    loading.load(str(path))
    assert seen == loading.last_report
    assert (dropped in seen.missing) == dropped.startswith("backbone")


SAM_FILES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a web page": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize("kind", SAM_FILES)
def test_a_damaged_sam_is_an_error_of_its_line(small_config, tmp_path, kind):
    path = tmp_path / "sam.pth"
    path.write_bytes(SAM_FILES[kind](TOYSCAPES_WEIGHTS.read_bytes()))
    blueprints, lines = blueprint_findings(small_config(S4M__SAM__CHECKPOINT=str(path)))
    found = by_item(lines)
    assert found["model"].status == "ok" and blueprints.sam is None
    assert "cannot be read" in str(found["SAM"].errors[0])


def test_a_sam_of_another_size_is_an_error(small_config, tmp_path):
    path = tmp_path / "sam.pth"
    state = torch.load(TOYSCAPES_WEIGHTS, weights_only=True)
    torch.save({k: v for k, v in state.items() if "blocks.5" not in k}, path)
    _, lines = blueprint_findings(small_config(S4M__SAM__CHECKPOINT=str(path)))
    assert "of another model" in str(by_item(lines)["SAM"].errors[0])


def test_a_sam_that_no_stage_uses_is_not_looked_at(small_config):
    off = {"S4M__DISTILL__ENABLED": False, "S4M__REFINE__ENABLED": False}
    cfg = small_config(S4M__SAM__CHECKPOINT="nowhere.pth", **off)
    blueprints, lines = blueprint_findings(cfg)
    assert blueprints.sam is None and by_item(lines)["SAM"].text == "not used"


def test_weights_and_teacher_have_a_line_each(small_config, real_model, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({"model": real_model.state_dict()}, path)
    model = model_blueprint(small_config())
    total = len(real_model.state_dict())

    lines = by_item(weight_findings(small_config(), model, STAGES, resume=False))
    assert "from scratch" in lines["first weights"].text
    assert lines["teacher"].text == "made by stage 1 of this run"

    cfg = small_config(MODEL__WEIGHTS=path, S4M__TEACHER_WEIGHTS=path)
    lines = by_item(weight_findings(cfg, model, STAGES, resume=False))
    for item in ("first weights", "teacher"):
        assert lines[item].status == "ok"
        assert lines[item].text == f"{path}: {total} of the model's {total} tensors"


def test_unfit_weights_and_teacher_are_both_named_with_the_key_to_change(
    small_config, real_model, tmp_path
):
    path = str(tmp_path / "weights.pth")
    torch.save({"model": real_model.state_dict()}, path)
    cfg = small_config(
        MODEL__WEIGHTS="nowhere.pth",
        S4M__TEACHER_WEIGHTS=path,
        MODEL__MASK_FORMER__NUM_OBJECT_QUERIES=9,
    )
    lines = by_item(weight_findings(cfg, model_blueprint(cfg), STAGES, resume=False))
    assert "'nowhere.pth': no such file" in str(lines["first weights"].errors[0])
    assert "set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 8" in str(lines["teacher"].errors[0])


def test_a_backbone_is_no_teacher(small_config, real_model, tmp_path):
    path = str(tmp_path / "backbone.pth")
    state = real_model.state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith("backbone.")}, path)
    cfg = small_config(MODEL__WEIGHTS=path, S4M__TEACHER_WEIGHTS=path)
    lines = by_item(weight_findings(cfg, model_blueprint(cfg), STAGES, resume=False))
    assert lines["first weights"].status == "ok"
    assert "A whole model is needed" in str(lines["teacher"].errors[0])


def test_stages_that_continue_need_no_other_weights(small_config, tmp_path):
    for stage in ("teacher", "student"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "last_checkpoint").write_text("model_0000001.pth")
    cfg = small_config(MODEL__WEIGHTS="nowhere.pth")
    model = model_blueprint(cfg)
    assert by_item(weight_findings(cfg, model, STAGES, resume=False))["first weights"].errors
    assert not by_item(weight_findings(cfg, model, STAGES, resume=True))["first weights"].errors
