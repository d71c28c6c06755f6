"""Where the masks of an image come from: files of other programs, or SAM itself."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.data.images import image_size, read_image, unreadable
from s4m_d2.errors import DatasetError
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sepl.mask_files import cached_masks, find_masks, read_masks, write_masks

Masks = list[dict[str, Any]]  # compressed COCO RLEs


class MissingPartner(DatasetError):
    """An image has no file of a kind that others have."""


@dataclass(frozen=True)
class MaskFolder:
    """Masks that another program made, in the formats of :mod:`s4m_d2.sepl.mask_files`."""

    folder: Path

    def masks(self, name: str, image: Path | None, size: tuple[int, int]) -> Masks:
        """The masks of the image ``name``, compressed COCO RLEs of ``size`` (H, W).

        Raises:
            MissingPartner: there are none.
            DatasetError: they are damaged, or of another size.
        """
        source = find_masks(self.folder, name)
        if source is None:
            raise MissingPartner(
                f"'{self.folder}' has no masks of it: no folder {name}, {name}.json or "
                f"{name}.json.gz"
            )
        return read_masks(source, size)

    def settings(self) -> dict[str, Any]:
        """What the masks depend on, for the report."""
        return {"masks": str(self.folder.resolve())}


@dataclass(frozen=True)
class SamMasks:
    """Masks that SAM makes of each image, kept in a folder.

    The model is built when the first image needs it, once in each process.

    Attributes:
        backend, model_type, checkpoint: as S4M.SAM.BACKEND, MODEL_TYPE and CHECKPOINT.
        device: PyTorch's name of it.
        images: the folder that the images are from.
        cache: folder of a file an image.
        automatic: how SAM is asked.
    """

    backend: str
    model_type: str
    checkpoint: str
    device: str
    images: Path
    cache: Path
    automatic: AutomaticMaskSettings = field(default_factory=AutomaticMaskSettings)

    def masks(self, name: str, image: Path | None, size: tuple[int, int]) -> Masks:
        """As those of :class:`MaskFolder`; from the cache where model, settings and image agree.

        Raises:
            DatasetError: the image cannot be read.
            ConfigError, WeightsError: the model cannot be built.
            OutputError: the cache cannot be written.
        """
        if image is None:
            raise MissingPartner("there is no image of it")
        generator = _generator(self)
        kept = self.cache / f"{name}.json.gz"
        fingerprint = f"{generator.fingerprint()} {_digest(image)}"
        masks = cached_masks(kept, size, fingerprint)
        if masks is None:
            records = generator.generate(read_image(str(image), "RGB"))
            masks = write_masks(kept, records, size, fingerprint)
        return masks

    def settings(self) -> dict[str, Any]:
        """What the masks depend on, but for rounding, for the report."""
        automatic = asdict(self.automatic)
        del automatic["points_per_batch"]
        return {
            "sam": self.backend,
            "sam_type": self.model_type,
            "sam_checkpoint": str(Path(self.checkpoint).resolve()) if self.checkpoint else "",
            "images": str(self.images.resolve()),
            **automatic,
        }


@lru_cache(maxsize=1)
def _generator(source: SamMasks) -> AutomaticMasks:
    return AutomaticMasks(build_sam_backend(_sam_config(source)), source.automatic)


def _sam_config(source: SamMasks) -> Any:
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.S4M.SAM.BACKEND = source.backend
    cfg.S4M.SAM.MODEL_TYPE = source.model_type
    cfg.S4M.SAM.CHECKPOINT = source.checkpoint
    cfg.MODEL.DEVICE = source.device
    return cfg


def _digest(image: Path) -> str:
    """SHA-256 of a file."""
    try:
        return hashlib.sha256(image.read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(str(image), error) from error


def check_image_size(image: Path, label: Path, size: tuple[int, int]) -> None:
    """Compare an image with its label map, of which ``size`` is (H, W).

    Raises:
        DatasetError: their sizes disagree, or the image cannot be read.
    """
    upright = image_size(str(image))
    if upright == size:
        return
    problem = (
        f"{label} has (height, width) {size}, but {image} has {upright}. Each pixel of an image "
        "needs its label: take the pair that belongs together, at one size"
    )
    if upright == size[::-1]:
        problem += (
            "; the image may be stored on its side, and is turned upright as its EXIF data say: "
            "then turn the label map too, or store the image upright"
        )
    raise DatasetError(f"{problem}.")
