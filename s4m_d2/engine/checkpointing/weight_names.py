"""Finds a model's weights in a file, renames them, and compares them with the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from s4m_d2.errors import WeightsError, first_names
from s4m_d2.modeling.timm_backbone import ADDED_LAYERS, BACKBONE, to_own_names
from s4m_d2.pretrained import renamed

#: The two models of a semi-supervised run, and the prefixes of their names in the checkpoints of
#: Guided Distillation and S4M.
BRANCHES = {"student": "modelStudent.", "teacher": "modelTeacher."}
MIN_BACKBONE_SHARE = 0.9  # a file with less of the backbone is of another backbone

_WRAPPER = "module."  # DistributedDataParallel's
_MODEL_ENTRIES = ("model", "model_state", "state_dict")  # the last two: pycls and many others
_EXPECTED = f"expected a dictionary of tensors, or one under {', '.join(_MODEL_ENTRIES)}"
_FLAGS = ("matching_heuristics", "__author__")
_INDEX = re.compile(r"\.\d+(?=\.|$)")  # of a layer
_PIXEL_DECODER, _PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
_CLASS_ROWS = (f"{_PREDICTOR}class_embed.weight", f"{_PREDICTOR}class_embed.bias")
_TORCHVISION_RESNET = "layer1.0.conv1.weight"
_TORCHVISION_NAMES = {
    r"^(conv1|bn1)\.": r"stem.\1.",
    r"^layer(\d)\.": lambda match: f"res{int(match[1]) + 1}.",
    r"\bbn(\d)\.": r"conv\1.norm.",
    r"\bdownsample\.0\.": "shortcut.",
    r"\bdownsample\.1\.": "shortcut.norm.",
}

# Values that the config sets; published files may lack them.
_EMPTY_WEIGHT = "criterion.empty_weight"  # a weight for each class
_SET_BY_CONFIG = ("pixel_mean", "pixel_std", _EMPTY_WEIGHT)
_COUNTER = "num_batches_tracked"  # of batch norms; it has no effect
_STATISTICS = ("running_mean", "running_var", _COUNTER)
ClassLists = tuple[Sequence[str], Sequence[str]]
_REMEDY = "Use the config that the file was trained with, or weights that fit this config."


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a file. Names are the model's, except in ``unexpected``."""

    path: str
    matched: list[str]  #: loaded
    missing: list[str]  #: in the model, not in the file
    unexpected: list[str]  #: in the file, not in the model
    mismatched: list[str]  #: not loaded; with the shapes in the file and in the model
    overridden: list[str]  #: loaded, but the config has another value
    branch: str | None  #: "student" or "teacher", if the file says so
    new_classes: list[str]  #: of the model alone, if those of both are known
    gone_classes: list[str]  #: of the file alone

    def __str__(self) -> str:
        whose = f"the {self.branch} of " if self.branch else ""
        kinds = {
            "missing (kept at init": self.missing,
            "of another shape (kept at init": self.mismatched,
            "unexpected (ignored": self.unexpected,
            "not as in the config (the file's are used": self.overridden,
            "new classes (kept at init": self.new_classes,
            "classes of the file alone (ignored": self.gone_classes,
        }
        parts = [f"{len(n)} {what}: {first_names(n)})" for what, n in kinds.items() if n]
        return ", ".join([f"{whose}{self.path}: {len(self.matched)} weights loaded", *parts])

    @property
    def is_surprising(self) -> bool:
        """True if something did not fit, except heads that a bare backbone's file lacks."""
        bare = all(name.startswith(BACKBONE) for name in self.matched)
        missing = [name for name in self.missing if not bare or _is_backbone_weight(name)]
        parts = {name.partition(".")[0] for name in (*self.matched, *self.missing)}
        unused = [name for name in self.unexpected if name.partition(".")[0] in parts]
        return bool(self.mismatched or missing or unused or self.overridden or self.new_classes)


