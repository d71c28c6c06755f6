"""The shapes that are measured: a config of the project each, with synthetic images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from s4m_d2.engine import run_config, stage_config
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES = {1: "teacher", 2: "student"}
SAM_SIZES = ("vit_b", "vit_l", "vit_h")
CONFIG_SAM, TINY_SAM = "config", "tiny_toyscapes"


@dataclass(frozen=True)
class Case:
    """One set of shapes.

    Attributes:
        name: of the shapes.
        config: file of configs/.
        image_size: (H, W) of a training image, px.
        raw_size: (H, W) of an image file, px.
        instances: instances an image, labeled or pseudo-labeled.
        images: images a batch (labeled; as many unlabeled); 0: the config's.
    """

    name: str
    config: str
    image_size: tuple[int, int]
    raw_size: tuple[int, int]
    instances: int
    images: int = 0


CASES = {
    case.name: case
    for case in (
        Case("quickstart", "toyscapes_10pct.yaml", (128, 256), (128, 256), 6),
        Case("cityscapes", "cityscapes_10pct.yaml", (512, 1024), (1024, 2048), 20),
        Case("coco", "coco_10pct.yaml", (1024, 1024), (480, 640), 7),
    )
}


def cases_of(
    shapes: str, images: int = 0, instances: int = 0, size: tuple[int, int] | None = None
) -> list[Case]:
    """The named case, or all of them; 0 images or instances and no size: the case's own."""
    names = list(CASES) if shapes == "all" else [shapes]
    return [
        replace(
            CASES[name],
            images=images,
            instances=instances or CASES[name].instances,
            image_size=size or CASES[name].image_size,
        )
        for name in names
    ]


def case_config(case: Case, stage: int, *, device: str, sam: str, opts: tuple = ()):
    """The config of a stage (1 or 2), with random weights, ready to be run in one process.

    SyncBN becomes BN, which computes the same in one process.

    Args:
        sam: "config", "tiny_toyscapes" or a size of SAM_SIZES.

    Raises:
        ConfigError: the SAM is none that can be made without its weights, or the images are not
            square where the config trains on squares.
    """
    file = str(CONFIGS / case.config)
    plain = load_config(file)
    overrides = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, "DATALOADER.NUM_WORKERS", "0"]
    if plain.MODEL.RESNETS.NORM == "SyncBN":
        overrides += ["MODEL.RESNETS.NORM", "BN"]
    if sam != CONFIG_SAM:
        backend = "tiny" if sam == TINY_SAM else "segment_anything"
        overrides += ["S4M.SAM.BACKEND", backend, "S4M.SAM.MODEL_TYPE", sam]
        overrides += ["S4M.SAM.CHECKPOINT", ""]
    overrides += _training_size(case, plain)
    if case.images:
        overrides += ["SOLVER.IMS_PER_BATCH", str(case.images)]
        overrides += ["S4M.TEACHER.IMS_PER_BATCH", str(case.images)]
    cfg = load_config(file, [*overrides, *opts])
    if cfg.S4M.SAM.BACKEND == "segment_anything" and cfg.S4M.SAM.MODEL_TYPE not in SAM_SIZES:
        raise ConfigError(f"--sam {sam} is unknown; choose {TINY_SAM} or one of {SAM_SIZES}")
    return stage_config(run_config(cfg), STAGES[stage])


def _training_size(case: Case, cfg) -> list[str]:
    """Overrides that make ``case.image_size`` the size of the training crops."""
    height, width = case.image_size
    if cfg.INPUT.DATASET_MAPPER_NAME != "coco_instance_lsj":
        return ["INPUT.CROP.SIZE", str((height, width))]
    if height != width:
        raise ConfigError(
            f"--size {height}x{width}: {case.config} trains on squares; give a size like 512x512"
        )
    return ["INPUT.IMAGE_SIZE", str(height)]
