"""Files of weights are compared with models without values, as loading them would."""

import io

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine import S4MCheckpointer, TeacherTrainer, stage_config
from s4m_d2.engine.checks.resource_checks import (
    bytes_of,
    model_blueprint,
    model_finding,
    sam_blueprint,
    sam_bytes,
    sam_finding,
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


def test_what_a_constructor_refuses_is_an_error_of_its_line(small_config):
    for check, key, value in (
        (model_finding, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 0),
        (model_finding, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True),
        (model_finding, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "FPN"),
        (sam_finding, "S4M.SAM.MAX_IMAGES", -1),
        (sam_finding, "S4M.SAM.PRECISION", "half"),
        (sam_finding, "S4M.DISTILL.NAME", "none"),
        (sam_finding, "S4M.DISTILL.HUBER_DELTA", 0.0),
        (sam_finding, "S4M.REFINE.METHOD", "boxes"),
        (sam_finding, "S4M.REFINE.NUM_POINTS", 0),
    ):
        built, line = check(small_config(**{key.replace(".", "__"): value}))
        (error,) = line.errors
        assert built is None and key in str(error)


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


def half(content):
    return content[: len(content) // 2]


def fewer_blocks(content):
    state = torch.load(io.BytesIO(content), weights_only=True)
    torch.save({k: v for k, v in state.items() if "blocks.5" not in k}, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("change", [half, fewer_blocks, lambda content: b"<html>not found</html>"])
def test_a_damaged_or_other_sam_is_an_error_of_its_line(small_config, tmp_path, change):
    path = tmp_path / "sam.pth"
    path.write_bytes(change(TOYSCAPES_WEIGHTS.read_bytes()))
    sam, line = sam_finding(small_config(S4M__SAM__CHECKPOINT=str(path)))
    assert sam is None and str(path) in str(line.errors[0])


def test_a_sam_that_no_stage_uses_is_not_looked_at(small_config):
    off = {"S4M__DISTILL__ENABLED": False, "S4M__REFINE__ENABLED": False}
    sam, line = sam_finding(small_config(S4M__SAM__CHECKPOINT="nowhere.pth", **off))
    assert sam is None and line.status == "ok"


def test_weights_and_teacher_have_a_line_each(small_config, real_model, tmp_path):
    state, paths = real_model.state_dict(), {}
    parts = {"whole": state, "backbone": {k: v for k, v in state.items() if k[:3] == "bac"}}
    for name, part in parts.items():
        torch.save({"model": part}, path := str(tmp_path / f"{name}.pth"))
        paths[name] = path

    def lines(weights, teacher, **changes):
        cfg = small_config(MODEL__WEIGHTS=weights, S4M__TEACHER_WEIGHTS=teacher, **changes)
        found = by_item(weight_findings(cfg, model_blueprint(cfg), STAGES, resume=False))
        return found["first weights"], found["teacher"]

    assert [line.status for line in lines("", "")] == ["ok", "ok"]
    for line in lines(paths["whole"], paths["whole"]):
        assert line.status == "ok" and paths["whole"] in line.text and str(len(state)) in line.text
    first, teacher = lines(paths["backbone"], paths["backbone"])
    assert first.status == "ok" and paths["backbone"] in str(teacher.errors[0])
    queries = {"MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 9}
    first, teacher = lines("nowhere.pth", paths["whole"], **queries)
    assert "'nowhere.pth'" in str(first.errors[0])
    assert "query_feat.weight" in str(teacher.errors[0])
    first, _ = lines(paths["whole"], "", **queries)  # heads may start anew
    assert first.status == "warning"


def test_fine_tuning_needs_the_student_of_this_run(small_config, real_model, tmp_path):
    cfg = small_config(MODEL__WEIGHTS="nowhere.pth", S4M__FINETUNE__MAX_ITER=1)
    path = tmp_path / "run" / "student" / "model_final.pth"
    path.parent.mkdir(parents=True)
    for state, status in (({}, "error"), (real_model.state_dict(), "ok")):
        torch.save({"model": state}, path)
        found = by_item(weight_findings(cfg, model_blueprint(cfg), ["finetune"], resume=True))
        assert found["student"].status == status and found["first weights"].status == "ok"


def test_stages_that_continue_need_no_other_weights(small_config, tmp_path):
    for stage in ("teacher", "student"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "last_checkpoint").write_text("model_0000001.pth")
    cfg = small_config(MODEL__WEIGHTS="nowhere.pth")
    for model in (None, model_blueprint(cfg)):
        assert by_item(weight_findings(cfg, model, STAGES, resume=False))["first weights"].errors
        found = by_item(weight_findings(cfg, model, STAGES, resume=True))["first weights"]
        assert found.status == "ok"