def model_weights(
    content: Mapping[str, Any], branch: str, path: str
) -> tuple[dict[str, Tensor], str | None]:
    """Find the weights of ``branch``, "student" or "teacher", in the content of a file.

    A file with one model is used for either; with both are ours, and those with BRANCHES' prefixes.

    Returns name → tensor, without prefixes of wrappers and branches, old names replaced; which of
    the two models it is, None if the file does not say. WeightsError: there are none, or an entry
    is not a tensor.
    """
    teacher = _teacher_entry(content)
    if teacher is not None and branch == "teacher":
        state: Any = teacher
    else:
        entries = (content[key] for key in _MODEL_ENTRIES if isinstance(content.get(key), Mapping))
        bare = {key: value for key, value in content.items() if key not in _FLAGS}
        state = next(entries, content.get("blobs", bare))
    state, found = _of_branch(_unwrapped(_tensors(state, path)), branch)
    if found is None and teacher is not None:
        found = branch
    if _TORCHVISION_RESNET in state:
        state = {renamed(name, _TORCHVISION_NAMES): value for name, value in state.items()}
    dotted = any("." in name for name in state)
    if content.get("__author__") == "Caffe2" or not dotted and any(n[-2:] == "_w" for n in state):
        state = {k: v for k, v in state.items() if not k.endswith("_momentum")}
        state, _ = convert_c2_detectron_names(state)
    return _current_names(state), found


