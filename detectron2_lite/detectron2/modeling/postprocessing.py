"""From the network's resolution to the output's."""

from torch import Tensor
from torch.nn import functional as F


def sem_seg_postprocess(
    result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> Tensor:
    """Crop the padding off (C, H, W) predictions and resize them bilinearly.

    img_size: (H, W) of the content. Returns (C, output_height, output_width).
    """
    content = result[None, :, : img_size[0], : img_size[1]]
    size = (output_height, output_width)
    return F.interpolate(content, size=size, mode="bilinear", align_corners=False)[0]
