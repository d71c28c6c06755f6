"""Several batches in one forward pass: when that changes nothing, and their outputs again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a norm of the model, as it is now, mixes the images of a batch.

    True with a BatchNorm or SyncBN in training mode, or with one that keeps no averages. Layer
    and group norms, FrozenBN and a BatchNorm in eval mode treat each image for itself.
    """
    return any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def split_outputs(outputs: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The outputs of each part of a batch.

    Args:
        outputs: tensors (B, ...), and under "aux_outputs" a list of such dicts.
        sizes: the parts' numbers of images, B together.
    """
    # Not slices: the gradient of a split is one concatenation, those of slices are sums of
    # tensors of the whole batch's size.
    parts: list[dict[str, Any]] = [{} for _ in sizes]
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            split = value.split(list(sizes))
        else:
            of_layers = [split_outputs(layer, sizes) for layer in value]
            split = [[layer[index] for layer in of_layers] for index in range(len(sizes))]
        for part, piece in zip(parts, split, strict=True):
            part[name] = piece
    return parts
