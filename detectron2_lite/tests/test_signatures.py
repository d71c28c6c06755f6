"""Every public name of detectron2 lite is one of Detectron2's, and a call of it means the same.

`data/signatures.json` holds Detectron2's parameters of everything that lite offers. Lite may lack
parameters, but only those listed here, and its positional ones have Detectron2's places.
"""

import functools
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest

HERE = Path(__file__).parent
FILE = HERE / "data" / "signatures.json"
IS_LITE = detectron2.__version__.endswith("+lite")

# Parameters of Detectron2 that lite lacks
MISSING = {
    "detectron2.data.build.build_batch_data_loader":
        "single_gpu_batch_size prefetch_factor persistent_workers pin_memory",  # in **kwargs
    "detectron2.data.build.build_detection_train_loader": "num_workers collate_fn",  # in **kwargs
    "detectron2.data.build.get_detection_dataset_dicts":
        "min_keypoints proposal_files check_consistency",
    "detectron2.data.dataset_mapper.DatasetMapper":
        "use_keypoint keypoint_hflip_indices precomputed_proposal_topk",
    "detectron2.data.datasets.cityscapes.load_cityscapes_instances": "to_polygons",
    "detectron2.data.datasets.coco.load_coco_json": "extra_annotation_keys",
    "detectron2.data.detection_utils.filter_empty_instances": "by_box by_mask return_mask",
    "detectron2.data.detection_utils.transform_instance_annotations": "keypoint_hflip_indices",
    "detectron2.engine.defaults.DefaultTrainer.test": "evaluators",
    "detectron2.engine.defaults.create_ddp_model": "fp16_compression",
    "detectron2.engine.train_loop.AMPTrainer":
        "gather_metric_period zero_grad_before_forward log_grad_scaler async_write_metrics",
    "detectron2.engine.train_loop.SimpleTrainer":
        "gather_metric_period zero_grad_before_forward async_write_metrics",
    "detectron2.engine.train_loop.AMPTrainer.write_metrics": "prefix",
    "detectron2.engine.train_loop.SimpleTrainer.write_metrics": "prefix",
    "detectron2.evaluation.coco_evaluation.COCOEvaluator":
        "distributed kpt_oks_sigmas allow_cached_coco",
    "detectron2.evaluation.coco_evaluation.COCOEvaluator.evaluate": "img_ids",
    "detectron2.evaluation.evaluator.inference_on_dataset": "callbacks",
    "detectron2.modeling.backbone.resnet.ResNet": "num_classes",
    "detectron2.utils.comm.all_gather": "group",
    "detectron2.utils.comm.gather": "group",
    "detectron2.utils.logger.setup_logger": "abbrev_name enable_propagation configure_stdout",
}  # fmt: skip
# Parameters that lite names and Detectron2 takes in *args and **kwargs, or leaves to subclasses
NAMED = {
    "detectron2.layers.wrappers.Conv2d": "norm activation",
    "detectron2.modeling.backbone.backbone.Backbone": "args kwargs",
    "detectron2.modeling.backbone.backbone.Backbone.forward": "x",
    "detectron2.modeling.backbone.resnet.ResNet.make_stage": "stride_per_block",
}
# Parameters with another default
SAFER = {"detectron2.config.config.CfgNode.merge_from_file": "allow_unsafe"}
# Where Detectron2 has what lite keeps in fewer files
MOVED = {
    "detectron2.layers.blocks.ShapeSpec": "detectron2.layers.ShapeSpec",
    "detectron2.modeling.backbone.backbone.build_backbone": "detectron2.modeling.build_backbone",
    "detectron2.projects.deeplab.WarmupPolyLR":
        "detectron2.projects.deeplab.lr_scheduler.WarmupPolyLR",
}  # fmt: skip