def _teacher_entry(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The EMA teacher in our files: a separate entry, or the state of its hook."""
    state: Any = content
    keys = ("trainer", "hooks", "EMATeacherHook", "teacher")
    for key in ("teacher",) if content.get("teacher") is not None else keys:
        state = state.get(key) if isinstance(state, Mapping) else None
    is_nested = isinstance(state, Mapping) and isinstance(state.get("model"), Mapping)
    return state["model"] if is_nested else state


def _tensors(state: Any, path: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"Weights '{path}' hold no model: {_EXPECTED}.")
    tensors = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray | np.generic):
            value = torch.from_numpy(np.array(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"{name!r} with a {type(value).__name__}"
            raise WeightsError(f"Weights '{path}': found {found}; {_EXPECTED}.")
        tensors[name] = value
    return tensors


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove DDP's prefix, if all names have it."""
    wrapped = all(name.startswith(_WRAPPER) for name in state)
    return {k.removeprefix(_WRAPPER): v for k, v in state.items()} if wrapped else state


def _of_branch(state: dict[str, Tensor], branch: str) -> tuple[dict[str, Tensor], str | None]:
    """Select the weights of one of two models, or of the only one; also returns which it is.

    A file with prefixes for the teacher only has the student's names without prefix.
    """
    models = {
        name: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for name, prefix in BRANCHES.items()
    }
    rest = {k: v for k, v in state.items() if not k.startswith(tuple(BRANCHES.values()))}
    if models[branch]:
        return rest | _unwrapped(models[branch]), branch
    for name, model in models.items():
        if model:
            return _unwrapped(model) | rest, branch if model.keys() <= rest.keys() else name
    return state, None


def _current_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to Mask2Former's current names: of the queries, and of the pixel decoder.

    Early files have the pixel decoder directly under the head. In files without version, such as
    converted ones that were saved again, Mask2Former has moved it one level too deep.
    """
    nested = any(name.startswith(_PIXEL_DECODER) for name in state)
    flat = f"{_PREDICTOR}query_embed.weight" in state and not nested
    current = {}
    for name, value in state.items():
        name = name.replace("static_query", "query_feat")
        if flat and not name.startswith(_PREDICTOR):
            name = re.sub("^sem_seg_head\\.", _PIXEL_DECODER, name)
        current[re.sub(f"^{_PIXEL_DECODER}pixel_decoder\\.", _PIXEL_DECODER, name)] = value
    return current


def _by_class(
    state: dict[str, Tensor], own: Mapping[str, Tensor], before: list[str], now: list[str]
) -> tuple[list[str], list[str]]:
    """Put class logits' weights into the model's order; returns new classes and those gone."""
    if not before or not now or before == now:
        return [], []
    rows = [(now.index(name), before.index(name)) for name in now if name in before]
    rows.append((len(now), len(before)))  # of "no object"
    for name in _CLASS_ROWS:
        if name in state and len(state[name]) == len(before) + 1:
            moved = own[name].clone()
            for row, old in rows:
                moved[row] = state[name][old]
            state[name] = moved
    state.pop(_EMPTY_WEIGHT, None)
    return [n for n in now if n not in before], [n for n in before if n not in now]


def fit(
    own: Mapping[str, Tensor],
    content: Mapping[str, Any],
    branch: str,
    path: str,
    require: bool,
    classes: ClassLists = ((), ()),
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Compare a file's weights with a model's, and refuse a file that is not of this model.

    Args:
        own: the model's state; on the meta device nothing of it is ``overridden``.
        content, branch, path: of the file, see :func:`model_weights`.
        require: the file must contain the whole model; otherwise heads may be missing.
        classes: class names of the file and of the model. If both are known, class logits are
            matched by name, and those of new classes keep the model's initial values.

    Returns the report, and the weights to load, by the model's names. WeightsError names the first
    weights that do not fit.
    """
    weights, found = model_weights(content, branch, path)
    state = to_own_names(weights, own)
    if not any(name.startswith(BACKBONE) for name in state):
        state = _inside_backbone(state, own)
    new, gone = _by_class(state, own, *map(list, classes))
    shapes = {n: (tuple(state[n].shape), tuple(own[n].shape)) for n in own if n in state}
    fitting = {n: state[n] for n, (in_file, in_model) in shapes.items() if in_file == in_model}
    missing = [n for n in own if n not in state and n not in _SET_BY_CONFIG]
    valued = [n for n in _SET_BY_CONFIG if n in fitting and not own[n].is_meta]
    report = LoadReport(
        path=path,
        matched=[*fitting],
        missing=[n for n in missing if not n.endswith(_COUNTER)],
        unexpected=[n for n in state if n not in own and not n.endswith(_COUNTER)],
        mismatched=[
            f"{name} is {in_file} in the file and {in_model} in the model"
            for name, (in_file, in_model) in shapes.items()
            if name not in fitting
        ],
        overridden=[n for n in valued if not fitting[n].to(own[n]).equal(own[n])],
        branch=found,
        new_classes=new,
        gone_classes=gone,
    )
    _refuse_unfit(report, own, require)
    return report, fitting


def _inside_backbone(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a bare backbone's weights to the model's names."""
    ends = [name for name in own if name.startswith(BACKBONE)]
    prefixes = {e.removesuffix(key) for key in state for e in ends if e.endswith(f".{key}")}
    best = max(prefixes, key=lambda prefix: sum(prefix + key in own for key in state), default="")
    return {best + key if best + key in own else key: value for key, value in state.items()}


def _refuse_unfit(report: LoadReport, own: Mapping[str, Tensor], require: bool) -> None:
    heads = tuple({f"{name.partition('.')[0]}." for name in own} - {BACKBONE})
    patterns = {_INDEX.sub(".#", name) for name in own}  # also of further layers
    patterns |= {name.removeprefix(BACKBONE) for name in patterns}
    beyond = [
        name
        for name in report.unexpected
        if _INDEX.sub(".#", name) in patterns and (require or not name.startswith(heads))
    ]
    backbone = [name for name in own if _is_backbone_weight(name)]
    absent = [name for name in backbone if name in report.missing]
    is_other = 0 < len(backbone) - len(absent) < MIN_BACKBONE_SHARE * len(backbone)
    problems = {
        "are of another architecture": [
            shapes for shapes in report.mismatched if require or shapes.startswith(BACKBONE)
        ],
        f"hold nothing of this model ({first_names(list(own))}), but": (
            [] if report.matched else report.unexpected or ["no weights"]
        ),
        f"lack {len(report.missing)} of the model's {len(own)} weights, all of which are needed": (
            report.missing if require else ()
        ),
        "have more layers than the model": beyond,
        f"lack {len(absent)} of the backbone's {len(backbone)} weights": absent if is_other else [],
    }
    for problem, names in problems.items():
        if names:
            shown = first_names(names)
            raise WeightsError(f"Weights '{report.path}' {problem}: {shown}. {_REMEDY}")


def _is_backbone_weight(name: str) -> bool:
    """True for weights that a backbone's file should have: no statistics, no added layers."""
    new = name.startswith(ADDED_LAYERS) or name.endswith(_STATISTICS)
    return name.startswith(BACKBONE) and not new
