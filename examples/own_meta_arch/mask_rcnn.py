"""Detectron2's Mask R-CNN, made trainable by S4MTrainer. Needs Detectron2 itself.

GeneralizedRCNN has ``forward``; S4MTrainable (s4m_d2/engine/labeling/protocol.py) asks for one
method more.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

STRIDE = 4  # pixels of the image for one of the masks: a quarter of the side, as in Mask2Former
SMALLEST = 1e-6  # probability; its logarithm stands for "certainly not"


@META_ARCH_REGISTRY.register()
class TeacherStudentRCNN(GeneralizedRCNN):
    """Mask R-CNN whose detections are the queries: a box after NMS with its class and mask."""

    def predict_queries(self, batched_inputs):
        """For each image N detections: logits [(N, K + 1)] and masks [(N, h, w)]."""
        image_sizes = [tuple(sample["image"].shape[-2:]) for sample in batched_inputs]
        height, width = map(max, zip(*image_sizes, strict=True))
        padded_size = (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
        detections = self.inference(batched_inputs, do_postprocess=False)
        num_classes = self.roi_heads.num_classes
        return {
            "pred_logits": [
                class_logits(found.scores, found.pred_classes, num_classes) for found in detections
            ],
            "pred_masks": [
                paste_mask_logits(found.pred_masks, found.pred_boxes.tensor, padded_size)
                for found in detections
            ],
            "image_sizes": image_sizes,
            "padded_size": padded_size,
        }


def class_logits(scores, classes, num_classes):
    """(N, K + 1) logits whose softmax gives each class its score, and the rest to "no object"."""
    probabilities = scores.new_zeros((len(scores), num_classes + 1))
    probabilities[:, num_classes] = 1 - scores
    probabilities[torch.arange(len(scores)), classes] = scores
    return probabilities.clamp_min(SMALLEST).log()


def paste_mask_logits(masks, boxes, padded_size):
    """Boxes' soft masks in the frame of the image.

    masks: (N, 1, M, M) probabilities inside the boxes. boxes: (N, 4) x0, y0, x1, y1, pixels.
    Returns (N, H / STRIDE, W / STRIDE) logits; outside the boxes they are very low.
    """
    height, width = padded_size
    corner, extent = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    y = (torch.arange(height // STRIDE, device=boxes.device) + 0.5) * STRIDE  # centers of pixels
    x = (torch.arange(width // STRIDE, device=boxes.device) + 0.5) * STRIDE
    y = (y - corner[..., 1]) / extent[..., 1] * 2 - 1  # (N, h): -1 and 1 are the box' edges
    x = (x - corner[..., 0]) / extent[..., 0] * 2 - 1
    shape = (len(boxes), y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    pasted = F.grid_sample(masks.float(), grid, align_corners=False)[:, 0]
    return torch.logit(pasted, eps=SMALLEST)