def public_names():
    """Dotted names of the functions, classes, methods and properties that lite defines, and
    "package:name" of what its packages hand on.
    """
    for module in pkgutil.walk_packages(detectron2.__path__, "detectron2."):
        for key, value in vars(importlib.import_module(module.name)).items():
            made_in = (getattr(value, "__module__", None), type(value).__module__)
            if module.ispkg and str(made_in[0]).startswith("detectron2.") and key[0] != "_":
                yield f"{module.name}:{key}"
            if module.name not in made_in or key[0] == "_":
                continue
            if callable(value):
                yield f"{module.name}.{key}"
            owner = value if inspect.isclass(value) else type(value)  # such as a catalog's class
            for member in dir(owner) if owner.__module__ == module.name else ():
                static = inspect.getattr_static(owner, member)
                function = getattr(static, "fget", getattr(static, "__func__", static))
                ours = str(getattr(function, "__module__", "")).startswith("detectron2.")
                if ours and not member.startswith("_"):
                    yield f"{module.name}.{key}.{member}"


def find(name):
    """The object of a dotted name, without binding methods."""
    for lite, moved in MOVED.items():
        if not IS_LITE and (name + ".").startswith(lite + "."):
            name = name.replace(lite, moved)
    parts = name.replace(":", ".").split(".")
    count = next(n for n in range(len(parts) - 1, 0, -1) if is_module(".".join(parts[:n])))
    found = importlib.import_module(".".join(parts[:count]))
    for part in parts[count:]:
        owner = found if inspect.isclass(found) or inspect.ismodule(found) else type(found)
        found = inspect.getattr_static(owner, part)
    return found


@functools.cache
def is_module(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def signature(found):
    """Its kind, then texts such as "a", "b=1", "*args", "* only=None" (by keyword only)."""
    if isinstance(found, property) or not callable(getattr(found, "__func__", found)):
        return [type(found).__name__]
    function = found.__init__ if inspect.isclass(found) else getattr(found, "__func__", found)
    texts = [
        ("* " if p.kind is p.KEYWORD_ONLY else "") + str(p.replace(annotation=p.empty))
        for p in inspect.signature(function).parameters.values()
    ]
    return ["class" if inspect.isclass(found) else type(found).__name__, *texts]


def record():
    """Write Detectron2's signatures of lite's names, which another process lists."""
    path = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, __file__]
    names = json.loads(subprocess.run(command, env=path, capture_output=True, check=True).stdout)
    lines = [
        f"{json.dumps(name)}: {json.dumps([] if ':' in name else signature(find(name)))}"
        for name in names
        if ":" not in name or find(name)
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def module_of(name):
    """The part of Detectron2 that a name belongs to: "detectron2.data"."""
    return ".".join(name.split(".")[:2])


def listed(table, name):
    return set(table.get(name, "").split())


def name_of(parameter):
    return parameter.lstrip("* ").partition("=")[0]


def by_name(parameters):
    return {name_of(p): p.removeprefix("* ") for p in parameters}


if __name__ == "__main__":
    print(json.dumps(sorted(public_names())))
elif os.environ.get("DETECTRON2_RECORD"):
    record()
SIGNATURES = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.skipif(not IS_LITE, reason="lists the names of detectron2 lite")
def test_every_name_of_lite_is_recorded():
    assert sorted(public_names()) == sorted(SIGNATURES)
    for table in (MISSING, NAMED, SAFER):
        assert table.keys() <= SIGNATURES.keys()


def test_packages_hand_on_the_same_names():
    for name in (name for name in SIGNATURES if ":" in name):
        find(name)  # or an AttributeError


@pytest.mark.parametrize(
    "module", sorted({module_of(name) for name in SIGNATURES if ":" not in name})
)
def test_a_call_means_what_it_does_in_detectron2(module):
    for name in (name for name in SIGNATURES if ":" not in name and module_of(name) == module):
        kind, *theirs = SIGNATURES[name]
        own_kind, *ours = signature(find(name))
        assert own_kind == kind, name
        if not IS_LITE:
            assert ours == theirs, name
            continue
        known, named = by_name(theirs), listed(NAMED, name)
        assert known.keys() - by_name(ours).keys() == listed(MISSING, name), name
        for place, parameter in enumerate(ours):
            if name_of(parameter) in named:
                assert name_of(parameter) not in known, name
            elif name_of(parameter) in listed(SAFER, name):
                assert name_of(theirs[place]) == name_of(parameter), name
            elif parameter.startswith(("* ", "**")):
                assert known[name_of(parameter)] == parameter.removeprefix("* "), name
            else:
                assert theirs[place] == parameter, name
