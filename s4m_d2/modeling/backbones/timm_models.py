"""timm's models by name, for images of any size."""

from __future__ import annotations

import difflib
import inspect
from types import ModuleType

import torch
from torch import nn

from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.pretrained import import_timm

NUM_SUGGESTIONS = 5

# Options of some models that allow images of any size. With them Swin's windows always have their
# full size, shifted in every second block.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False, "always_partition": True}
_SWITCHES = ("dynamic_img_size", "strict_img_size")


def create_net(
    name: str, *, pretrained: bool, in_channels: int = 3, drop_path: float = 0.0, norm: str = "BN"
) -> nn.Module:
    """Create a timm model without its classifier.

    Args:
        name: "architecture" or "architecture.tag", the tag naming timm's weights.
        pretrained: load timm's weights, from the network or from the cache of an earlier load.
        in_channels: of the images.
        drop_path: rate of stochastic depth at the last block.
        norm: "BN": unchanged batch norms; "FrozenBN" and "SyncBN" replace them.

    Raises:
        ConfigError: timm is missing, or has no such model.
        WeightsError: the pre-trained weights cannot be fetched.
    """
    timm = import_timm('MODEL.BACKBONE.NAME "build_timm_backbone"')
    _check_name(timm, name, pretrained)
    options = _options(timm, name, drop_path)
    try:
        net = timm.create_model(
            name, pretrained=pretrained, num_classes=0, in_chans=in_channels, **options
        )
    except OSError as error:
        raise WeightsError(
            f"MODEL.TIMM.PRETRAINED: the weights of {name!r} cannot be fetched "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}). Run once with a network, "
            "so that they are in the cache, copy that cache (HF_HOME) here, or set "
            "MODEL.TIMM.PRETRAINED False and give a file of this model's weights as MODEL.WEIGHTS."
        ) from error
    from s4m_d2.modeling.backbones.swin_windows import pad_before_shift  # imports timm

    pad_before_shift(net)
    return _convert_norms(net, norm)


def _check_name(timm: ModuleType, name: str, pretrained: bool) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know; "
            f"{_suggest(architecture, timm.list_models())}."
        )
    names = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in names:
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}; timm {timm.__version__} has no weights {tag!r} of "
            f"{architecture!r}, {_suggest(name, names)}."
        )
    if pretrained and not names:
        raise ConfigError(
            f"MODEL.TIMM.PRETRAINED: timm {timm.__version__} has no weights of {name!r}. Choose "
            "another MODEL.TIMM.NAME, or set MODEL.TIMM.PRETRAINED False."
        )


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=NUM_SUGGESTIONS, cutoff=0.0)
    return f"the closest names are {', '.join(close)}" if close else "and none at all"


def _options(timm: ModuleType, name: str, drop_path: float) -> dict[str, bool | float]:
    """Those of our options that the model's class accepts."""
    with torch.device("meta"):  # builds the model without memory, to learn its class
        net = timm.create_model(name)
    accepted = inspect.signature(type(net)).parameters
    fixed = net.pretrained_cfg["fixed_input_size"]
    if fixed and not any(switch in accepted for switch in _SWITCHES):
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}, which takes images of one size only; choose a model "
            "that takes any, such as a ResNet, a ConvNeXt, a Swin or a vit_*."
        )
    options: dict[str, bool | float] = {
        key: value for key, value in _ANY_SIZE.items() if key in accepted
    }
    if not 0 <= drop_path < 1:
        raise ConfigError(f"MODEL.TIMM.DROP_PATH is {drop_path}; expected at least 0 and below 1.")
    if "drop_path_rate" in accepted:
        options["drop_path_rate"] = drop_path  # 0 too: the default of some models is higher
    elif drop_path:
        raise ConfigError(
            f"MODEL.TIMM.DROP_PATH is {drop_path}, but {name!r} has no stochastic depth: set it "
            "to 0."
        )
    return options


def _convert_norms(net: nn.Module, norm: str) -> nn.Module:
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    converters = {"FrozenBN": freeze_batch_norm_2d, "SyncBN": convert_sync_batchnorm}
    if norm not in ("BN", *converters):
        names = ", ".join(("BN", *converters))
        raise ConfigError(f"MODEL.TIMM.NORM is {norm!r}; choose one of {names}.")
    return converters[norm](net) if norm in converters else net
