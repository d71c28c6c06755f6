"""The model of both stages: Mask2Former for instances, with optional distillation; its head."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, build_backbone
from detectron2.structures import BitMasks, ImageList, Instances
from torch import Tensor, nn

from s4m_d2.errors import ConfigError, DatasetError, InputError, registered, require
from s4m_d2.losses import SetCriterion, build_distillation
from s4m_d2.modeling.inference import instance_inference, largest_components
from s4m_d2.modeling.pixel_decoder import MSDeformAttnPixelDecoder, register_if_free
from s4m_d2.modeling.transformer_decoder import TRANSFORMER_DECODER_REGISTRY
from s4m_d2.sam import build_sam_backend
from s4m_d2.structures import sample_generators
from s4m_d2.transfers import to_device

Sample = Mapping[str, Any]


@META_ARCH_REGISTRY.register()
class S4MMaskFormer(nn.Module):
    """Mask2Former for instance segmentation.

    Args:
        backbone: Detectron2 backbone.
        sem_seg_head: maps of the backbone -> queries (see MaskFormerHead).
        criterion: L_sup.
        distillation: L_SD (paper, section 3.2), added in training; None: off. A plain attribute,
            which may be set at any time: its SAM is neither a submodule nor in the state dict.
        pixel_mean, pixel_std: 0..255 units, in the order of ``input_format``.
        input_format: "RGB" or "BGR", the channel order of the samples' images.
        size_divisibility: inputs are padded to multiples of it.
        train_square_size: training batches are padded to squares of this side, px; 0: to the
            largest image.
        max_instances, duplicate_iou: of :func:`instance_inference`.
        largest_component: keep only the largest component of predicted masks and pseudo-labels.

    ``rle_masks``, which may be set at any time, is that of :func:`instance_inference` too.
    """

    sem_seg_head: Any  # of the registry: its attributes are the head's, not nn.Module's
    criterion: Any
    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: nn.Module,
        distillation=None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        size_divisibility: int,
        train_square_size: int = 0,
        max_instances: int = 100,
        duplicate_iou: float = 1.0,
        largest_component: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.distillation = distillation
        self.input_format = input_format
        self.size_divisibility = size_divisibility
        self.train_square_size = train_square_size
        self.max_instances = max_instances
        self.duplicate_iou = duplicate_iou
        self.largest_component = largest_component
        self.rle_masks = False
        mean, std = (torch.tensor(x, dtype=torch.float32) for x in (pixel_mean, pixel_std))
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        _check_supported(cfg)
        backbone = build_backbone(cfg)
        divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        jitter = cfg.INPUT.DATASET_MAPPER_NAME == "coco_instance_lsj"
        return {
            "backbone": backbone,
            "sem_seg_head": build_head(cfg, backbone.output_shape()),
            "criterion": SetCriterion(cfg),
            "distillation": (
                build_distillation(cfg, build_sam_backend(cfg)) if cfg.S4M.DISTILL.ENABLED else None
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "size_divisibility": backbone.size_divisibility if divisibility < 0 else divisibility,
            "train_square_size": cfg.INPUT.IMAGE_SIZE if jitter else 0,
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
            "duplicate_iou": cfg.MODEL.MASK_FORMER.TEST.DUPLICATE_IOU,
            "largest_component": cfg.MODEL.MASK_FORMER.TEST.LARGEST_COMPONENT,
        }

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Sample]) -> dict[str, Tensor] | list[dict]:
        """Compute the losses of a batch in training mode, else segment it.

        Args:
            batched_inputs: samples with "image" (3, H, W), 0..255 in ``input_format``; for
                training "instances" (see :func:`prepare_target`) and optionally "seeds"; for
                inference optionally "height" and "width", the size of the result.

        Returns:
            in training the losses of :class:`SetCriterion` and, with distillation, ``loss_sd``;
            otherwise a dict per image with "instances" (see :func:`instance_inference`).
        """
        if self.training:
            return self._losses(batched_inputs)
        found = self.predict_queries(batched_inputs)
        queries = zip(found["pred_logits"], found["pred_masks"], strict=True)
        images = zip(queries, found["image_sizes"], batched_inputs, strict=True)
        results = [
            instance_inference(
                *of_image,
                padded_size=found["padded_size"],
                image_size=size,
                output_size=(sample.get("height", size[0]), sample.get("width", size[1])),
                max_instances=self.max_instances,
                duplicate_iou=self.duplicate_iou,
                rle_masks=self.rle_masks,
            )
            for of_image, size, sample in images
        ]
        return [{"instances": instances} for instances in results]

    def predict_queries(self, batched_inputs: Sequence[Sample]) -> dict[str, Any]:
        """Predict all queries of a batch, without selection; annotations are not read.

        Returns:
            ``pred_logits`` (B, Q, K + 1), ``pred_masks`` (B, Q, h, w) logits of the padded batch at
            1/4 of its size, ``image_sizes`` [(H, W)] of the contents, ``padded_size`` (H, W).
        """
        images, outputs = self._run(batched_inputs)
        sizes = {"image_sizes": images.image_sizes, "padded_size": tuple(images.tensor.shape[-2:])}
        return {key: outputs[key] for key in ("pred_logits", "pred_masks")} | sizes

    def mask_features(
        self, batched_inputs: Sequence[Sample]
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Compute the features that structural distillation compares with SAM's.

        Returns:
            the pixel decoder's mask features (B, C, h, w) of the padded batch, the batch itself
            (B, 3, H, W) in RGB, 0..255, and the sizes (H, W) of its contents.
        """
        images, outputs = self._run(batched_inputs)
        return outputs["mask_features"], self._rgb(batched_inputs), images.image_sizes

    def _run(self, batched_inputs: Sequence[Sample]) -> tuple[ImageList, dict[str, Any]]:
        """The padded images, and the last layer's outputs."""
        images = self._normalized(batched_inputs)
        outputs = self.sem_seg_head(self.backbone(images.tensor), aux_outputs=False)
        if self.largest_component:
            outputs["pred_masks"] = largest_components(outputs["pred_masks"])
        return images, outputs

    def _losses(self, batched_inputs: Sequence[Sample]) -> dict[str, Tensor]:
        images = self._normalized(batched_inputs)
        features, aux_outputs = self.backbone(images.tensor), self.criterion.deep_supervision
        outputs = self.sem_seg_head(features, aux_outputs=aux_outputs)
        size = images.tensor.shape[-2:]
        targets = [prepare_target(sample, size, self.device) for sample in batched_inputs]
        generators = sample_generators(batched_inputs, "loss_points", self.device)
        losses = self.criterion(outputs, targets, generators)
        if self.distillation is not None:
            losses |= self.distillation(
                outputs["mask_features"],
                self._rgb(batched_inputs),
                images.image_sizes,
                [target["masks"] for target in targets],
                sample_generators(batched_inputs, "prompt_points", self.device),
            )
        return losses

    def _normalized(self, batched_inputs: Sequence[Sample]) -> ImageList:
        images = (to_device(sample["image"], self.device) for sample in batched_inputs)
        return self._pad([(image - self.pixel_mean) / self.pixel_std for image in images])

    def _rgb(self, batched_inputs: Sequence[Sample]) -> Tensor:
        """(B, 3, H, W) RGB, 0..255, padded as the network's input."""
        images = [to_device(sample["image"], self.device) for sample in batched_inputs]
        padded = self._pad(images).tensor
        return padded if self.input_format == "RGB" else padded.flip(1)

    def _pad(self, images: list[Tensor]) -> ImageList:
        """Pad with zeros at the bottom and right to a common size."""
        square = self.train_square_size if self.training else 0
        largest = max(side for image in images for side in image.shape[-2:])
        if 0 < square < largest:
            raise InputError(
                f"an image of side {largest} does not fit the training square of {square} px; "
                "raise INPUT.IMAGE_SIZE or use a mapper that crops to it"
            )
        constraints = {"size_divisibility": self.size_divisibility, "square_size": square}
        return ImageList.from_tensors(images, padding_constraints=constraints)


