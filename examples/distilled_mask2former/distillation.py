"""Adds structural distillation to a Mask2Former that somebody else wrote."""

import torch
import torch.nn.functional as F


def add_structural_distillation(model, loss, *, stride=4, input_format="RGB"):
    """Let ``model`` return a further loss, ``loss_sd``, in training mode; it stays one otherwise.

    The class of the model, the names of its weights and its results in evaluation do not change.

    Args:
        model: a Mask2Former whose ``sem_seg_head`` calls ``predictor(maps, mask_features, ...)``:
            the published one, S4MMaskFormer, and most that were derived from them.
        loss: a StructuralDistillation.
        stride: pixels of the padded batch for one of the mask features.
        input_format: "RGB" or "BGR", the channel order of the samples' images.

    Returns:
        ``model``.
    """
    mask_features = []

    def remember(predictor, arguments):
        if model.training:
            mask_features[:] = [arguments[1]]

    def add_loss(model, arguments, losses):
        if not model.training:
            return None
        (samples,), features = arguments, mask_features.pop()
        distilled = loss(
            features,
            padded_images(samples, features, stride, input_format),
            [tuple(sample["image"].shape[-2:]) for sample in samples],
            [instance_masks(sample["instances"]) for sample in samples],
        )
        return {**losses, **distilled}

    model.sem_seg_head.predictor.register_forward_pre_hook(remember)
    model.register_forward_hook(add_loss)
    return model


def padded_images(samples, features, stride, input_format):
    """(B, 3, H, W) RGB of the size that the network saw: SAM's features must lie at its places."""
    height, width = (stride * side for side in features.shape[-2:])
    images = [sample["image"].to(features.device) for sample in samples]
    images = torch.stack(
        [F.pad(im, (0, width - im.shape[2], 0, height - im.shape[1])) for im in images]
    )
    return images if input_format == "RGB" else images.flip(1)


def instance_masks(instances):
    """(N, H, W) bool: gt_masks are BitMasks here and a tensor in the published mappers."""
    masks = instances.gt_masks
    return getattr(masks, "tensor", masks).bool()
