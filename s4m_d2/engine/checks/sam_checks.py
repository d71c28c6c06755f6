"""Settings of how SAM computes, and whether its cache can be of use."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from s4m_d2.engine.checks.findings import Finding
from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import ConfigError, S4MError
from s4m_d2.sam.precision import AUTO, PRECISIONS

FEW_SIZES = 4  # with more, an image seldom comes again at the same size


def sam_setting_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """Values of S4M.SAM that are out of range."""
    sam = cfg.S4M.SAM
    if sam.MAX_IMAGES < 0:
        yield ConfigError(
            f"S4M.SAM.MAX_IMAGES is {sam.MAX_IMAGES}; expected 1 or more, or 0 for as many as fit."
        )
    if sam.PRECISION not in (AUTO, *PRECISIONS):
        yield ConfigError(
            f"S4M.SAM.PRECISION is {sam.PRECISION!r}; choose one of "
            f"{', '.join((AUTO, *PRECISIONS))}."
        )
    if not sam.CACHE_SIZE_GB > 0:
        yield ConfigError(
            f"S4M.SAM.CACHE_SIZE_GB is {sam.CACHE_SIZE_GB}; expected a number above 0. "
            'S4M.SAM.CACHE "" switches the cache off.'
        )


def sam_cache_findings(cfg: CfgNode) -> Iterator[Finding]:
    """A line on S4M.SAM.CACHE, where it is set."""
    sam = cfg.S4M.SAM
    if not sam.CACHE:
        return
    text = f"{sam.CACHE}, up to {sam.CACHE_SIZE_GB:g} GB"
    if not (cfg.S4M.DISTILL.ENABLED and runs_stage(cfg, "teacher")):
        yield Finding("SAM's cache", f"{text}: not used, as no stage 1 with distillation runs")
        return
    reasons = list(_why_images_seldom_repeat(cfg))
    warnings: tuple[str, ...] = ()
    if reasons:
        warnings = (
            f"S4M.SAM.CACHE is '{sam.CACHE}', but an image comes again with the same pixels "
            f"seldom or never: {'; '.join(reasons)}. Each miss writes a file. Set S4M.SAM.CACHE "
            '"", or train on views that repeat.',
        )
    yield Finding("SAM's cache", text, (), warnings)


def _why_images_seldom_repeat(cfg: CfgNode) -> Iterator[str]:
    """What makes the labeled view another one each time."""
    image = cfg.INPUT
    if image.DATASET_MAPPER_NAME == "coco_instance_lsj":
        if image.MIN_SCALE != image.MAX_SCALE or image.MIN_SCALE > 1:
            yield "INPUT.DATASET_MAPPER_NAME coco_instance_lsj scales and crops at random"
    elif image.DATASET_MAPPER_NAME == "mask_former_instance":
        if image.CROP.ENABLED:
            yield "INPUT.CROP.ENABLED True crops at random"
        sizes = len(set(image.MIN_SIZE_TRAIN))
        if image.MIN_SIZE_TRAIN_SAMPLING == "range":
            low, high = min(image.MIN_SIZE_TRAIN), max(image.MIN_SIZE_TRAIN)
            sizes = high - low + 1
        if sizes > FEW_SIZES:
            yield f"INPUT.MIN_SIZE_TRAIN gives {sizes} sizes"
    if image.COLOR_AUG_SSD:
        yield "INPUT.COLOR_AUG_SSD True distorts colors at random"
