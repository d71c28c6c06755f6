"""A whole model as an ONNX file: from an image of any size to its instances.

| name | shape, dtype | |
|---|---|---|
| ``image`` (input) | (H, W, 3) uint8 | RGB, resized as in evaluation; H and W are dynamic |
| ``boxes`` | (n, 4) float32 | x0, y0, x1, y1 in pixels of the input: extents of the masks |
| ``scores`` | (n,) float32 | class probability times mean mask probability inside the mask |
| ``classes`` | (n,) int64 | indices of the names in the file's metadata |
| ``masks`` | (n, H, W) bool | in the input's frame |

Normalization, padding, and the selection of the n best pairs of query and class are in the file;
the order is that of the model's own result. The packages onnx and onnxruntime are imported
only where a file is written.
"""

import io
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4m_d2.errors import ConfigError
from s4m_d2.modeling.inference import best_pairs
from s4m_d2.modeling.pixel_decoder import resize

OPSET = 17  # from 16 on it has grid_sample
OUTPUTS = ("boxes", "scores", "classes", "masks")
TOLERANCE = 1e-3  # of a score
_TRACED, _CHECKED = (200, 280), (157, 333)  # sizes of random images
_EPS = 1e-6


class _Instances(nn.Module):
    """The best instances of one image, see the module, by operators that ONNX has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, (height, width) = self.model, image.shape[:2]
        pixels = image.permute(2, 0, 1).float()
        pixels = pixels if model.input_format == "RGB" else pixels.flip(0)
        side = max(1, model.size_divisibility)
        padding = (0, -width % side, 0, -height % side)
        padded = F.pad((pixels - model.pixel_mean) / model.pixel_std, padding)[None]
        found = model.sem_seg_head(model.backbone(padded), aux_outputs=False)
        scores, queries, classes = best_pairs(found["pred_logits"][0], model.max_instances)
        logits = resize(found["pred_masks"][:, queries], padded.shape[-2:])
        logits = logits[0, :, :height, :width]
        masks = logits > 0
        inside = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + _EPS)
        left, right = _extent(masks.any(1))
        top, bottom = _extent(masks.any(2))
        boxes = torch.stack([left, top, right, bottom], dim=1).float()
        return boxes, scores * inside, classes, masks


def _extent(inside: Tensor) -> tuple[Tensor, Tensor]:
    """First index, and one more than the last, of each row's True; 0 and 0 without any."""
    length = inside.shape[1]
    places = torch.arange(length, device=inside.device)
    first = torch.where(inside, places, length).amin(1)
    return torch.where(inside.any(1), first, 0), torch.where(inside, places + 1, 0).amax(1)


def write_onnx(model: Any, path: str, names: Sequence[str], edges: tuple[int, int]) -> str:
    """Write the model, and compare the file with it if onnxruntime is installed.

    Args:
        model: an :class:`~s4m_d2.modeling.meta_arch.S4MMaskFormer` in eval mode, on the CPU.
        path: of the file, which has all weights (at most 2 GB).
        names: of the classes, kept as "classes" in the metadata, a JSON list.
        edges: shortest and longest edge to which images are resized, px; in the metadata.

    Returns what the comparison found. ConfigError: onnx is missing, PyTorch cannot export this
    model, or the file gives other instances.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigError("--format onnx needs packages: pip install onnx onnxruntime.") from error
    traced: Any = io.BytesIO()
    sides = {0: "height", 1: "width"}
    try:
        with warnings.catch_warnings():  # of comparisons of sizes, which hold for any image
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Instances(model).eval(),
                (_random_image(_TRACED),),
                traced,
                input_names=["image"],
                output_names=list(OUTPUTS),
                dynamic_axes={"image": sides, "masks": {1: "height", 2: "width"}},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # of all kinds, of a layer that ONNX cannot express
        raise ConfigError(
            f"--format onnx: PyTorch cannot export this model: {str(error).splitlines()[0]}"
        ) from error
    content = onnx.load_model_from_string(traced.getvalue())
    properties = {"classes": list(names), "resize": edges}
    onnx.helper.set_model_props(content, {k: json.dumps(v) for k, v in properties.items()})
    onnx.save(content, path)
    return _compared(model, path)


def _random_image(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def _compared(model: Any, path: str) -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not checked: pip install onnxruntime"
    image = _random_image(_CHECKED)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, scores, classes, masks = session.run(OUTPUTS, {"image": image.numpy()})
    view = image.permute(2, 0, 1)
    [ours] = model([{"image": view if model.input_format == "RGB" else view.flip(0)}])
    ours = ours["instances"]
    of_scores = np.abs(scores - ours.scores.numpy())
    of_masks = (masks != ours.pred_masks.numpy()).mean()
    # The median: rounding can move a cell of a query's attention (docs/method.md, Rounding).
    if not np.median(of_scores) <= TOLERANCE:
        raise ConfigError(
            f"--format onnx: onnxruntime gives other scores for this model (they differ by "
            f"{of_scores.max():.2g}), so it is not written."
        )
    return f"{of_scores.max():.1e} (scores), {100 * of_masks:.2g} % of the masks' pixels"
