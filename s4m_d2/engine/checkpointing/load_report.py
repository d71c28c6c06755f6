"""What became of a file's weights, and which keys to change where they do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from s4m_d2.errors import WeightsError
from s4m_d2.modeling.backbones.weight_names import ADDED_LAYERS

BACKBONE_PREFIX = "backbone."
MIN_BACKBONE_SHARE = 0.9  # with less of the backbone in it, a file is of another backbone
SHOWN_NAMES = 5

# What the config has set already; published files may lack them.
_SET_BY_CONFIG = {
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "criterion.empty_weight": "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT",
}
_COUNTER = "num_batches_tracked"  # counts batches of a norm that averages; nothing depends on it
_STATISTICS = ("running_mean", "running_var", _COUNTER)

# (name of a weight, dimension of its shape, key that sets it, shape minus value of the key)
_SIZES = (
    (r"predictor\.class_embed\.", 0, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1),
    (r"predictor\.query_embed\.weight$", 0, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 0),
    (r"predictor\.query_embed\.weight$", 1, "MODEL.MASK_FORMER.HIDDEN_DIM", 0),
    (r"predictor\.transformer_ffn_layers\.0\.linear1\.weight$", 0,
     "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 0),
    (r"pixel_decoder\.mask_features\.weight$", 0, "MODEL.SEM_SEG_HEAD.MASK_DIM", 0),
    (r"pixel_decoder\.mask_features\.weight$", 1, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 0),
)  # fmt: skip
# (name with the index of a layer, key that sets the number of layers, value minus highest index)
_DEPTHS = (
    (r"predictor\.transformer_ffn_layers\.(\d+)\.", "MODEL.MASK_FORMER.DEC_LAYERS", 2),
    (
        r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
        1,
    ),
)

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's weights. All names are the model's, but for ``unexpected``.

    Attributes:
        path: the file.
        matched: loaded.
        missing: of the model, not in the file.
        unexpected: of the file, not in the model.
        mismatched: (name, shape in the file, shape in the model), not loaded.
        deeper: those of ``unexpected`` that belong to layers beyond the model's last.
        overridden: those of ``matched`` whose value replaces another one that the config had set.
        branch: "student" or "teacher" if the file names the model so, else None.
    """

    path: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    deeper: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()
    branch: str | None = None

    def __str__(self) -> str:
        whose = f" ({self.branch})" if self.branch else ""
        parts = [f"{len(self.matched)} parameters loaded from {self.path}{whose}"]
        keys = [f"{name} ({_SET_BY_CONFIG[name]})" for name in self.overridden]
        parts += [
            f"{len(names)} {what} ({first_names(names)})"
            for what, names in (
                ("not in the file, left at their initial values", self.missing),
                ("of another shape, left at their initial values", self._shapes()),
                ("of the file unused", self.unexpected),
                ("replace other values of the config", keys),
            )
            if names
        ]
        return "; ".join(parts)

    def lists(self) -> Iterator[str]:
        """Every name that was not loaded, by what became of it, in lines for a log."""
        for what, names in (
            ("not in the file", self.missing),
            ("of another shape", self._shapes()),
            ("of the file unused", self.unexpected),
        ):
            if names:
                yield f"{what}: {', '.join(names)}"

    @property
    def is_surprising(self) -> bool:
        """Something did not fit, beyond a bare backbone that leaves the heads at their start."""
        bare = all(name.startswith(BACKBONE_PREFIX) for name in self.matched)
        missing = [name for name in self.missing if not bare or _is_backbone_weight(name)]
        parts = {name.partition(".")[0] for name in (*self.matched, *self.missing)}
        unused = [name for name in self.unexpected if name.partition(".")[0] in parts]
        return bool(self.mismatched or missing or unused or self.deeper or self.overridden)

    def _shapes(self) -> list[str]:
        return [_shape(entry) for entry in self.mismatched]


def compare(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    path: str,
    *,
    by_suffix: bool = False,
    branch: str | None = None,
) -> LoadReport:
    """Compare a model's state with a file's, whose names have been matched to the model's.

    Args:
        own, state: the model's and the file's. A model on the meta device has no values: none are
            then ``overridden``.
        path: of the file.
        by_suffix: names that the matching left alone because of their shapes may be the endings of
            the model's.
        branch: as in :class:`LoadReport`.
    """
    matched, missing, mismatched, used = list[str](), list[str](), list[Mismatch](), set[str]()
    for name, value in own.items():
        found = next((key for key in _candidates(name, by_suffix) if key in state), None)
        if found is None:
            if name not in _SET_BY_CONFIG and not name.endswith(_COUNTER):
                missing.append(name)
            continue
        used.add(found)
        if state[found].shape != value.shape:
            mismatched.append((name, tuple(state[found].shape), tuple(value.shape)))
        else:
            (matched if found == name else missing).append(name)
    unexpected = [key for key in state if key not in used and not key.endswith(_COUNTER)]
    overridden = [
        name
        for name in matched
        if name in _SET_BY_CONFIG
        and not own[name].is_meta
        and not state[name].to(own[name]).equal(own[name])
    ]
    return LoadReport(
        path=path,
        matched=tuple(matched),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        deeper=tuple(_beyond_last_layers(unexpected, own)),
        overridden=tuple(overridden),
        branch=branch,
    )


