"""Selection of the teacher's predictions that become pseudo-labels (paper, section 3.1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s4m_d2.structures import MAX_BYTE, PseudoLabels, mask_areas
from s4m_d2.transfers import to_device, to_host

MASKS_AT_ONCE = 16  # masks resized to image size together; bounds the memory


@dataclass(frozen=True)
class Selection:
    """The kept predictions of one image, at the prediction's resolution, without padding."""

    labels: PseudoLabels  #: N with (N, h', w') masks, each with a pixel
    mask_logits: Tensor  #: (N, h', w') float32, of these masks
    #: (h', w') of the content in the masks' pixels; fractional where it ends inside the last ones
    content_size: tuple[float, float]
    #: of ``queries``: ``dropped_no_object``, ``dropped_score``, ``dropped_area``,
    #: ``dropped_non_finite`` (each counts for the first rule that drops it) and ``kept``
    stats: dict[str, int]
    logit_thresh: float = 0.0  #: above it a pixel belongs to the mask

    def masks_at(self, image_size: tuple[int, int]) -> Tensor:
        """(N, *image_size) bool masks of logits resized bilinearly."""
        return self.resized(lambda logits: logits > self.logit_thresh, image_size, image_size)

    def doubts_at(self, image_size: tuple[int, int]) -> Tensor:
        """(N, *image_size) uint8: 255 times the probability that the teacher is wrong about a
        pixel, min(p, 1 - p) of its mask probability p."""

        def doubts(logits: Tensor) -> Tensor:
            doubt = logits.abs_().neg_().sigmoid_()
            return doubt.mul_(MAX_BYTE).round_().to(torch.uint8)

        return self.resized(doubts, image_size, image_size)

    def resized(
        self,
        convert: Callable[[Tensor], Tensor],
        image_size: tuple[float, float],
        frame: tuple[int, int],
    ) -> Tensor:
        """What ``convert`` makes of (n, *frame) resized logits, for MASKS_AT_ONCE at a time.

        The content fills ``image_size`` of the ``frame`` (H, W), also if it ends inside a pixel.
        """
        logits = self.mask_logits
        axes = [
            (torch.arange(side, device=logits.device) + 0.5) * (2 * extent / (size * pixels)) - 1
            for side, size, extent, pixels in zip(
                frame, image_size, self.content_size, logits.shape[1:], strict=True
            )
        ]
        y, x = torch.meshgrid(*axes, indexing="ij")
        grid = torch.stack([x, y], dim=-1)[None]
        read = partial(F.grid_sample, grid=grid, padding_mode="border", align_corners=False)
        return torch.cat([convert(read(part[None])[0]) for part in logits.split(MASKS_AT_ONCE)])


@torch.no_grad()
def select_pseudo_labels(
    pred_logits: Sequence[Tensor],
    pred_masks: Sequence[Tensor],
    *,
    content_sizes: Sequence[tuple[float, float]],
    score_thresh: float | Tensor,
    min_area: float,
    mask_thresh: float = 0.5,
) -> list[Selection]:
    """Keep a query if its arg-max class is an object, its score and its soft area are high enough.

    Queries with NaN class probabilities, with a mask logit that is not finite, or whose mask has no
    pixel are dropped too. Synchronizes once.

    Args:
        pred_logits: of each image (Q, K + 1) class logits, the last of no-object; Q may differ.
        pred_masks: of each image (Q, h, w) mask logits with padding (content at the top left).
        content_sizes: of each image (h', w') of the content in prediction pixels, which may be
            fractional, H_content * h / H_padded; the masks have ceil(h') x ceil(w') pixels.
        score_thresh: the class probability must exceed it; or (K,), one for each class.
        min_area: the sum of the mask's probabilities must exceed it, px of the prediction.
        mask_thresh: a pixel belongs to the mask if its probability exceeds it, in (0, 1).
    """
    rules = score_thresh, min_area, mask_thresh
    verdicts = [
        _judge(logits, _content(masks, size), *rules)
        for logits, masks, size in zip(pred_logits, pred_masks, content_sizes, strict=True)
    ]
    on_host = to_host(*(verdict for *_, verdict in verdicts))
    selections = []
    for (scores, classes, _), (*passed, areas), masks, size in zip(
        verdicts, on_host, pred_masks, content_sizes, strict=True
    ):
        rows = np.flatnonzero(passed[-1])
        kept = to_device(rows, masks.device)
        logits = _content(masks[kept], size)
        is_inside = logits.sigmoid() > mask_thresh
        selections.append(
            Selection(
                PseudoLabels(classes[kept], is_inside, scores[kept], areas[rows]),
                mask_logits=logits,
                content_size=(float(size[0]), float(size[1])),
                stats=_statistics(passed),
                logit_thresh=math.log(mask_thresh / (1.0 - mask_thresh)),
            )
        )
    return selections


def _content(masks: Tensor, content_size: tuple[float, float]) -> Tensor:
    """The pixels of a prediction that hold content."""
    return masks[:, : math.ceil(content_size[0]), : math.ceil(content_size[1])].float()


def _judge(
    logits: Tensor,
    mask_logits: Tensor,
    score_thresh: float | Tensor,
    min_area: float,
    mask_thresh: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (Q,) and classes (Q,) of an image's queries; (6, Q) int64: whether each is left after
    each rule, and the areas of the masks in pixels."""
    scores, classes = logits.float().softmax(dim=-1).max(dim=-1)
    is_finite = scores.isfinite()
    is_object = is_finite & (classes != logits.shape[1] - 1)
    if isinstance(score_thresh, Tensor):
        score_thresh = score_thresh[classes.clamp(max=len(score_thresh) - 1)]
    is_confident = is_object & (scores > score_thresh)
    low, high = mask_logits.amin(dim=(1, 2)), mask_logits.amax(dim=(1, 2))
    is_usable = is_confident & low.isfinite() & high.isfinite()
    probabilities = mask_logits.sigmoid()
    areas = mask_areas(probabilities > mask_thresh)
    is_kept = is_usable & (probabilities.sum(dim=(1, 2)) > min_area) & (areas > 0)
    flags = is_finite, is_object, is_confident, is_usable, is_kept
    return scores, classes, torch.stack([*(flag.long() for flag in flags), areas])


def _statistics(passed: Sequence[np.ndarray]) -> dict[str, int]:
    """Number of queries dropped by each rule, from whether each is left after each rule."""
    finite, objects, confident, usable, kept = (int(flags.sum()) for flags in passed)
    queries = len(passed[0])
    return {
        "queries": queries,
        "dropped_no_object": finite - objects,
        "dropped_score": objects - confident,
        "dropped_area": usable - kept,
        "dropped_non_finite": queries - finite + confident - usable,
        "kept": kept,
    }
