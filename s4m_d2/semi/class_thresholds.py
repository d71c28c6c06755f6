"""Score thresholds by class, which follow the teacher's confidence. Not part of the paper.

As in FlexMatch and FreeMatch, of queries instead of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

FLOOR = 0.5  # the lowest threshold of a class, as a share of SCORE_THRESH
BATCHES = 100  # over about so many the average runs; of the first ones it is the mean


class ClassThresholds:
    """Lowers the threshold of classes of which the teacher is less sure than of its surest one.

    A class' confidence is the mean score of the queries that prefer it, with scores above the
    lowest threshold, averaged exponentially over the batches that have such queries. Its threshold
    is ``score_thresh * confidence / largest confidence``, at least ``FLOOR * score_thresh``; before
    the class is seen it is ``score_thresh``.

    Args:
        score_thresh: S4M.PSEUDO_LABEL.SCORE_THRESH, which no threshold exceeds.
        num_classes: K.
    """

    def __init__(self, score_thresh: float, num_classes: int) -> None:
        self.score_thresh = score_thresh
        self.confidence = torch.zeros(num_classes)
        self.batches = torch.zeros(num_classes)  # in which each class was seen

    def __call__(self) -> Tensor:
        """(K,) float32 thresholds, on the device of the last batch."""
        relative = self.confidence / self.confidence.amax()
        relative = relative.where(self.batches > 0, 1.0).clamp(min=FLOOR)
        return self.score_thresh * relative

    @torch.no_grad()
    def observe(self, pred_logits: Sequence[Tensor]) -> None:
        """Follow a batch's (Q, K + 1) class logits, in all processes together; no synchronization
        with the device."""
        num_classes = len(self.confidence)
        scores, classes = torch.cat([*pred_logits]).float().softmax(dim=-1).max(dim=-1)
        counted = scores > FLOOR * self.score_thresh  # False for NaN
        chosen = F.one_hot(classes, num_classes + 1)[:, :num_classes] * counted[:, None]
        of_classes = scores.where(counted, 0.0)[:, None] * chosen
        totals = torch.stack([of_classes.sum(0), chosen.sum(0).float()])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(totals)
        sums, counts = totals
        is_seen = counts > 0
        confidence = self.confidence.to(sums.device)
        self.batches = self.batches.to(sums.device) + is_seen
        change = (sums / counts - confidence) / self.batches.clamp(max=BATCHES)
        self.confidence = confidence + change.where(is_seen, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"confidence": self.confidence, "batches": self.batches}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.confidence, self.batches = state_dict["confidence"], state_dict["batches"]