def _candidates(name: str, by_suffix: bool) -> list[str]:
    """The names under which a file may hold a parameter, the longest first."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words) if by_suffix else 1)]


def _beyond_last_layers(unexpected: Iterable[str], own: Iterable[str]) -> list[str]:
    """Names with an index that a list of layers has not in the model: ``res4.22.conv1.weight``."""
    layers = {layer for name in own for layer in _layers(name)}
    lists = {layer.rpartition(".")[0] for layer in layers}
    return [
        name
        for name in unexpected
        if any(
            layer not in layers and layer.rpartition(".")[0] in lists
            for layer in (*_layers(name), *_layers(BACKBONE_PREFIX + name))
        )
    ]


def _layers(name: str) -> Iterator[str]:
    """The beginnings of a name that end in an index."""
    words = name.split(".")
    return (".".join(words[: i + 1]) for i, word in enumerate(words) if i and word.isdigit())


def refuse_unfit(report: LoadReport, own: Mapping[str, Tensor], require: bool) -> None:
    """Refuse a file that is not of this model, or not enough of it.

    Args:
        report: of the comparison.
        own: the model's state.
        require: the file must hold the whole model. Without it, heads may start anew.

    Raises:
        WeightsError: names the first weights that do not fit and the keys to change.
    """
    path = report.path
    mismatched = [entry for entry in report.mismatched if require or _in_backbone(entry[0])]
    if mismatched:
        raise WeightsError(
            f"Weights '{path}' are of another architecture: "
            f"{first_names([_shape(entry) for entry in mismatched])}. {_advice(report)}"
        )
    if not report.matched:
        raise WeightsError(
            f"Weights '{path}' hold nothing of this model: it has {first_names(list(own))}; the "
            f"file has {first_names(report.unexpected)}. Give weights of this model."
        )
    if require and report.missing:
        raise WeightsError(
            f"Weights '{path}' lack {len(report.missing)} of the model's {len(own)} "
            f"parameters: {first_names(report.missing)}. A whole model is needed here, not a "
            f"backbone. {_advice(report, 'Use a checkpoint of a training run with this config.')}"
        )
    deeper = [name for name in report.deeper if require or not _is_head(name, own)]
    if deeper:
        raise WeightsError(
            f"Weights '{path}' have more layers than the model: {first_names(deeper)}. "
            f"{_advice(report)}"
        )
    missing = [name for name in report.missing if _is_backbone_weight(name)]
    backbone = [name for name in own if _is_backbone_weight(name)]
    present = len(backbone) - len(missing)
    if 0 < present < MIN_BACKBONE_SHARE * len(backbone):
        raise WeightsError(
            f"Weights '{path}' hold only {present} of the backbone's {len(backbone)} "
            f"parameters; {first_names(missing)} are missing. Set the backbone's depth "
            "(MODEL.RESNETS.DEPTH) to that of the file, or use weights that fit this config."
        )


_TRAINED_WITH = "Use the config that the file was trained with, or weights that fit this config."


def _advice(report: LoadReport, otherwise: str = _TRAINED_WITH) -> str:
    """Which keys make the config fit the file, where that can be told."""
    wanted = {}
    for name, in_file, in_model in report.mismatched:
        for pattern, dim, key, extra in _SIZES:
            fits = len(in_file) > dim and len(in_file) == len(in_model)
            if fits and in_file[dim] != in_model[dim] and re.search(pattern, name):
                wanted[key] = in_file[dim] - extra
    names = [*report.matched, *report.unexpected, *(name for name, *_ in report.mismatched)]
    unfit = [*report.missing, *report.deeper]
    for pattern, key, extra in _DEPTHS:
        indices = [int(found[1]) for found in (re.search(pattern, n) for n in names) if found]
        if indices and any(re.search(pattern, name) for name in unfit):
            wanted[key] = max(indices) + extra
    keys = " ".join(f"{key} {value}" for key, value in wanted.items())
    if any(_in_backbone(name) for name, *_ in report.mismatched) or any(
        name.startswith(("res", BACKBONE_PREFIX)) for name in report.deeper
    ):
        keys = f"{keys} and MODEL.RESNETS.DEPTH as in the file".removeprefix(" and ")
    if keys:
        return f"To fit the file, set {keys}; or use weights that fit this config."
    return otherwise


def _is_head(name: str, own: Iterable[str]) -> bool:
    """Whether a file's name is one of the model's parts other than the backbone."""
    part = name.partition(".")[0] + "."
    return part != BACKBONE_PREFIX and any(key.startswith(part) for key in own)


def _in_backbone(name: str) -> bool:
    return name.startswith(BACKBONE_PREFIX)


def _is_backbone_weight(name: str) -> bool:
    """Of a backbone that a file may hold: no statistics, and nothing that starts anew."""
    new = name.startswith(ADDED_LAYERS) or name.endswith(_STATISTICS)
    return _in_backbone(name) and not new


def _shape(entry: Mismatch) -> str:
    name, in_file, in_model = entry
    return f"{name} is {in_file} in the file and {in_model} in the model"


def first_names(names: Sequence[str]) -> str:
    """The first of the names, for a message."""
    more = ", …" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
