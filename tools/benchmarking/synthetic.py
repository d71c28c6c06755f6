"""Images, instances and predictions that no data set is needed for."""

from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from s4m_d2.engine.rng import derive_seed, sample_seeds
from s4m_d2.formats.coco import mask_polygons
from s4m_d2.structures import encode_masks

SHARPNESS = 6.0  # logit in the middle of an instance
NO_MASK = -10.0  # logit where there is none
CLASS_LOGIT = 12.0
RADII = (0.07, 0.18)  # half axes of an instance, in sides of the image
FILES = 4  # image files, which a batch reads in turn


def generator(*keys: int | str) -> torch.Generator:
    """On the CPU, seeded with any keys."""
    return torch.Generator().manual_seed(derive_seed("benchmark", *keys))


def instance_logits(count: int, size: tuple[int, int], draws: torch.Generator) -> Tensor:
    """(N, H, W) logits of ``count`` ellipses: SHARPNESS in the middle, 0 at the border."""
    center, radius = torch.rand((2, count, 2), generator=draws)
    radius = RADII[0] + (RADII[1] - RADII[0]) * radius
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    across = ((x - center[:, :1]) / radius[:, :1]) ** 2
    down = ((y - center[:, 1:]) / radius[:, 1:]) ** 2
    return SHARPNESS * (1 - across[:, None] - down[:, :, None]).clamp(min=NO_MASK / SHARPNESS)


def image(size: tuple[int, int], draws: torch.Generator) -> Tensor:
    """(3, H, W) uint8: smooth colors and some noise, as of a photograph."""
    coarse = torch.rand((1, 3, 8, 8), generator=draws)
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)[0]
    noise = torch.rand((3, *size), generator=draws)
    return (255 * (0.85 * smooth + 0.15 * noise)).to(torch.uint8)


def samples(
    stream: str, batch: int, size: tuple[int, int], instances: int, num_classes: int
) -> list[dict]:
    """A batch as the loaders give it: "labeled" ones have instances, "unlabeled" a weak view."""
    result = []
    for index in range(batch):
        draws = generator(stream, index)
        sample = {"file_name": f"synthetic_{index}.png", "height": size[0], "width": size[1]}
        sample |= {"image": image(size, draws), "seeds": sample_seeds(0, stream, index)}
        if stream == "labeled":
            masks = BitMasks(instance_logits(instances, size, draws) > 0)
            fields = {"gt_masks": masks, "gt_boxes": masks.get_bounding_boxes()}
            fields["gt_classes"] = torch.randint(num_classes, (instances,), generator=draws)
            sample["instances"] = Instances(size, **fields)
        else:
            sample["image_weak"] = (255 - sample["image"]) // 2 + 64
        result.append(sample)
    return result


def write_images(
    folder: Path, size: tuple[int, int], instances: int, num_classes: int
) -> list[dict]:
    """A few PNG files of a data set, and Detectron2's records of them."""
    records = []
    for index in range(FILES):
        draws, name = generator("files", index), str(folder / f"{index}.png")
        cv2.imwrite(name, image(size, draws).flip(0).permute(1, 2, 0).contiguous().numpy())  # BGR
        annotations = []
        for n, rle in enumerate(encode_masks(instance_logits(instances, size, draws) > 0)):
            polygons = [polygon.ravel().tolist() for polygon in mask_polygons(rle)]
            annotations.append({"category_id": n % num_classes, "segmentation": polygons})
        record = {"file_name": name, "height": size[0], "width": size[1], "image_id": index}
        records.append({**record, "annotations": annotations})
    return records


def query_predictions(
    batch: int, queries: int, size: tuple[int, int], instances: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """pred_logits (B, Q, K + 1) and pred_masks (B, Q, h, w) of a teacher of ``instances``."""
    logits = torch.zeros(batch, queries, num_classes + 1)
    logits[..., -1] = CLASS_LOGIT
    masks = torch.full((batch, queries, *size), NO_MASK)
    for index in range(batch):
        draws = generator("predictions", index)
        seen = min(instances, queries)
        classes = torch.randint(num_classes, (seen,), generator=draws)
        logits[index, :seen, -1] = 0
        logits[index, torch.arange(seen), classes] = CLASS_LOGIT
        masks[index, :seen] = instance_logits(seen, size, draws)
    return logits, masks


def sam_answer(
    index: int, count: int, frame: int, content: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """(N, 3, frame, frame) mask logits and (N, 3) IoUs of an image that fills shares of a frame."""
    width, height = (max(1, round(frame * share)) for share in content)
    logits = torch.full((count, 3, frame, frame), NO_MASK)
    drawn = instance_logits(count, (height, width), generator("answers", index))
    logits[:, :, :height, :width] = drawn[:, None]
    return logits, torch.tensor([0.5, 0.9, 0.7]).expand(count, 3).clone()