def prepare_target(sample: Sample, size: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Make the criterion's target of an image.

    Args:
        sample: with "instances": ``gt_classes`` (N,) and ``gt_masks`` (BitMasks or an (N, H, W)
            tensor at the image's size; may be missing if N is 0), and optionally ``gt_weights``
            (N,) and ``gt_doubts`` (N, H, W), see the criterion.
        size: (H, W) of the padded batch.

    Returns:
        ``labels`` (N,) int64, ``masks`` (N, *size) bool and, if given, ``weights`` (N,) and
        ``doubts`` (N, *size).

    Raises:
        InputError: instances are missing, or their masks have another type.
        DatasetError: sizes or numbers disagree. Class ids are checked by the matcher.
    """
    name = str(sample.get("file_name", sample.get("image_id", "<unnamed image>")))
    if "instances" not in sample:
        raise InputError(
            f"{name}: a training sample needs 'instances'; use a mapper for labeled images "
            "(INPUT.DATASET_MAPPER_NAME)"
        )
    instances = sample["instances"]
    height, width = sample["image"].shape[-2:]
    masks, labels = _masks(instances, (height, width), name), instances.gt_classes.to(torch.int64)
    target, fields = {"labels": labels, "masks": masks}, instances.get_fields()
    target |= {key: fields[f"gt_{key}"] for key in ("weights", "doubts") if f"gt_{key}" in fields}
    padding = 0, size[1] - width, 0, size[0] - height
    moved = {key: to_device(value, device) for key, value in target.items()}
    return {key: F.pad(x, padding) if x.ndim == 3 else x for key, x in moved.items()}


def _masks(instances: Instances, size: tuple[int, int], name: str) -> Tensor:
    masks = instances.get_fields().get("gt_masks")
    if masks is None and not len(instances):
        return torch.zeros((0, *size), dtype=torch.bool)
    masks = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(masks, Tensor):
        raise InputError(
            f"{name}: gt_masks must be BitMasks or a tensor, got {type(masks).__name__}; set "
            "MODEL.MASK_ON to True and INPUT.MASK_FORMAT to 'bitmask'"
        )
    if tuple(masks.shape) != (len(instances), *size):
        raise DatasetError(
            f"{name}: masks {tuple(masks.shape)} do not fit {len(instances)} instances on an image "
            f"of {size}; the annotation belongs to another image or size"
        )
    return masks.bool()


def _check_supported(cfg) -> None:
    for key, wanted in {"SEMANTIC_ON": False, "PANOPTIC_ON": False, "INSTANCE_ON": True}.items():
        found, expected = cfg.MODEL.MASK_FORMER.TEST[key], f"{wanted}: instance segmentation only"
        require(f"MODEL.MASK_FORMER.TEST.{key}", found, found == wanted, expected)


@register_if_free
class MaskFormerHead(nn.Module):
    """Pixel decoder and transformer decoder: maps of the backbone -> classes and masks.

    Args:
        num_classes: object classes, without "no object".
        pixel_decoder: backbone maps -> (mask features, three maps from coarse to fine).
        transformer_predictor: (maps, mask features) -> predictions.
    """

    _version = 2  # as Mask2Former's of these names, whose loading would rename our weights else

    @configurable
    def __init__(
        self, *, num_classes: int, pixel_decoder: nn.Module, transformer_predictor: nn.Module
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        missing = sorted(set(head.IN_FEATURES) - set(input_shape))
        if missing:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}, which the backbone does not "
                f"return; it returns {sorted(input_shape)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        former, key = cfg.MODEL.MASK_FORMER, "MODEL.MASK_FORMER.TRANSFORMER"
        source, name = former.TRANSFORMER_IN_FEATURE, former.TRANSFORMER_DECODER_NAME
        multi_scale = "multi_scale_pixel_decoder"
        require(f"{key}_IN_FEATURE", source, source == multi_scale, repr(multi_scale))
        predictor = registered(TRANSFORMER_DECODER_REGISTRY, f"{key}_DECODER_NAME", name)
        return {
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_head(cfg, input_shape, "PIXEL_DECODER_NAME"),
            "transformer_predictor": predictor(cfg, head.CONVS_DIM),
        }

    def forward(
        self, features: dict[str, Tensor], *, aux_outputs: bool = True
    ) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Predict.

        Args:
            features: backbone maps (B, C_i, H_i, W_i) by name.
            aux_outputs: also predict from every decoder layer but the last (deep supervision).

        Returns:
            those of the transformer decoder, and ``mask_features`` (B, C, h, w).
        """
        mask_features, maps = self.pixel_decoder(features)
        outputs = self.predictor(maps, mask_features, aux_outputs=aux_outputs)
        return {**outputs, "mask_features": mask_features}


def build_head(cfg, input_shape: dict[str, ShapeSpec], key: str = "NAME") -> nn.Module:
    """Build our class with the name in ``MODEL.SEM_SEG_HEAD[key]``, or else the registered one."""
    name = cfg.MODEL.SEM_SEG_HEAD[key]
    ours = {cls.__name__: cls for cls in (MaskFormerHead, MSDeformAttnPixelDecoder)}
    if name in ours:
        return ours[name](cfg, input_shape)
    return registered(SEM_SEG_HEADS_REGISTRY, f"MODEL.SEM_SEG_HEAD.{key}", name)(cfg, input_shape)
