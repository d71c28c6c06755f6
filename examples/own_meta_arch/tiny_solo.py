"""A small instance segmenter of one's own, after the idea of SOLO: each cell of a coarse grid asks
"is the center of an object in me, of which class, and which pixels are its own?"

Nothing here knows of teachers, students or SAM. What makes it trainable by S4MTrainer is that it
is an S4MTrainable (s4m_d2/engine/labeling/protocol.py): ``forward`` and ``predict_queries``.
"""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import nn

from s4m_d2.modeling.inference import instance_inference

STRIDE = 4  # of the masks: the backbone's res2
NO_OBJECT_WEIGHT = 0.1  # most cells are empty


def add_tiny_solo_config(cfg):
    """Add this model's keys to a Detectron2 config."""
    cfg.MODEL.TINY_SOLO = CN()
    cfg.MODEL.TINY_SOLO.GRID_SIZE = (8, 16)  # rows, columns
    cfg.MODEL.TINY_SOLO.CHANNELS = 64


@META_ARCH_REGISTRY.register()
class TinySOLO(nn.Module):
    """Backbone maps -> mask features, and for each grid cell class logits and a mask kernel."""

    @configurable
    def __init__(
        self, *, backbone, num_classes, grid_size, channels, pixel_mean, pixel_std, max_instances
    ):
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.grid_size = tuple(grid_size)
        self.max_instances = max_instances
        shapes = backbone.output_shape()
        self.divisibility = max(shape.stride for shape in shapes.values())
        self.lateral = nn.ModuleDict(
            {name: nn.Conv2d(shape.channels, channels, 1) for name, shape in shapes.items()}
        )
        self.mask_branch = conv_block(channels + 2, channels)
        self.cell_branch = nn.Sequential(
            conv_block(channels + 2, channels), conv_block(channels, channels)
        )
        self.cell_classes = nn.Conv2d(channels, num_classes + 1, 1)  # the last: no object
        self.cell_kernels = nn.Conv2d(channels, channels + 1, 1)  # weights and a bias
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "grid_size": cfg.MODEL.TINY_SOLO.GRID_SIZE,
            "channels": cfg.MODEL.TINY_SOLO.CHANNELS,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def predict_queries(self, batched_inputs):
        """Every cell's class logits (B, Q, K + 1) and mask logits (B, Q, h, w)."""
        images = [sample["image"].to(self.pixel_mean.device) for sample in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        images = ImageList.from_tensors(images, self.divisibility)
        features = self.backbone(images.tensor)

        height, width = (side // STRIDE for side in images.tensor.shape[-2:])
        fused = sum(
            resize(conv(features[name]), (height, width)) for name, conv in self.lateral.items()
        )
        mask_features = self.mask_branch(with_coordinates(fused))
        cells = F.adaptive_avg_pool2d(fused, self.grid_size)
        cells = self.cell_branch(with_coordinates(cells))
        kernels = self.cell_kernels(cells).flatten(2)
        masks = torch.einsum("bcq,bchw->bqhw", kernels[:, :-1], mask_features)
        return {
            "pred_logits": self.cell_classes(cells).flatten(2).transpose(1, 2),
            "pred_masks": masks + kernels[:, -1, :, None, None],
            "image_sizes": images.image_sizes,
            "padded_size": tuple(images.tensor.shape[-2:]),
        }

    def forward(self, batched_inputs):
        """Losses in training mode, instances in eval mode: any Detectron2 trainer can use it."""
        outputs = self.predict_queries(batched_inputs)
        if self.training:
            return self.losses(outputs, [sample["instances"] for sample in batched_inputs])
        return [
            {
                "instances": instance_inference(
                    logits,
                    masks,
                    padded_size=outputs["padded_size"],
                    image_size=size,
                    output_size=(sample.get("height", size[0]), sample.get("width", size[1])),
                    max_instances=self.max_instances,
                )
            }
            for logits, masks, size, sample in zip(
                outputs["pred_logits"],
                outputs["pred_masks"],
                outputs["image_sizes"],
                batched_inputs,
                strict=True,
            )
        ]

    def losses(self, outputs, instances):
        """Cross-entropy over all cells; mask losses of the cells that hold an object's center."""
        logits, pred_masks = outputs["pred_logits"], outputs["pred_masks"]
        classes = logits.new_full(logits.shape[:2], self.num_classes, dtype=torch.int64)
        predicted, wanted = [pred_masks[:0, 0]], [pred_masks[:0, 0]]
        for image, targets in enumerate(instances):
            masks = self.coarse_masks(targets.gt_masks.tensor, outputs["padded_size"])
            cells = self.center_cells(masks)
            for cell, label in zip(cells, targets.gt_classes, strict=True):
                classes[image, cell] = label  # of two centers in a cell, the later one's
            predicted.append(pred_masks[image, cells])
            wanted.append(masks)
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = NO_OBJECT_WEIGHT
        predicted, wanted = torch.cat(predicted).flatten(1), torch.cat(wanted).flatten(1)
        count = max(len(wanted), 1)
        bce = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").mean(1)
        probabilities = predicted.sigmoid()
        overlap = (probabilities * wanted).sum(1)
        dice = 1 - (2 * overlap + 1) / (probabilities.sum(1) + wanted.sum(1) + 1)
        return {
            "loss_class": F.cross_entropy(logits.transpose(1, 2), classes, weight),
            "loss_mask": bce.sum() / count,
            "loss_dice": dice.sum() / count,
        }

    def coarse_masks(self, masks, padded_size):
        """(N, H, W) bool masks of an image -> (N, h, w) shares of the padded frame's pixels."""
        masks = masks.to(self.pixel_mean.device).float()
        height, width = padded_size
        masks = F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
        return F.avg_pool2d(masks[:, None], STRIDE)[:, 0]

    def center_cells(self, masks):
        """(N,) the cell in which each mask's center of mass lies."""
        cells = torch.zeros(len(masks), dtype=torch.int64, device=masks.device)
        for axis, count in zip((1, 2), self.grid_size, strict=True):
            mass = masks.sum(dim=3 - axis)  # (N, side)
            places = (torch.arange(mass.shape[1], device=mass.device) + 0.5) / mass.shape[1]
            center = (mass * places).sum(1) / mass.sum(1).clamp_min(1e-6)
            cells = cells * count + (center * count).long().clamp(max=count - 1)
        return cells


def conv_block(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.GroupNorm(8, out_channels),
        nn.ReLU(),
    )


def with_coordinates(maps):
    """Append two channels: y and x from -1 to 1, so that a kernel can tell places apart."""
    axes = [torch.linspace(-1, 1, side, device=maps.device) for side in maps.shape[-2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).to(maps.dtype)
    return torch.cat([maps, places.expand(len(maps), -1, -1, -1)], dim=1)


def resize(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
